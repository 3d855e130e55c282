#!/usr/bin/env bash
# Merging a LoRA adapter keeps the network's output, or so one would guess. With peft 0.21.2 it does not for a convolution
# whose `padding_mode` is not "zeros": the adapter's own convolution pads with zeros, so an adapted network is trained with
# one border and served, merged, with another. Nothing is said. Pixels away from the border agree. DoRA and LoKr do the same.
# GAM's 7x7 convolutions pad by replication.
# Before merging, call the network on the inputs that matter and compare; or adapt 1x1 layers alone.
#
# Seen on 2026-12-01 with torch 2.13.0:
#   LoRA, zeros: merged alike
#   LoRA, replicate: 35.6 % off, pixels inside alike
#   DoRA, replicate: 49.2 % off, pixels inside alike
#   LoKr, replicate: 17.8 % off, pixels inside alike
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    accelerate==1.15.0 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model


def merged(name: str, config, mode: str) -> str:
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)).double(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    x = torch.randn(1, 4, 8, 8).double()
    with torch.no_grad():
        adapted = model.eval()(x)
        error = (model.merge_and_unload()(x) - adapted).abs() / adapted.abs().max()
    inside = "alike" if error[..., 1:-1, 1:-1].max() < 1e-12 else "not alike"
    off = "merged alike" if error.max() < 1e-12 else f"{error.max():.1%} off, pixels inside {inside}".replace("%", " %")
    return f"{name}, {mode}: {off}"


print(merged("LoRA", LoraConfig(r=2, target_modules=["0"]), "zeros"))
print(merged("LoRA", LoraConfig(r=2, target_modules=["0"]), "replicate"))
print(merged("DoRA", LoraConfig(r=2, use_dora=True, target_modules=["0"]), "replicate"))
print(merged("LoKr", LoKrConfig(r=2, target_modules=["0"]), "replicate"))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
LoRA, zeros: merged alike
LoRA, replicate: 35.6 % off, pixels inside alike
DoRA, replicate: 49.2 % off, pixels inside alike
LoKr, replicate: 17.8 % off, pixels inside alike
SEEN
echo "as described"
