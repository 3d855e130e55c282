"""CBAM and its two halves."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.cbam import CBAM
from ..ops.channel_attention import CHANNEL_ATTENTION
from ..ops.spatial_attention import SPATIAL_ATTENTION
from ..reference.checks import check_bottleneck, check_feature_map, check_spatial_kernel
from .serve import serve

__all__ = ["FastCBAM", "FastChannelAttention", "FastSpatialAttention", "cbam", "channel_attention", "spatial_attention"]


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
    return serve(CBAM, (x, w1, w2, wconv, bias), residual=residual, activation=activation)


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
    return serve(CHANNEL_ATTENTION, (x, w1, w2))


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
    return serve(SPATIAL_ATTENTION, (x, wconv, bias))


class FastChannelAttention(reference.ChannelAttention):
    """`reference.ChannelAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> gate ``[N, C, 1, 1]``; see `channel_attention`."""
        return channel_attention(x, *self.weights())


class FastSpatialAttention(reference.SpatialAttention):
    """`reference.SpatialAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layer do not run: the fused op reads its parameter alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> gate ``[N, 1, H, W]``; see `spatial_attention`."""
        return spatial_attention(x, *self.weights())


class FastCBAM(reference.CBAM):
    """`reference.CBAM`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner modules do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(cbam(x) + residual)``; see `cbam`."""
        return cbam(x, *self.weights(), residual=residual, activation=activation)
