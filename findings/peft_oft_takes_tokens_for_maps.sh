#!/usr/bin/env bash
# An adapter on nn.Linear takes whatever the layer takes, or so one would guess. OFT in peft 0.21.2 takes every input of four
# dimensions for a convolution's and unfolds it, also in front of a Linear. A layer over maps in channels_last order, as in
# torchvision's Swin (its MLP sees [N, H, W, C]), in GAM and in window attention, then fails at its first call.
# Flatten the pixels, [N, H * W, C], before the layer; or use LoRA, which accepts both.
#
# Seen on 2026-12-01 with torch 2.13.0:
#   LoRA [2, 5, 8]: [2, 5, 8]
#   LoRA [2, 5, 5, 8]: [2, 5, 5, 8]
#   OFT [2, 5, 8]: [2, 5, 8]
#   OFT [2, 5, 5, 8]: RuntimeError: shape '[108, 4, 2]' is invalid for input of size 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    accelerate==1.15.0 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from peft import LoraConfig, OFTConfig, get_peft_model

configurations = {
    "LoRA": LoraConfig(r=2, target_modules=["0"]),
    "OFT": OFTConfig(oft_block_size=2, target_modules=["0"]),
}
for name, config in configurations.items():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
    for shape in ([2, 5, 8], [2, 5, 5, 8]):
        try:
            print(f"{name} {shape}: {list(model(torch.randn(shape)).shape)}")
        except RuntimeError as error:
            print(f"{name} {shape}: RuntimeError: {error}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
LoRA [2, 5, 8]: [2, 5, 8]
LoRA [2, 5, 5, 8]: [2, 5, 5, 8]
OFT [2, 5, 8]: [2, 5, 8]
OFT [2, 5, 5, 8]: RuntimeError: shape '[108, 4, 2]' is invalid for input of size 0
SEEN
echo "as described"
