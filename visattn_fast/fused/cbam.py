"""CBAM and its two gates, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.cbam import CBAM
from ..ops.channel_attention import CHANNEL_ATTENTION
from ..ops.spatial_attention import SPATIAL_ATTENTION
from ..reference.as_built import as_built
from ..reference.checks import check_bottleneck, check_spatial_kernel
from .calls import call_layers
from .gates import gate_twice
from .serve import serve

__all__ = ["FastCBAM", "FastChannelAttention", "FastSpatialAttention", "cbam", "channel_attention", "spatial_attention"]


def _check(x: Tensor, w1: Tensor, w2: Tensor, wconv: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Raises unless the layers of the channel gate, and the convolution of the spatial gate if given, fit x."""
    check_bottleneck(x, w1, None, w2, None)
    if wconv is not None:
        check_spatial_kernel(x, wconv, bias)


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
        w1, w2: layers of the channel gate, ``[R, C]`` and ``[C, R]`` (or, as 1x1 convolutions, ``[R, C, 1, 1]`` and
            ``[C, R, 1, 1]``).
        wconv: convolution of the spatial gate, ``[1, 2, k, k]`` with odd k, the mean's input first.
        bias: ``[1]``, added to the convolution, or None.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an even k, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    return serve(CBAM, (x, w1, w2, wconv, bias), check=_check, residual=residual, activation=activation)


def channel_attention(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """CBAM's channel gate: ``sigmoid(f(mean(x)) + f(max(x)))`` with ``f(v) = w2 relu(w1 v)``.

    Mean and maximum are over H and W.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, w2: ``[R, C]`` and ``[C, R]`` (or, as 1x1 convolutions, ``[R, C, 1, 1]`` and ``[C, R, 1, 1]``).

    Returns:
        The gate, ``[N, C, 1, 1]`` in x's dtype.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit.
        RuntimeError: the backend asked for cannot serve this call.
    """
    return serve(CHANNEL_ATTENTION, (x, w1, w2), check=_check)


def spatial_attention(x: Tensor, wconv: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """CBAM's spatial gate: ``sigmoid(conv([mean(x), max(x)]) + bias)``.

    Mean and maximum are over C; the convolution pads with zeros.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        wconv: ``[1, 2, k, k]`` with odd k, the mean's input first.
        bias: ``[1]``, added to the convolution, or None.

    Returns:
        The gate, ``[N, 1, H, W]`` in x's dtype.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an even k.
        RuntimeError: the backend asked for cannot serve this call.
    """
    return serve(SPATIAL_ATTENTION, (x, wconv, bias), check=check_spatial_kernel)


class FastChannelAttention(reference.ChannelAttention):
    """Fused `reference.ChannelAttention`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameters of the inner layers. Layers that are not as
    built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gate ``[N, C, 1, 1]``; see `channel_attention`."""
        if as_built(self, x, self.LAYERS):
            return channel_attention(x, *self.weights())
        return super().forward(x)


class FastSpatialAttention(reference.SpatialAttention):
    """Fused `reference.SpatialAttention`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameters of the inner layer. If the layer is not as
    built, it is called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gate ``[N, 1, H, W]``; see `spatial_attention`."""
        if as_built(self, x, self.LAYERS):
            wconv, bias = self.weights()
            return spatial_attention(x, wconv, bias=bias)
        return super().forward(x)


class FastCBAM(reference.CBAM):
    """Fused `reference.CBAM`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameters of the inner layers. Layers that are not as
    built are called, between fused passes over x (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(cbam(x) + residual)``; see `cbam`."""
        if as_built(self, x, self.LAYERS):
            w1, w2, wconv, bias = self.weights()
            return cbam(x, w1, w2, wconv, bias=bias, residual=residual, activation=activation)
        if as_built(self, x, self.PARTS):
            gates = self.channelattention.gate, self.spatialattention.gate
            return gate_twice(x, *gates, residual=residual, activation=activation)
        return call_layers(super().forward, x, residual, activation)
