"""CBAM: one op per direction; x times the channel gate is never stored.

Pooled values, gates and the positions of the maxima are saved for backward. The Triton kernels move the bytes of x 4
times forward (two reads to pool, one to scale, one write) and 5 times backward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from .cbam_halves import (
    channel_gate,
    channel_gate_backward,
    pool_channels,
    pool_pixels,
    spatial_bias_gradient,
    spatial_gate,
    spatial_gate_backward,
    unpool_channels,
    unpool_pixels,
)
from .declare import gate_op
from .epilogue import finish, residual_gradient, start_backward
from .layout import accumulation_dtype, to_map


def _forward(
    x: Tensor, w1: Tensor, w2: Tensor, wconv: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> tuple[Tensor, ...]:
    a = accumulation_dtype(x)
    pooled, argmax_hw = pool_pixels(x, a)
    hidden, gate_c = channel_gate(pooled, w1, w2)
    maps, argmax_c = pool_channels(x * gate_c[:, :, None, None], a)
    gate_s = spatial_gate(maps, wconv, bias)
    y = finish(x, gate_c[:, :, None, None] * gate_s[:, None], residual, activation)
    return y, pooled, argmax_hw, hidden, gate_c, maps, argmax_c, gate_s


def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    wconv: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *saves_and_activation: Any,
) -> tuple[Tensor, ...]:
    pooled, argmax_hw, hidden, channel_gate, maps, argmax_c, spatial_gate, activation = saves_and_activation
    gate_c, gate_s = channel_gate[:, :, None, None], spatial_gate[:, None]
    grad = start_backward(grad, x, gate_c * gate_s, residual, activation)
    dz_s = (grad * x * gate_c).sum(1) * spatial_gate * (1 - spatial_gate)
    dmaps, dwconv = spatial_gate_backward(dz_s, maps, wconv)
    du = grad * gate_s + unpool_channels(dmaps, argmax_c, x)
    dz_c = (du * x).sum((2, 3)) * channel_gate * (1 - channel_gate)
    dpooled, dw1, dw2 = channel_gate_backward(dz_c, pooled, hidden, w1, w2)
    dx = du * gate_c + unpool_pixels(dpooled, argmax_hw, x)
    return to_map(dx, x), residual_gradient(grad, x, activation), dw1, dw2, dwconv, spatial_bias_gradient(dz_s, bias)


CBAM = gate_op(
    "cbam",
    weights={"w1": "R C", "w2": "C R", "wconv": "1 2 2*k+1 2*k+1", "bias": "1 or None"},
    saves={
        "pooled": "N 2 C",
        "argmax_hw": "N C : int32 in 0..H*W-1",
        "hidden": "N 2 R",
        "channel_gate": "N C",
        "maps": "N 2 H W",
        "argmax_c": "N H W : int32 in 0..C-1",
        "spatial_gate": "N H W",
    },
    empty_if_absent=("bias",),
    forward=_forward,
    backward=_backward,
    mathematics=reference.cbam,
)
