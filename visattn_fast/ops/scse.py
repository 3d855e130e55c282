"""scSE: x times the sum of a gate per channel, from the means, and a gate per pixel.

Means, hidden layer and gates are saved for backward. The Triton kernels move the bytes of x 3 times forward and 4 times
backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .declare import gate_op
from .epilogue import finish, residual_gradient, start_backward
from .layout import accumulation_dtype, as_matrices, to_map


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ws: Tensor,
    bs: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> tuple[Tensor, ...]:
    a = accumulation_dtype(x)
    mean = x.mean((2, 3), dtype=a)
    hidden, channel_gate = mean_gate(mean, w1, b1, w2, b2)
    logits = torch.einsum("nchw,c->nhw", x.to(a), ws.flatten().to(a))
    spatial_gate = torch.sigmoid(logits if bs is None else logits + bs.to(a))
    y = finish(x, channel_gate[:, :, None, None] + spatial_gate[:, None], residual, activation)
    return y, mean, hidden, channel_gate, spatial_gate


def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    ws: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    hidden: Tensor,
    channel_gate: Tensor,
    spatial_gate: Tensor,
    activation: int,
) -> tuple[Tensor, ...]:
    gate = channel_gate[:, :, None, None] + spatial_gate[:, None]
    grad = start_backward(grad, x, gate, residual, activation)
    product = grad * x
    dz_s = product.sum(1) * spatial_gate * (1 - spatial_gate)
    dmean, *dweights = mean_gate_backward(product.sum((2, 3)), w1, w2, mean, hidden, channel_gate)
    dws = torch.einsum("nchw,nhw->c", x.to(grad.dtype), dz_s).view(ws.shape)
    through_spatial = ws.view(1, -1, 1, 1).to(grad.dtype) * dz_s[:, None]
    dx = grad * gate + through_spatial + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return to_map(dx, x), residual_gradient(grad, x, activation), *dweights, dws, dz_s.sum().view(1)


def mean_gate(mean: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> tuple[Tensor, ...]:
    """Computes the hidden layer ``[N, R]`` and the gate ``[N, C]`` from means ``[N, C]``."""
    w1, b1, w2, b2 = as_matrices(mean.dtype, w1, b1, w2, b2)
    hidden = F.relu(F.linear(mean, w1, b1))
    return hidden, torch.sigmoid(F.linear(hidden, w2, b2))


def mean_gate_backward(
    dgate: Tensor, w1: Tensor, w2: Tensor, mean: Tensor, hidden: Tensor, gate: Tensor
) -> tuple[Tensor, ...]:
    """Backward of `mean_gate`: gradients of the means, w1, b1, w2 and b2, from the gate's."""
    dz2 = dgate * gate * (1 - gate)
    dz1 = torch.where(hidden <= 0, 0.0, dz2 @ w2.flatten(1).to(dz2.dtype))
    dw1, dw2 = (dz1.t() @ mean).view(w1.shape), (dz2.t() @ hidden).view(w2.shape)
    return dz1 @ w1.flatten(1).to(dz1.dtype), dw1, dz1.sum(0), dw2, dz2.sum(0)


SCSE = gate_op(
    "scse",
    weights={"w1": "R C", "b1": "R or None", "w2": "C R", "b2": "C or None", "ws": "1 C", "bs": "1 or None"},
    saves={"mean": "N C", "hidden": "N R", "channel_gate": "N C", "spatial_gate": "N H W"},
    unread=("b1", "b2", "bs"),
    forward=_forward,
    backward=_backward,
    mathematics=reference.scse,
    over_positions=True,
)
