"""Criss-cross attention in blocks of rows and columns."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.criss_cross import CRISS_CROSS
from ..reference.as_built import as_built
from ..reference.criss_cross import check_criss_cross
from .serve import serve

__all__ = ["FastCrissCross", "criss_cross"]


def criss_cross(
    x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor, wv: Tensor, bv: Tensor, gamma: Tensor
) -> Tensor:
    """Criss-cross attention: ``gamma * out + x``; for out every position attends to its row and its column.

    Forward and backward work through an image in blocks of rows and columns and never store the weights
    ``[N, H, W, H + W]``.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        wq, bq, wk, bk: layers that make queries and keys: weight ``[R, C]`` (or, as a 1x1 convolution,
            ``[R, C, 1, 1]``) and bias ``[R]``.
        wv, bv: the layer that makes values: weight ``[C, C]`` (or ``[C, C, 1, 1]``) and bias ``[C]``.
        gamma: ``[1]``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format. Sums are kept in float32 (float64 for float64); weights may
        have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Huang et al., "CCNet: Criss-cross attention for semantic segmentation", ICCV 2019.
    """
    check_criss_cross(x, wq, bq, wk, bk, wv, bv, gamma)
    return serve(CRISS_CROSS, (x, wq, bq, wk, bk, wv, bv, gamma))


class FastCrissCross(reference.CrissCross):
    """`reference.CrissCross` without its map of weights: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, made of PyTorch's matrix products over blocks of rows and columns. It
    reads the parameters of the inner layers. Layers that are not as built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``gamma * out + x``, ``[N, C, H, W]``; see `criss_cross`."""
        if as_built(self, x, self.LAYERS):
            return criss_cross(x, *self.weights())
        return super().forward(x)
