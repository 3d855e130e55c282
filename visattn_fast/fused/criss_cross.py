"""Criss-cross attention."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.criss_cross import CRISS_CROSS
from ..reference.criss_cross import check_criss_cross
from .serve import serve

__all__ = ["FastCrissCross", "criss_cross"]


def criss_cross(
    x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor, wv: Tensor, bv: Tensor, gamma: Tensor
) -> Tensor:
    """Criss-cross attention: ``gamma * out + x``, out over the row and the column of every position.

    Works through an image in blocks of rows, forward and backward: no ``[N, H, W, H + W]`` map of weights is made.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        wq, bq, wk, bk: of the queries and keys, ``[R, C]`` or ``[R, C, 1, 1]``, and ``[R]``.
        wv, bv: of the values, ``[C, C]`` or ``[C, C, 1, 1]``, and ``[C]``.
        gamma: ``[1]``.

    Returns, raises: as `se`.

    Source: Huang et al., "CCNet: Criss-cross attention for semantic segmentation", ICCV 2019.
    """
    check_criss_cross(x, wq, bq, wk, bk, wv, bv, gamma)
    return serve(CRISS_CROSS, (x, wq, bq, wk, bk, wv, bv, gamma))


class FastCrissCross(reference.CrissCross):
    """`reference.CrissCross` in blocks of rows: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C, H, W]``; see `criss_cross`."""
        return criss_cross(x, *self.weights())
