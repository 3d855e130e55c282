"""The public functions: check, choose a backend, call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import ops, reference
from .backends import fused
from .reference.checks import (
    activation_code,
    check_bottleneck,
    check_channel_kernel,
    check_feature_map,
    check_residual,
    check_spatial_kernel,
)

__all__ = ["cbam", "channel_attention", "eca", "se", "spatial_attention"]


def se(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Squeeze-and-excitation: ``act(x * sigmoid(w2 relu(w1 mean(x) + b1) + b2) + residual)``.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: squeeze, ``[R, C]`` (or a 1x1 convolution's ``[R, C, 1, 1]``) and ``[R]`` or None.
        w2, b2: excitation, ``[C, R]`` (or ``[C, R, 1, 1]``) and ``[C]`` or None.
        residual: x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format. Sums are kept in float32 (float64 for float64); weights may
        have another dtype than x.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: the backend asked for cannot serve.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """
    check_bottleneck(x, w1, b1, w2, b2)
    return _gated(reference.se, ops.SEFunction, (x, w1, b1, w2, b2), residual, activation)


def eca(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Efficient channel attention: ``act(x * sigmoid(conv1d(mean(x))) + residual)``, the convolution along C.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        weight: ``[1, 1, k]`` with odd k; zero padding.
        residual, activation: as in `se`.

    Returns, raises: as `se`.

    Source: Wang et al., "ECA-Net", CVPR 2020.
    """
    check_feature_map(x)
    check_channel_kernel(weight, x)
    return _gated(reference.eca, ops.ECAFunction, (x, weight), residual, activation)


def cbam(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    wconv: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """CBAM: ``u = x * channel_attention(x)``, then ``act(u * spatial_attention(u) + residual)``.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, w2: as in `channel_attention`.
        wconv: as in `spatial_attention`.
        residual, activation: as in `se`.

    Returns, raises: as `se`.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    check_bottleneck(x, w1, None, w2, None)
    check_spatial_kernel(wconv, x)
    return _gated(reference.cbam, ops.CBAMFunction, (x, w1, w2, wconv), residual, activation)


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
    return ops.run(ops.ChannelAttentionFunction, x, w1, w2)


def spatial_attention(x: Tensor, wconv: Tensor) -> Tensor:
    """CBAM's spatial gate ``sigmoid(conv([mean(x), max(x)]))``; mean and max over C, zero padding.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        wconv: ``[1, 2, k, k]`` with odd k; its first input is the mean.

    Returns:
        ``[N, 1, H, W]`` in x's dtype.

    Raises: as `se`.
    """
    check_feature_map(x)
    check_spatial_kernel(wconv, x)
    if not fused(x):
        return ops.mixed(reference.spatial_attention, x, wconv)
    return ops.run(ops.SpatialAttentionFunction, x, wconv)


def _gated(
    mathematics: Callable[..., Tensor],
    function: type,
    tensors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """A gate and its epilogue: in one op where the backend has one and the residual has x's dtype, else in steps."""
    x, *weights = tensors
    assert x is not None
    code = activation_code(activation)
    check_residual(residual, x)
    if not fused(x):
        return reference.epilogue(ops.mixed(mathematics, x, *weights), residual, activation)
    if residual is not None and residual.dtype != x.dtype:  # the sum has a wider dtype than the op's result
        return reference.epilogue(ops.run(function, x, *weights, None, 0), residual, activation)
    return ops.run(function, x, *weights, residual, code)
