"""Concurrent spatial and channel squeeze-and-excitation."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.scse import SCSE
from ..reference.scse import check_scse
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
        w1, b1, w2, b2: as in `se`.
        ws, bs: ``[1, C]`` (or a 1x1 convolution's ``[1, C, 1, 1]``) and ``[1]`` or None.
        residual, activation: as in `se`.

    Returns, raises: as `se`.

    Source: Roy et al., "Concurrent Spatial and Channel 'Squeeze & Excitation' in Fully Convolutional Networks",
    MICCAI 2018.
    """
    check_scse(x, w1, b1, w2, b2, ws, bs)
    return serve(SCSE, (x, w1, b1, w2, b2, ws, bs), residual=residual, activation=activation)


class FastscSE(reference.scSE):
    """`reference.scSE`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(scse(x) + residual)``; see `scse`."""
        return scse(x, *self.weights(), residual=residual, activation=activation)
