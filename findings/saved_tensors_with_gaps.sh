#!/usr/bin/env bash
# Guess: a hook on saved tensors (torch.autograd.graph.saved_tensors_hooks) that brings back equal values in other strides,
# as one does that keeps activations packed beside each other and hands out views, changes no gradient: every backward
# accepts strided tensors, or makes them contiguous, or raises. On a CPU layer_norm, group_norm and scaled dot product
# attention do none of this: they read the values between the elements too, and their gradients are wrong without a word.
# Batch norm, softmax, convolution, pooling and GELU are right. Such hooks must hand out contiguous tensors.
#
# Seen on 2026-12-01 with torch 2.13.0 on a CPU:
#   wrong: group_norm, layer_norm, scaled_dot_product_attention
#   right: batch_norm, conv2d, gelu, instance_norm, max_pool2d, rms_norm, softmax
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

torch.manual_seed(0)
x, grad = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
weight, bias, kernel = torch.rand(4), torch.rand(4), torch.randn(4, 4, 3, 3)
FUNCTIONS = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, weight, bias, training=True),
    "conv2d": lambda x: F.conv2d(x, kernel, padding=1),
    "gelu": F.gelu,
    "group_norm": lambda x: F.group_norm(x, 2, weight, bias),
    "instance_norm": F.instance_norm,
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 1, 1),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "softmax": lambda x: x.softmax(3),
}


def with_gaps(t):
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


def gradient(function, unpack):
    inner = x.clone().requires_grad_()
    with saved_tensors_hooks(lambda t: t, unpack):
        y = function(inner)
    return torch.autograd.grad(y, inner, grad)[0]


found = {True: [], False: []}
for name, function in FUNCTIONS.items():
    found[torch.allclose(gradient(function, with_gaps), gradient(function, lambda t: t), atol=1e-4)].append(name)
print("wrong:", ", ".join(found[False]))
print("right:", ", ".join(found[True]))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
wrong: group_norm, layer_norm, scaled_dot_product_attention
right: batch_norm, conv2d, gelu, instance_norm, max_pool2d, rms_norm, softmax
SEEN
echo "as described"
