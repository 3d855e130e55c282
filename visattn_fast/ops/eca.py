"""Efficient channel attention: ``x * sigmoid(conv1d(mean(x)))``, the convolution along C.

Mean and gate are saved for backward. The Triton kernels move the bytes of x 3 times forward (read to pool, read to
scale, write y) and 4 times backward (read grad and x, read grad, write dx).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .declare import gate_op
from .epilogue import finish, residual_gradient, start_backward
from .layout import accumulation_dtype, to_map


def _forward(x: Tensor, weight: Tensor, residual: Tensor | None, activation: int) -> tuple[Tensor, ...]:
    a = accumulation_dtype(x)
    mean = x.mean((2, 3), dtype=a)
    kernel = weight.to(a).view(1, 1, -1)
    gate = torch.sigmoid(F.conv1d(mean[:, None], kernel, padding=kernel.shape[2] // 2)[:, 0])
    return finish(x, gate[:, :, None, None], residual, activation), mean, gate


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None, mean: Tensor, gate: Tensor, activation: int
) -> tuple[Tensor, ...]:
    grad = start_backward(grad, x, gate[:, :, None, None], residual, activation)
    dz = (grad * x).sum((2, 3)) * gate * (1 - gate)
    kernel = weight.to(dz.dtype).view(1, 1, -1)
    half = kernel.shape[2] // 2
    dmean = F.conv1d(dz[:, None], kernel.flip(2), padding=half)[:, 0]
    windows = F.pad(mean, (half, half)).unfold(1, kernel.shape[2], 1)  # [N, C, k]
    dweight = torch.einsum("nc,nck->k", dz, windows).view(weight.shape)
    dx = grad * gate[:, :, None, None] + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return to_map(dx, x), residual_gradient(grad, x, activation), dweight


ECA = gate_op(
    "eca",
    weights={"weight": "1 1 2*k+1"},
    saves={"mean": "N C", "gate": "N C"},
    forward=_forward,
    backward=_backward,
    mathematics=reference.eca,
    infer=True,
    normed=True,
    over_positions=True,
)
