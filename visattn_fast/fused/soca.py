"""Second-order channel attention (SOCA), fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.soca import SOCA
from ..reference.as_built import as_built
from ..reference.checks import check_bottleneck
from .calls import call_layers
from .serve import serve

__all__ = ["FastSOCA", "soca"]


def soca(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Second-order channel attention: ``act(x * sigmoid(w2 relu(w1 s + b1) + b2) + residual)``.

    s is the mean over rows of the square root of the channels' covariance; see `reference.SOCA`. The covariance takes
    ``[N, C, C]``; x is never copied.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: weight ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and bias ``[R]`` or None.
        w2, b2: weight ``[C, R]`` (or ``[C, R, 1, 1]``) and bias ``[C]`` or None.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Dai et al., "Second-order attention network for single image super-resolution", CVPR 2019.
    """
    check_bottleneck(x, w1, b1, w2, b2)
    return serve(SOCA, (x, w1, b1, w2, b2), residual=residual, activation=activation)


class FastSOCA(reference.SOCA):
    """Fused `reference.SOCA`: same constructor, same ``state_dict``, same result.

    Fused passes pool and scale x; covariance and gate are ops made of PyTorch's matrix products. They read the
    parameters of the inner layers. Layers that are not as built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(soca(x) + residual)``; see `soca`."""
        if as_built(self, x, self.LAYERS):
            return soca(x, *self.weights(), residual=residual, activation=activation)
        return call_layers(super().forward, x, residual, activation)
