"""Local attention: x times a gate per channel, from the means, times a gate per pixel, from an MLP over its channels.

Means, gates and the signs of the hidden map (a bit each) are saved for backward; the hidden map is never stored. The
Triton kernels move the bytes of x 3 times forward and 4 times backward (5 if a program cannot hold all channels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .declare import gate_op
from .epilogue import finish, residual_gradient, start_backward
from .layout import accumulation_dtype, to_map
from .scse import mean_gate, mean_gate_backward

_WORD = 32  # hidden units whose signs share an int32


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    p1: Tensor,
    q1: Tensor | None,
    p2: Tensor,
    q2: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> tuple[Tensor, ...]:
    a = accumulation_dtype(x)
    mean = x.mean((2, 3), dtype=a)
    hidden, channel_gate = mean_gate(mean, w1, b1, w2, b2)
    inner = torch.einsum("nchw,rc->nrhw", x.to(a), p1.flatten(1).to(a))
    inner = inner if q1 is None else inner + q1.to(a)[:, None, None]
    logits = torch.einsum("nrhw,r->nhw", inner.relu(), p2.flatten().to(a))
    spatial_gate = torch.sigmoid(logits if q2 is None else logits + q2.to(a))
    y = finish(x, channel_gate[:, :, None, None] * spatial_gate[:, None], residual, activation)
    return y, mean, hidden, channel_gate, spatial_gate, _pack(~(inner <= 0))


def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    p1: Tensor,
    q1: Tensor | None,
    p2: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    hidden: Tensor,
    channel_gate: Tensor,
    spatial_gate: Tensor,
    signs: Tensor,
    activation: int,
) -> tuple[Tensor, ...]:
    a = accumulation_dtype(x)
    gate_c, gate_s = channel_gate[:, :, None, None], spatial_gate[:, None]
    grad = start_backward(grad, x, gate_c * gate_s, residual, activation)
    product = grad * x
    dz_s = (product * gate_c).sum(1) * spatial_gate * (1 - spatial_gate)
    dmean, *dweights = mean_gate_backward((product * gate_s).sum((2, 3)), w1, w2, mean, hidden, channel_gate)
    p1_, p2_ = p1.flatten(1).to(a), p2.flatten().to(a)
    masked = torch.where(_unpack(signs, p1.shape[0]), dz_s[:, None], 0.0)
    # With S = sum(masked x) and t = sum(masked), p2's gradient, sum(dz relu(p1 x + q1)), is p1 . S + q1 t.
    sums, count = torch.einsum("nrhw,nchw->rc", masked, x.to(a)), masked.sum((0, 2, 3))
    dp2 = (p1_ * sums).sum(1) + (0 if q1 is None else q1.to(a) * count)
    through_spatial = torch.einsum("nrhw,rc->nchw", masked, p2_[:, None] * p1_)
    dx = grad * (gate_c * gate_s) + through_spatial + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    dspatial = (p2_[:, None] * sums).view(p1.shape), p2_ * count, dp2.view(p2.shape), dz_s.sum().view(1)
    return to_map(dx, x), residual_gradient(grad, x, activation), *dweights, *dspatial


def _pack(positive: Tensor) -> Tensor:
    """Packs ``[N, S, H, W]`` into int32 ``[N, ceil(S / 32), H, W]``, unit r in bit r % 32."""
    bits = positive.int() << (torch.arange(positive.shape[1], device=positive.device) % _WORD).int()[:, None, None]
    return torch.stack([part.sum(1, dtype=torch.int32) for part in bits.split(_WORD, 1)], 1)


def _unpack(signs: Tensor, units: int) -> Tensor:
    r = torch.arange(units, device=signs.device)
    return (signs[:, r // _WORD] >> (r % _WORD).int()[:, None, None]) & 1 != 0


LOCAL_ATTENTION = gate_op(
    "local_attention",
    weights={
        "w1": "R C",
        "b1": "R or None",
        "w2": "C R",
        "b2": "C or None",
        "p1": "Q C",
        "q1": "Q or None",
        "p2": "1 Q",
        "q2": "1 or None",
    },
    saves={
        "mean": "N C",
        "hidden": "N R",
        "channel_gate": "N C",
        "spatial_gate": "N H W",
        "signs": "N (Q+31)//32 H W : int32",
    },
    unread=("b1", "b2", "q2"),
    forward=_forward,
    backward=_backward,
    mathematics=reference.local_attention,
)
