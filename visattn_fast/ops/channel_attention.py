"""CBAM's channel gate, ``sigmoid(f(mean) + f(max))`` of the pixels: the gate itself is the result.

Pooled values and the positions of the maxima are saved for backward, which does not read x again.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .cbam_halves import channel_gate, channel_gate_backward, pool_pixels, unpool_pixels
from .declare import gate_op
from .layout import accumulation_dtype, to_map


def _forward(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
    pooled, argmax_hw = pool_pixels(x, accumulation_dtype(x))
    hidden, gate = channel_gate(pooled, w1, w2)
    return gate.to(x.dtype, copy=True)[:, :, None, None], pooled, argmax_hw, hidden


def _backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, pooled: Tensor, argmax_hw: Tensor, hidden: Tensor
) -> tuple[Tensor, ...]:
    gate = gate.to(pooled.dtype)
    dz = (grad * gate * (1 - gate))[:, :, 0, 0]
    dpooled, dw1, dw2 = channel_gate_backward(dz, pooled, hidden, w1, w2)
    return to_map(unpool_pixels(dpooled, argmax_hw, x), x), dw1, dw2


CHANNEL_ATTENTION = gate_op(
    "channel_attention",
    weights={"w1": "R C", "w2": "C R"},
    result="N C 1 1 : x",
    saves={"pooled": "N 2 C", "argmax_hw": "N C : int32 in 0..H*W-1", "hidden": "N 2 R"},
    epilogue=False,
    forward=_forward,
    backward=_backward,
    mathematics=reference.channel_attention,
    kernels="cbam",
    over_positions=True,
)
