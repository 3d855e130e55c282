"""Normalization-based attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import fused
from ..reference.batch_norm import update_running_statistics
from ..reference.checks import ACTIVATIONS, check_choice, check_residual
from ..reference.nam import check_nam
from ._gated import gated_outputs


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
    check_nam(x, weight, bias, running_mean, running_var, training, eps)
    code = check_choice("activation", activation, ACTIVATIONS)
    check_residual(residual, x)
    if not fused(x):
        if x.dtype in (torch.float32, torch.float64):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        y = reference.nam(x, weight, bias, running_mean, running_var, training, momentum, eps)
        return reference.epilogue(y.to(x.dtype), residual, activation)
    statistics = (None, None) if training else (running_mean, running_var)
    y, mean, var = gated_outputs(ops.NAMFunction, (x, weight, bias, *statistics), residual, code, (float(eps),))
    if training and x.shape[0]:
        count = x.numel() // x.shape[1]
        update_running_statistics(running_mean, running_var, mean.detach(), var.detach(), count, momentum)
    return y
