"""CBAM and its two halves."""

from __future__ import annotations

from torch import Tensor

from .. import ops, reference
from ..backends import fused
from ..reference.checks import check_bottleneck, check_feature_map, check_spatial_kernel
from ._gated import gated


def cbam(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    wconv: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """CBAM: ``u = x * channel_attention(x)``, then ``act(u * spatial_attention(u) + residual)``.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, w2: as in `channel_attention`.
        wconv, bias: as in `spatial_attention`.
        residual, activation: as in `se`.

    Returns, raises: as `se`.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    check_bottleneck(x, w1, None, w2, None)
    check_spatial_kernel(wconv, bias, x)
    return gated(reference.cbam, ops.CBAMFunction, (x, w1, w2, wconv, bias), residual, activation)


def channel_attention(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """CBAM's channel gate ``sigmoid(f(mean(x)) + f(max(x)))``, ``f(v) = w2 relu(w1 v)``; mean and max over H and W.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, w2: ``[R, C]`` and ``[C, R]``, or 1x1 convolutions' ``[R, C, 1, 1]`` and ``[C, R, 1, 1]``.

    Returns:
        ``[N, C, 1, 1]`` in x's dtype.

    Raises: as `se`.
    """
    check_bottleneck(x, w1, None, w2, None)
    if not fused(x):
        return ops.mixed(reference.channel_attention, x, w1, w2)
    return ops.run(ops.ChannelAttentionFunction, x, w1, w2)[0]


def spatial_attention(x: Tensor, wconv: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """CBAM's spatial gate ``sigmoid(conv([mean(x), max(x)]) + bias)``; mean and max over C, zero padding.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        wconv: ``[1, 2, k, k]`` with odd k; its first input is the mean.
        bias: ``[1]``, added to the convolution; None for none.

    Returns:
        ``[N, 1, H, W]`` in x's dtype.

    Raises: as `se`.
    """
    check_feature_map(x)
    check_spatial_kernel(wconv, bias, x)
    if not fused(x):
        return ops.mixed(reference.spatial_attention, x, wconv, bias)
    return ops.run(ops.SpatialAttentionFunction, x, wconv, bias)[0]
