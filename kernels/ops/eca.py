"""Efficient channel attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.channel_conv import eca_gate, eca_gate_bwd
from ..passes.gate import apply_gates, gate_grads
from ..passes.input_grad import Terms, input_grad
from ..passes.pool import pool_hw


def eca_fwd(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = act(x * gate + residual), gate = sigmoid(conv1d(mean)) along C, mean over H and W.

    x, residual [N, C, H, W]; weight k elements, k odd, zero padding k // 2. Returns y, mean [N, C], gate [N, C].
    Moves 3 times the bytes of x: read to pool, read to scale, write y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        mean, gate = eca_gate(pool_hw(x, layout, with_max=False), weight)
        return apply_gates(x, layout, gate, None, residual, activation), mean, gate


def eca_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    gate: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes dx = g' * gate + dmean / HW, g' = grad * act'(x * gate + residual), and dweight.

    Returns dx, dresidual, dweight. Moves 4 times the bytes of x: read grad and x, read grad, write dx. With an
    activation, g' is also written and returned as dresidual (else empty: it is grad), and a residual is read.
    """
    with device_guard(x):
        x, layout = canonical(x)
        g, dresidual, dgate, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        dmean, dweight = eca_gate_bwd(dgate, gate, weight, mean)
        dx = input_grad(x, layout, Terms(grad=g, channel_gate=gate, dpooled=dmean), sums=(dweight,))
        return dx, dresidual, dweight.out
