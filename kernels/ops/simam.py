"""SimAM: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.self_gate.gate import Gate
from ..passes.self_gate.passes import self_gate, self_gate_bwd
from ..passes.self_gate.tiles import SIMAM


def simam_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, activation: int, e_lambda: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = act(x * sigmoid(scale d^2 + 0.5) + residual).

    d = x - mean, scale = 1 / (4 (sum d^2 / (HW - 1) + e_lambda)). Returns y, mean [N, C], scale [N, C]. Moves twice the
    bytes of x if planes fit in a tile, else 3 times; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        return self_gate(x, layout, Gate(SIMAM, eps=e_lambda), residual, activation)


def simam_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    scale: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes dx and dresidual; see `self_gate_bwd`.

    Moves 3 times the bytes of x if planes fit in a tile, else 5 times.
    """
    with device_guard(x):
        x, layout = canonical(x)
        dx, dresidual, _ = self_gate_bwd(grad, x, layout, Gate(SIMAM), mean, scale, residual, activation)
        return dx, dresidual
