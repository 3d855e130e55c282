"""A map scaled by the sigmoid of another one's batch norm: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import Layout, canonical
from ..passes.batch_norm_gate import batch_gate_bwd, batch_gate_fwd


def _maps(x: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    """x and m, dense in x's layout, and that of both."""
    x, layout = canonical(x)
    x = layout.dense(x)
    return x, layout.dense(m), canonical(x)[1]


def norm_gate_fwd(
    x: torch.Tensor, m: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor | None,
    var: torch.Tensor | None, residual: torch.Tensor | None, activation: int, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y = act(x * sigmoid(bn(m)) + residual); y, mean [C], var [C].

    Moves 4 times the bytes of x, 3 times where mean and var are given; one more for a residual.
    """
    with device_guard(x):
        x, m, layout = _maps(x, m)
        return batch_gate_fwd(m, layout, weight, bias, mean, var, residual, activation, eps, z=x)


def norm_gate_bwd(
    grad: torch.Tensor, x: torch.Tensor, m: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    residual: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, activation: int, eps: float, fixed: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """(dx, dm, dresidual, dweight, dbias). Moves 8 times the bytes of x, 5 times where the statistics are `fixed`."""
    with device_guard(x):
        x, m, layout = _maps(x, m)
        dm, dx, dresidual, dweight, dbias = batch_gate_bwd(
            grad, m, layout, weight, bias, residual, mean, var, activation, eps, fixed, z=x
        )
        return dx, dm, dresidual, dweight, dbias
