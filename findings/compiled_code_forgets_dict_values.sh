#!/usr/bin/env bash
# Guess: code of torch.compile is compiled again when a number changes that it read from a layer, whichever way it was
# read: layer.p, or vars(layer)["p"], which is the same number. On Python 3.13.0 the second kind has no guard: a dropout,
# a dilation, an eps that was read from the __dict__ of a layer may change, and the old code goes on without a word. On
# Python 3.11 (torch 2.13.0, 2.15.0) and 3.12 (torch 2.14.1) both have one.
#
# Seen on 2026-12-01 with torch 2.14.1 and 2.15.0 on Python 3.13.0 and a CPU, after p went from 0 to 1:
#   layer.p: compiled again
#   getattr(layer, "p"): compiled again
#   vars(layer)["p"]: OLD CODE
#   layer.__dict__.get("p"): OLD CODE
#   layer found in vars(module)["_modules"], then layer.p: compiled again
#
# Needs Python 3.13.0: PYTHON=/path/to/it, or python3.13 on the path.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.13}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import nn

READ = {
    "layer.p": lambda module: module.layer.p,
    'getattr(layer, "p")': lambda module: getattr(module.layer, "p"),
    'vars(layer)["p"]': lambda module: vars(module.layer)["p"],
    'layer.__dict__.get("p")': lambda module: module.layer.__dict__.get("p"),
    'layer found in vars(module)["_modules"], then layer.p': lambda module: vars(module)["_modules"]["layer"].p,
}


class Model(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Dropout(0.0), read

    def forward(self, x):
        return 2 * x if self.read(self) == 0 else self.layer(x)


for name, read in READ.items():
    torch._dynamo.reset()
    model = Model(read).train()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(2))
    model.layer.p = 1.0
    print(f"{name}: {'compiled again' if torch.equal(compiled(torch.ones(2)), torch.zeros(2)) else 'OLD CODE'}")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
layer.p: compiled again
getattr(layer, "p"): compiled again
vars(layer)["p"]: OLD CODE
layer.__dict__.get("p"): OLD CODE
layer found in vars(module)["_modules"], then layer.p: compiled again
SEEN
