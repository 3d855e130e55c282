"""Squeeze-and-excitation: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ._gate import gate_grads, input_grad, scale
from ._launch import device_guard
from ._layout import canonical
from ._mlp import mlp_gate, mlp_gate_bwd
from ._pool import combine, mean_hw
from ._tiles import HARD_SIGMOID, SIGMOID

GATES = (SIGMOID.value, HARD_SIGMOID.value)


def se_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None,
    residual: torch.Tensor | None, activation: int, hidden_activation: int, gate_activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y = act(x * gate + residual), gate = sigmoid(w2 relu(w1 mean + b1) + b2), mean over H and W.

    relu may be SiLU, and the sigmoid a hard one. x, residual [N, C, H, W]; w1 [R, C], w2 [C, R] (or 1x1 filters), any
    dtype. Returns y, mean [N, C], hidden [N, R], gate [N, C]. Moves 3 times the bytes of x: read to pool, read to
    scale, write y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        mean = mean_hw(x, layout)
        gate = torch.empty_like(mean)
        hidden = mlp_gate(mean, w1, b1, w2, b2, gate, hidden_activation, GATES[gate_activation])
        return scale(x, layout, gate, None, residual, activation), mean, hidden, gate


def se_bwd(
    grad: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, residual: torch.Tensor | None,
    mean: torch.Tensor, hidden: torch.Tensor, gate: torch.Tensor, activation: int,
    hidden_activation: int, gate_activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dx, dresidual, dw1, db1, dw2, db2); dx = g' * gate + dmean / HW, g' = grad * act'(x * gate + residual).

    Moves 4 times the bytes of x: read grad and x, read grad, write dx. With an activation, g' is written once more
    and returned as dresidual (else empty: it is grad), and a residual is read once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        g, dresidual, parts, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        dz = combine(parts, gate, torch.empty_like(gate), GATES[gate_activation])
        dmean, dw1, db1, dw2, db2 = mlp_gate_bwd(dz, w1, w2, mean, hidden, hidden_activation)
        dx = input_grad(x, layout, grad=g, channel_gate=gate, dpooled=dmean)
        return dx, dresidual, dw1, db1, dw2, db2
