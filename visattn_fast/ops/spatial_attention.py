"""CBAM's spatial gate: ops and autograd."""

from __future__ import annotations

import torch

from .. import reference
from .autograd import fused_function, mixed
from .cbam_halves import (
    empty_bias_gradient,
    pool_channels,
    spatial_bias_gradient,
    spatial_gate,
    spatial_gate_backward,
    unpool_channels,
)
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define


def _spatial_attention_fwd_reference(x, wconv, bias):
    maps, argmax_c = pool_channels(x, accumulation_dtype(x))
    return spatial_gate(maps, wconv, bias).to(x.dtype)[:, None], maps, argmax_c


def _spatial_attention_bwd_reference(grad, x, wconv, bias, gate, maps, argmax_c):
    gate = gate.to(maps.dtype)
    dz = (grad * gate * (1 - gate))[:, 0]
    dmaps, dwconv = spatial_gate_backward(dz, maps, wconv)
    return to_map(unpool_channels(dmaps, argmax_c, x), x), dwconv, spatial_bias_gradient(dz, bias)


def _spatial_attention_fwd_fake(x, wconv, bias):
    n, _, h, w = x.shape
    gate = empty_small(x, n, 1, h, w, dtype=x.dtype)
    return gate, empty_small(x, n, 2, h, w), empty_small(x, n, h, w, dtype=torch.int32)


def _spatial_attention_bwd_fake(grad, x, wconv, bias, gate, maps, argmax_c):
    return empty_map(x), empty_small(x, *wconv.shape), empty_bias_gradient(x, bias)


spatial_attention_fwd = define(
    "spatial_attention_fwd(Tensor x, Tensor wconv, Tensor? bias) -> (Tensor gate, Tensor maps, Tensor argmax_c)",
    "cbam",
    _spatial_attention_fwd_reference,
    _spatial_attention_fwd_fake,
)
spatial_attention_bwd = define(
    "spatial_attention_bwd(Tensor grad, Tensor x, Tensor wconv, Tensor? bias, Tensor gate, Tensor maps,"
    " Tensor argmax_c) -> (Tensor dx, Tensor dwconv, Tensor dbias)",
    "cbam",
    _spatial_attention_bwd_reference,
    _spatial_attention_bwd_fake,
    gradients_of=("wconv", "wconv"),
)


def _gradients(grad, tensors, small, options):
    return spatial_attention_bwd(grad, *tensors, *small)


def _mathematics(x, wconv, bias):
    return mixed(reference.spatial_attention, x, wconv, bias)


SpatialAttentionFunction = fused_function(
    "SpatialAttentionFunction", spatial_attention_fwd, _gradients, _mathematics, saves_result=True
)
