"""Efficient channel attention: ops and autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import reference
from .autograd import fused_function
from .epilogue import empty_residual_gradient, finish, residual_gradient, start_backward, with_epilogue
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define, define_infer, define_normed


def _eca_fwd_reference(x, weight, residual, activation):
    a = accumulation_dtype(x)
    mean = x.mean((2, 3), dtype=a)
    kernel = weight.to(a).view(1, 1, -1)
    gate = torch.sigmoid(F.conv1d(mean[:, None], kernel, padding=kernel.shape[2] // 2)[:, 0])
    return finish(x, gate[:, :, None, None], residual, activation), mean, gate


def _eca_bwd_reference(grad, x, weight, residual, mean, gate, activation):
    grad = start_backward(grad, x, gate[:, :, None, None], residual, activation)
    dz = (grad * x).sum((2, 3)) * gate * (1 - gate)
    kernel = weight.to(dz.dtype).view(1, 1, -1)
    half = kernel.shape[2] // 2
    dmean = F.conv1d(dz[:, None], kernel.flip(2), padding=half)[:, 0]
    windows = F.pad(mean, (half, half)).unfold(1, kernel.shape[2], 1)  # [N, C, k]
    dweight = torch.einsum("nc,nck->k", dz, windows).view(weight.shape)
    dx = grad * gate[:, :, None, None] + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return to_map(dx, x), residual_gradient(grad, x, activation), dweight


def _eca_fwd_fake(x, weight, residual, activation):
    n, c = x.shape[0], x.shape[1]
    return empty_map(x), empty_small(x, n, c), empty_small(x, n, c)


def _eca_bwd_fake(grad, x, weight, residual, mean, gate, activation):
    return empty_map(x), empty_residual_gradient(x, activation), empty_small(x, *weight.shape)


eca_fwd = define(
    "eca_fwd(Tensor x, Tensor weight, Tensor? residual, int activation) -> (Tensor y, Tensor mean, Tensor gate)",
    "eca",
    _eca_fwd_reference,
    _eca_fwd_fake,
)
eca_infer = define_infer("eca")
eca_normed = define_normed("eca")
eca_bwd = define(
    "eca_bwd(Tensor grad, Tensor x, Tensor weight, Tensor? residual, Tensor mean, Tensor gate, int activation)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight)",
    "eca",
    _eca_bwd_reference,
    _eca_bwd_fake,
    gradients_of=("weight",),
)


def _gradients(grad, tensors, small, options):
    dx, dresidual, dweight = eca_bwd(grad, *tensors, *small, *options)
    return dx, dweight, dresidual


ECAFunction = fused_function("ECAFunction", eca_fwd, _gradients, with_epilogue(reference.eca), infer=eca_infer)
