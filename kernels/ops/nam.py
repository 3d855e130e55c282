"""Normalization-based attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.batch_norm_gate import batch_gate, batch_gate_bwd


def nam_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = act(x * sigmoid(bn(x) share) + residual), share = abs(weight) / sum(abs(weight)).

    Returns y, mean [C], var [C]. Moves 3 times the bytes of x, twice if mean and var are given; one more for a
    residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        return batch_gate(x, layout, weight, bias, mean, var, residual, activation, eps, shares=True)


def nam_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    activation: int,
    eps: float,
    fixed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes dx, dresidual, dweight, dbias.

    Moves 5 times the bytes of x, 3 times if the statistics are `fixed`.
    """
    with device_guard(x):
        x, layout = canonical(x)
        dx, _, dresidual, dweight, dbias = batch_gate_bwd(
            grad, x, layout, weight, bias, residual, mean, var, activation, eps, fixed, shares=True
        )
        return dx, dresidual, dweight, dbias
