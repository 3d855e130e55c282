"""Squeeze-and-excitation: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.activations import GATE_ACTIVATIONS
from ..core.launch import device_guard
from ..core.layout import accumulation_dtype, canonical
from ..passes.gate import apply_gates, gate_grads
from ..passes.input_grad import Terms, input_grad
from ..passes.mlp import pooled_gate, pooled_gate_bwd
from ..passes.pool import pool_hw


def se_fwd(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    hidden_activation: int,
    gate_activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = act(x * gate + residual), gate = sigmoid(w2 relu(w1 mean + b1) + b2), mean over H and W.

    relu may be SiLU, and the sigmoid a hard one. x, residual [N, C, H, W]; w1 [R, C], w2 [C, R] (or 1x1 filters), any
    dtype. Returns y, mean [N, C], hidden [N, R], gate [N, C]. Moves 3 times the bytes of x: read to pool, read to
    scale, write y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        gate = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
        partials, gate_code = pool_hw(x, layout, with_max=False), GATE_ACTIVATIONS[gate_activation]
        mean, _, hidden = pooled_gate(partials, w1, b1, w2, b2, gate, hidden_activation, gate_code)
        return apply_gates(x, layout, gate, None, residual, activation), mean, hidden, gate


def se_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    hidden: torch.Tensor,
    gate: torch.Tensor,
    activation: int,
    hidden_activation: int,
    gate_activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes dx = g' * gate + dmean / HW, g' = grad * act'(x * gate + residual), and the weights' gradients.

    Returns dx, dresidual, dw1, db1, dw2, db2. Moves 4 times the bytes of x: read grad and x, read grad, write dx. With
    an activation, g' is also written and returned as dresidual (else empty: it is grad), and a residual is read.
    """
    with device_guard(x):
        x, layout = canonical(x)
        g, dresidual, dgate, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        gate_code = GATE_ACTIVATIONS[gate_activation]
        dmean, mlp = pooled_gate_bwd(dgate, gate, w1, w2, mean, hidden, hidden_activation, gate_code)
        dx = input_grad(x, layout, Terms(grad=g, channel_gate=gate, dpooled=dmean), mlp=mlp)
        return dx, dresidual, *mlp.results
