"""CBAM as one op per direction, and its autograd."""

from __future__ import annotations

import torch

from .. import reference
from .autograd import fused_function
from .cbam_halves import (
    channel_gate,
    channel_gate_backward,
    empty_bias_gradient,
    pool_channels,
    pool_pixels,
    spatial_bias_gradient,
    spatial_gate,
    spatial_gate_backward,
    unpool_channels,
    unpool_pixels,
)
from .epilogue import empty_residual_gradient, finish, residual_gradient, start_backward, with_epilogue
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define


def _cbam_fwd_reference(x, w1, w2, wconv, bias, residual, activation):
    a = accumulation_dtype(x)
    pooled, argmax_hw = pool_pixels(x, a)
    hidden, gate_c = channel_gate(pooled, w1, w2)
    maps, argmax_c = pool_channels(x * gate_c[:, :, None, None], a)
    gate_s = spatial_gate(maps, wconv, bias)
    y = finish(x, gate_c[:, :, None, None] * gate_s[:, None], residual, activation)
    return y, pooled, argmax_hw, hidden, gate_c, maps, argmax_c, gate_s


def _cbam_bwd_reference(
    grad, x, w1, w2, wconv, bias, residual, pooled, argmax_hw, hidden, channel_gate, maps, argmax_c, spatial_gate,
    activation,
):  # fmt: skip
    gate_c, gate_s = channel_gate[:, :, None, None], spatial_gate[:, None]
    grad = start_backward(grad, x, gate_c * gate_s, residual, activation)
    dz_s = (grad * x * gate_c).sum(1) * spatial_gate * (1 - spatial_gate)
    dmaps, dwconv = spatial_gate_backward(dz_s, maps, wconv)
    du = grad * gate_s + unpool_channels(dmaps, argmax_c, x)
    dz_c = (du * x).sum((2, 3)) * channel_gate * (1 - channel_gate)
    dpooled, dw1, dw2 = channel_gate_backward(dz_c, pooled, hidden, w1, w2)
    dx = du * gate_c + unpool_pixels(dpooled, argmax_hw, x)
    return to_map(dx, x), residual_gradient(grad, x, activation), dw1, dw2, dwconv, spatial_bias_gradient(dz_s, bias)


def _cbam_fwd_fake(x, w1, w2, wconv, bias, residual, activation):
    n, c, h, w = x.shape
    return (
        empty_map(x),
        empty_small(x, n, 2, c),
        empty_small(x, n, c, dtype=torch.int32),
        empty_small(x, n, 2, w1.shape[0]),
        empty_small(x, n, c),
        empty_small(x, n, 2, h, w),
        empty_small(x, n, h, w, dtype=torch.int32),
        empty_small(x, n, h, w),
    )


def _cbam_bwd_fake(
    grad, x, w1, w2, wconv, bias, residual, pooled, argmax_hw, hidden, channel_gate, maps, argmax_c, spatial_gate,
    activation,
):  # fmt: skip
    dweights = (empty_small(x, *w.shape) for w in (w1, w2, wconv))
    return empty_map(x), empty_residual_gradient(x, activation), *dweights, empty_bias_gradient(x, bias)


cbam_fwd = define(
    "cbam_fwd(Tensor x, Tensor w1, Tensor w2, Tensor wconv, Tensor? bias, Tensor? residual, int activation)"
    " -> (Tensor y, Tensor pooled, Tensor argmax_hw, Tensor hidden, Tensor channel_gate, Tensor maps, Tensor argmax_c,"
    " Tensor spatial_gate)",
    "cbam",
    _cbam_fwd_reference,
    _cbam_fwd_fake,
)
cbam_bwd = define(
    "cbam_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor wconv, Tensor? bias, Tensor? residual,"
    " Tensor pooled, Tensor argmax_hw, Tensor hidden, Tensor channel_gate, Tensor maps, Tensor argmax_c,"
    " Tensor spatial_gate, int activation)"
    " -> (Tensor dx, Tensor dresidual, Tensor dw1, Tensor dw2, Tensor dwconv, Tensor dbias)",
    "cbam",
    _cbam_bwd_reference,
    _cbam_bwd_fake,
    gradients_of=("w1", "w2", "wconv", "wconv"),
)


def _gradients(grad, tensors, small, options):
    dx, dresidual, *dweights = cbam_bwd(grad, *tensors, *small, *options)
    return dx, *dweights, dresidual


CBAMFunction = fused_function("CBAMFunction", cbam_fwd, _gradients, with_epilogue(reference.cbam))
