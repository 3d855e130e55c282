#!/usr/bin/env bash
# Forty-nine tokens take forty-nine times the multiplications of one, or so one would guess. torchinfo 1.8.0 multiplies the
# parameters of a Linear by the first dimension alone: a layer over [1, 49, 16] counts as much as over [1, 16]. A 1x1
# convolution with the same weights over 49 pixels counts in full, so a window attention looks 49 times cheaper than the
# same products written as convolutions. thop, fvcore and torch.utils.flop_counter count all tokens.
#
# Seen on 2026-12-01 with torch 2.13.0:
#   Linear, 1 token: torchinfo 256, torch 256
#   Linear, 49 tokens: torchinfo 256, torch 12544
#   Conv2d 1x1, 49 pixels: torchinfo 12544, torch 12544
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchinfo==1.8.0
cat > "$folder/run.py" <<'PYTHON'
import torch
import torchinfo
from torch.utils.flop_counter import FlopCounterMode


def counted(name: str, layer: torch.nn.Module, shape: tuple[int, ...]) -> str:
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    found = torchinfo.summary(layer, input_data=x, verbose=0).total_mult_adds
    return f"{name}: torchinfo {found}, torch {counter.get_total_flops() // 2}"


linear = torch.nn.Linear(16, 16, bias=False)
print(counted("Linear, 1 token", linear, (1, 16)))
print(counted("Linear, 49 tokens", linear, (1, 49, 16)))
print(counted("Conv2d 1x1, 49 pixels", torch.nn.Conv2d(16, 16, 1, bias=False), (1, 16, 7, 7)))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
Linear, 1 token: torchinfo 256, torch 256
Linear, 49 tokens: torchinfo 256, torch 12544
Conv2d 1x1, 49 pixels: torchinfo 12544, torch 12544
SEEN
echo "as described"
