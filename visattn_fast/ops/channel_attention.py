"""CBAM's channel gate: ops and autograd."""

from __future__ import annotations

import torch

from .. import reference
from .autograd import fused_function, mixed
from .cbam_halves import channel_gate, channel_gate_backward, pool_pixels, unpool_pixels
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define


def _channel_attention_fwd_reference(x, w1, w2):
    pooled, argmax_hw = pool_pixels(x, accumulation_dtype(x))
    hidden, gate = channel_gate(pooled, w1, w2)
    return gate.to(x.dtype, copy=True)[:, :, None, None], pooled, argmax_hw, hidden


def _channel_attention_bwd_reference(grad, x, w1, w2, gate, pooled, argmax_hw, hidden):
    gate = gate.to(pooled.dtype)
    dz = (grad * gate * (1 - gate))[:, :, 0, 0]
    dpooled, dw1, dw2 = channel_gate_backward(dz, pooled, hidden, w1, w2)
    return to_map(unpool_pixels(dpooled, argmax_hw, x), x), dw1, dw2


def _channel_attention_fwd_fake(x, w1, w2):
    n, c, r = x.shape[0], x.shape[1], w1.shape[0]
    gate = empty_small(x, n, c, 1, 1, dtype=x.dtype)
    return gate, empty_small(x, n, 2, c), empty_small(x, n, c, dtype=torch.int32), empty_small(x, n, 2, r)


def _channel_attention_bwd_fake(grad, x, w1, w2, gate, pooled, argmax_hw, hidden):
    return empty_map(x), empty_small(x, *w1.shape), empty_small(x, *w2.shape)


channel_attention_fwd = define(
    "channel_attention_fwd(Tensor x, Tensor w1, Tensor w2)"
    " -> (Tensor gate, Tensor pooled, Tensor argmax_hw, Tensor hidden)",
    "cbam",
    _channel_attention_fwd_reference,
    _channel_attention_fwd_fake,
)
channel_attention_bwd = define(
    "channel_attention_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor gate, Tensor pooled, Tensor argmax_hw,"
    " Tensor hidden) -> (Tensor dx, Tensor dw1, Tensor dw2)",
    "cbam",
    _channel_attention_bwd_reference,
    _channel_attention_bwd_fake,
    gradients_of=("w1", "w2"),
)


def _gradients(grad, tensors, small, options):
    return channel_attention_bwd(grad, *tensors, *small)


def _mathematics(x, w1, w2):
    return mixed(reference.channel_attention, x, w1, w2)


ChannelAttentionFunction = fused_function(
    "ChannelAttentionFunction", channel_attention_fwd, _gradients, _mathematics, saves_result=True
)
