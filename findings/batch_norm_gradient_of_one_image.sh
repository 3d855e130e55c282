#!/usr/bin/env bash
# Guess: an image taken out of a channels_last batch, x[0][None], has the same gradients as its copy: it holds the same
# values, and PyTorch says that it is contiguous in channels_last. Through a batch norm on a CPU it has not, if the
# gradient from above is in NCHW (as after a flatten or a pooling): dx is wrong without a word, in training and in eval
# mode; the result itself is right. The view's stride along the batch, of size 1, is not C * H * W. With a gradient in
# channels_last, or after x.clone(memory_format=torch.channels_last), it is right. Group norms are not concerned.
#
# Seen on 2026-12-01 with torch 2.13.0 on a CPU:
#   contiguous in channels_last: view True, copy True; strides of the batch: view 5, copy 100
#   batch_norm, training, gradient in NCHW: result right True, dx right False
#   batch_norm, training, gradient in channels_last: result right True, dx right True
#   batch_norm, eval, gradient in NCHW: result right True, dx right False
#   batch_norm, eval, gradient in channels_last: result right True, dx right True
#   group_norm, gradient in NCHW: result right True, dx right True
#   group_norm, gradient in channels_last: result right True, dx right True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
batch = torch.randn(2, 5, 4, 5).contiguous(memory_format=torch.channels_last)
view = batch[0][None]
copy = view.clone(memory_format=torch.contiguous_format).contiguous(memory_format=torch.channels_last)
weight, bias = torch.rand(5), torch.rand(5)
NORMS = {
    "batch_norm, training": lambda x: F.batch_norm(x, None, None, weight, bias, training=True),
    "batch_norm, eval": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5), weight, bias),
    "group_norm": lambda x: F.group_norm(x, 1, weight, bias),
}
FORMS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def run(norm, x, grad):
    x = x.detach().requires_grad_()
    y = norm(x)
    return y, torch.autograd.grad(y, x, grad)[0]


last = [t.is_contiguous(memory_format=torch.channels_last) for t in (view, copy)]
print(f"contiguous in channels_last: view {last[0]}, copy {last[1]}; strides of the batch: view {view.stride(0)}, copy {copy.stride(0)}")
for name, norm in NORMS.items():
    for form, memory_format in FORMS.items():
        grad = torch.randn(1, 5, 4, 5).contiguous(memory_format=memory_format)
        right = [torch.allclose(a, b, atol=1e-5) for a, b in zip(run(norm, view, grad), run(norm, copy, grad))]
        print(f"{name}, gradient in {form}: result right {right[0]}, dx right {right[1]}")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
contiguous in channels_last: view True, copy True; strides of the batch: view 5, copy 100
batch_norm, training, gradient in NCHW: result right True, dx right False
batch_norm, training, gradient in channels_last: result right True, dx right True
batch_norm, eval, gradient in NCHW: result right True, dx right False
batch_norm, eval, gradient in channels_last: result right True, dx right True
group_norm, gradient in NCHW: result right True, dx right True
group_norm, gradient in channels_last: result right True, dx right True
SEEN
echo "as described"
