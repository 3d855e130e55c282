"""Concurrent spatial and channel squeeze-and-excitation (scSE), fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.scse import SCSE
from ..reference.as_built import as_built
from ..reference.scse import check_scse
from .calls import call_layers
from .serve import serve

__all__ = ["FastscSE", "scse"]


def scse(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ws: Tensor,
    bs: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """scSE: ``act(x * (channel + spatial) + residual)``.

    ``channel = sigmoid(w2 relu(w1 mean(x) + b1) + b2)``, the mean over H and W; ``spatial = sigmoid(ws x + bs)`` per
    pixel.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: weight ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and bias ``[R]`` or None.
        w2, b2: weight ``[C, R]`` (or ``[C, R, 1, 1]``) and bias ``[C]`` or None.
        ws, bs: weight ``[1, C]`` (or ``[1, C, 1, 1]``) and bias ``[1]`` or None.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Roy et al., "Concurrent Spatial and Channel 'Squeeze & Excitation' in Fully Convolutional Networks",
    MICCAI 2018.
    """
    return serve(SCSE, (x, w1, b1, w2, b2, ws, bs), check=check_scse, residual=residual, activation=activation)


class FastscSE(reference.scSE):
    """Fused `reference.scSE`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameters of the inner layers. Layers that are not as
    built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(scse(x) + residual)``; see `scse`."""
        if as_built(self, x, self.LAYERS):
            return scse(x, *self.weights(), residual=residual, activation=activation)
        return call_layers(super().forward, x, residual, activation)
