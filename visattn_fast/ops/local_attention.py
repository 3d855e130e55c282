"""LocalAttention: ops and autograd."""

from __future__ import annotations

import torch

from .. import reference
from .autograd import fused_function
from .epilogue import empty_residual_gradient, finish, residual_gradient, start_backward, with_epilogue
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define
from .scse import empty_small_gates, empty_weight_gradients, mean_gate, mean_gate_backward

_WORD = 32  # hidden units whose signs share an int32


def _local_attention_fwd_reference(x, w1, b1, w2, b2, p1, q1, p2, q2, residual, activation):
    a = accumulation_dtype(x)
    mean = x.mean((2, 3), dtype=a)
    hidden, channel_gate = mean_gate(mean, w1, b1, w2, b2)
    inner = torch.einsum("nchw,rc->nrhw", x.to(a), p1.flatten(1).to(a))
    inner = inner if q1 is None else inner + q1.to(a)[:, None, None]
    logits = torch.einsum("nrhw,r->nhw", inner.relu(), p2.flatten().to(a))
    spatial_gate = torch.sigmoid(logits if q2 is None else logits + q2.to(a))
    y = finish(x, channel_gate[:, :, None, None] * spatial_gate[:, None], residual, activation)
    return y, mean, hidden, channel_gate, spatial_gate, _pack(~(inner <= 0))


def _local_attention_bwd_reference(
    grad, x, w1, w2, p1, q1, p2, residual, mean, hidden, channel_gate, spatial_gate, signs, activation
):
    a = accumulation_dtype(x)
    gate_c, gate_s = channel_gate[:, :, None, None], spatial_gate[:, None]
    grad = start_backward(grad, x, gate_c * gate_s, residual, activation)
    product = grad * x
    dz_s = (product * gate_c).sum(1) * spatial_gate * (1 - spatial_gate)
    dmean, *dweights = mean_gate_backward((product * gate_s).sum((2, 3)), w1, w2, mean, hidden, channel_gate)
    p1_, p2_ = p1.flatten(1).to(a), p2.flatten().to(a)
    masked = torch.where(_unpack(signs, p1.shape[0]), dz_s[:, None], 0.0)
    # With S = sum masked x and t = sum masked, the second layer's gradient sum dz relu(p1 x + q1) is p1 . S + q1 t.
    sums, count = torch.einsum("nrhw,nchw->rc", masked, x.to(a)), masked.sum((0, 2, 3))
    dp2 = (p1_ * sums).sum(1) + (0 if q1 is None else q1.to(a) * count)
    through_spatial = torch.einsum("nrhw,rc->nchw", masked, p2_[:, None] * p1_)
    dx = grad * (gate_c * gate_s) + through_spatial + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    dspatial = (p2_[:, None] * sums).view(p1.shape), p2_ * count, dp2.view(p2.shape), dz_s.sum().view(1)
    return to_map(dx, x), residual_gradient(grad, x, activation), *dweights, *dspatial


def _pack(positive):
    """``[N, S, H, W]`` -> int32 ``[N, ceil(S / 32), H, W]``, unit r in bit r % 32."""
    bits = positive.int() << (torch.arange(positive.shape[1], device=positive.device) % _WORD).int()[:, None, None]
    return torch.stack([part.sum(1, dtype=torch.int32) for part in bits.split(_WORD, 1)], 1)


def _unpack(signs, units):
    r = torch.arange(units, device=signs.device)
    return (signs[:, r // _WORD] >> (r % _WORD).int()[:, None, None]) & 1 != 0


def _local_attention_fwd_fake(x, w1, b1, w2, b2, p1, q1, p2, q2, residual, activation):
    n, _, h, w = x.shape
    words = (p1.shape[0] + _WORD - 1) // _WORD
    return empty_map(x), *empty_small_gates(x, w1), empty_small(x, n, words, h, w, dtype=torch.int32)


def _local_attention_bwd_fake(
    grad, x, w1, w2, p1, q1, p2, residual, mean, hidden, channel_gate, spatial_gate, signs, activation
):
    return empty_map(x), empty_residual_gradient(x, activation), *empty_weight_gradients(x, w1, w2, p1, p2)


local_attention_fwd = define(
    "local_attention_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor p1, Tensor? q1, Tensor p2,"
    " Tensor? q2, Tensor? residual, int activation) -> (Tensor y, Tensor mean, Tensor hidden, Tensor channel_gate,"
    " Tensor spatial_gate, Tensor signs)",
    "local_attention",
    _local_attention_fwd_reference,
    _local_attention_fwd_fake,
)
local_attention_bwd = define(
    "local_attention_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor p1, Tensor? q1, Tensor p2,"
    " Tensor? residual, Tensor mean, Tensor hidden, Tensor channel_gate, Tensor spatial_gate, Tensor signs,"
    " int activation) -> (Tensor dx, Tensor dresidual, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dp1,"
    " Tensor dq1, Tensor dp2, Tensor dq2)",
    "local_attention",
    _local_attention_bwd_reference,
    _local_attention_bwd_fake,
    gradients_of=("w1", "w1", "w2", "w2", "p1", "p1", "p2", "p2"),
)


def _gradients(grad, tensors, small, options):
    x, w1, _, w2, _, p1, q1, p2, _, residual = tensors
    dx, dresidual, *dweights = local_attention_bwd(grad, x, w1, w2, p1, q1, p2, residual, *small, *options)
    return dx, *dweights, dresidual


LocalAttentionFunction = fused_function(
    "LocalAttentionFunction", local_attention_fwd, _gradients, with_epilogue(reference.local_attention)
)
