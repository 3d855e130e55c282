#!/usr/bin/env bash
# Guess: in float64, the slope of PyTorch's hard sigmoid between -3 and 3 is 1/6 to float64's last place, as its values are
# exact. It is not: backward multiplies by 1/6 rounded to float32. The relative error, 3e-8, is eight orders of magnitude
# above float64's rounding. Hard swish, which MobileNetV3 uses beside it, has an exact slope. An oracle in float64 of a
# network with hard sigmoids (SE gates of MobileNetV3, TinyNet, FBNetV3) has gradients of float32's accuracy; relu6(x + 3) / 6
# is exact.
#
# Seen on 2026-12-01 with torch 2.13.0 on a CPU:
#   values: hardsigmoid exact True, hardswish exact True
#   slope of hardsigmoid is 1/6: in float64 False, in float32 True
#   slope of relu6(x + 3) / 6 is 1/6 in float64: True
#   slope of hardswish is x / 3 + 1/2 in float64: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch.nn.functional as F

x = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)


def slope(function) -> torch.Tensor:
    return torch.autograd.grad(function(x).sum(), x)[0]


def exact(found: torch.Tensor, expected) -> bool:
    return bool(((found - expected).abs() < 1e-15).all())


print(f"values: hardsigmoid exact {exact(F.hardsigmoid(x), (x + 3) / 6)}, hardswish exact {exact(F.hardswish(x), x * (x + 3) / 6)}")
found = slope(F.hardsigmoid)
rounded = bool((found == torch.tensor(1 / 6, dtype=torch.float32).double()).all())
print(f"slope of hardsigmoid is 1/6: in float64 {exact(found, 1 / 6)}, in float32 {rounded}")
print(f"slope of relu6(x + 3) / 6 is 1/6 in float64: {exact(slope(lambda x: F.relu6(x + 3) / 6), 1 / 6)}")
print(f"slope of hardswish is x / 3 + 1/2 in float64: {exact(slope(F.hardswish), x.detach() / 3 + 0.5)}")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
values: hardsigmoid exact True, hardswish exact True
slope of hardsigmoid is 1/6: in float64 False, in float32 True
slope of relu6(x + 3) / 6 is 1/6 in float64: True
slope of hardswish is x / 3 + 1/2 in float64: True
SEEN
echo "as described"
