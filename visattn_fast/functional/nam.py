"""Normalization-based attention."""

from __future__ import annotations

from torch import Tensor

from .. import ops, reference
from ..reference.checks import check_batch_norm
from ._gated import batch_norm_gated


def nam(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(x * sigmoid(bn(x) * abs(weight) / sum(abs(weight))) + residual)``; no gradient through the quotient.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        weight, bias, running_mean, running_var, training, momentum, eps: of the batch norm, as in `F.batch_norm`; in
            training the running statistics are updated in place.
        residual, activation: as in `se`.

    Returns, raises: as `se`; ValueError for a single value per channel in training.

    Source: Liu et al., "NAM: Normalization-based Attention Module", NeurIPS workshops 2021.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var, training, eps)
    return batch_norm_gated(
        reference.nam, ops.NAMFunction, (x,), weight, bias, (running_mean, running_var), training, momentum, eps,
        residual, activation,
    )  # fmt: skip
