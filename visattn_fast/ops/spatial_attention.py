"""CBAM's spatial gate, ``sigmoid(conv([mean, max]) + bias)`` of the channels: the gate itself is the result.

The pooled maps and the positions of the maxima are saved for backward, which does not read x again.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .cbam_halves import (
    pool_channels,
    spatial_bias_gradient,
    spatial_gate,
    spatial_gate_backward,
    unpool_channels,
)
from .declare import gate_op
from .layout import accumulation_dtype, to_map


def _forward(x: Tensor, wconv: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    maps, argmax_c = pool_channels(x, accumulation_dtype(x))
    return spatial_gate(maps, wconv, bias).to(x.dtype)[:, None], maps, argmax_c


def _backward(
    grad: Tensor, x: Tensor, wconv: Tensor, bias: Tensor | None, gate: Tensor, maps: Tensor, argmax_c: Tensor
) -> tuple[Tensor, ...]:
    gate = gate.to(maps.dtype)
    dz = (grad * gate * (1 - gate))[:, 0]
    dmaps, dwconv = spatial_gate_backward(dz, maps, wconv)
    return to_map(unpool_channels(dmaps, argmax_c, x), x), dwconv, spatial_bias_gradient(dz, bias)


SPATIAL_ATTENTION = gate_op(
    "spatial_attention",
    weights={"wconv": "1 2 2*k+1 2*k+1", "bias": "1 or None"},
    result="N 1 H W : x",
    saves={"maps": "N 2 H W", "argmax_c": "N H W : int32 in 0..C-1"},
    empty_if_absent=("bias",),
    epilogue=False,
    forward=_forward,
    backward=_backward,
    mathematics=reference.spatial_attention,
    kernels="cbam",
)
