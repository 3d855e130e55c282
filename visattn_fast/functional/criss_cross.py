"""Criss-cross attention."""

from __future__ import annotations

from torch import Tensor

from .. import ops, reference
from ..backends import fused
from ..reference.criss_cross import check_criss_cross


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
    weights = (wq, bq, wk, bk, wv, bv, gamma)
    if not fused(x):
        return ops.mixed(reference.criss_cross, x, *weights)
    return ops.run(ops.CrissCrossFunction, x, *weights)[0]
