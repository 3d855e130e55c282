"""A map scaled by the sigmoid of another map's batch norm: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical_dense
from ..passes.batch_norm_gate import batch_gate, batch_gate_bwd


def norm_gate_fwd(
    x: torch.Tensor,
    m: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = act(x * sigmoid(bn(m)) + residual).

    Returns y, mean [C], var [C]. Moves 4 times the bytes of x, 3 times if mean and var are given; one more for a
    residual.
    """
    with device_guard(x):
        layout, (x, m) = canonical_dense(x, m)
        return batch_gate(m, layout, weight, bias, mean, var, residual, activation, eps, z=x)


def norm_gate_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    m: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    activation: int,
    eps: float,
    fixed: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Computes dx, dm, dresidual, dweight, dbias.

    Moves 8 times the bytes of x, 5 times if the statistics are `fixed`.
    """
    with device_guard(x):
        layout, (x, m) = canonical_dense(x, m)
        dm, dx, dresidual, dweight, dbias = batch_gate_bwd(
            grad, m, layout, weight, bias, residual, mean, var, activation, eps, fixed, z=x
        )
        return dx, dm, dresidual, dweight, dbias
