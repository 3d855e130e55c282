"""Squeeze-and-excitation: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.heuristics import Team
from ..core.launch import device_guard, launch
from ..core.layout import Layout, accumulation_dtype, canonical
from ..core.tiles import HARD_SIGMOID, NONE, RELU, SIGMOID
from ..experimental.resident import _se_resident_bwd_kernel, _se_resident_fwd_kernel, blocks, exchange, team_of
from ..passes.gate import gate_grads, scale
from ..passes.input_grad import input_grad
from ..passes.mlp import gate_mlp_bwd, pooled_gate
from ..passes.pool import pool_hw
from ..passes.weight_grads import mlp_grads

GATES = (SIGMOID.value, HARD_SIGMOID.value)


def se_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None,
    residual: torch.Tensor | None, activation: int, hidden_activation: int, gate_activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y = act(x * gate + residual), gate = sigmoid(w2 relu(w1 mean + b1) + b2), mean over H and W.

    relu may be SiLU, and the sigmoid a hard one. x, residual [N, C, H, W]; w1 [R, C], w2 [C, R] (or 1x1 filters), any
    dtype. Returns y, mean [N, C], hidden [N, R], gate [N, C]. Moves 3 times the bytes of x: read to pool, read to
    scale, write y; one more for a residual. With `heuristics.RESIDENT` twice, where the image stays on the chip.
    """
    with device_guard(x):
        x, layout = canonical(x)
        if team := team_of(x, layout):
            codes = (activation, hidden_activation, GATES[gate_activation])
            return _resident_fwd(x, layout, team, w1, b1, w2, b2, residual, *codes)
        gate = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
        parts, gate_code = pool_hw(x, layout, with_max=False), GATES[gate_activation]
        mean, _, hidden = pooled_gate(parts, w1, b1, w2, b2, gate, hidden_activation, gate_code)
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
        if team := team_of(x, layout):
            codes = (activation, hidden_activation, GATES[gate_activation])
            return _resident_bwd(grad, x, layout, team, w1, w2, residual, mean, hidden, gate, *codes)
        g, dresidual, parts, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        dmean, mlp = gate_mlp_bwd(parts, gate, w1, w2, mean, hidden, hidden_activation, GATES[gate_activation])
        return input_grad(x, layout, grad=g, channel_gate=gate, dpooled=dmean, mlp=mlp), dresidual, *mlp.results


def _resident_fwd(
    x: torch.Tensor, layout: Layout, team: Team, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor,
    b2: torch.Tensor | None, residual: torch.Tensor | None, activation: int, hidden_activation: int,
    gate_activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`se_fwd` in one launch, which reads x once."""
    (N, C, HW), R = (layout.N, layout.C, layout.HW), w1.shape[0]
    y = layout.empty(x)
    mean = x.new_empty((N, C), dtype=accumulation_dtype(x))
    gate, hidden = torch.empty_like(mean), mean.new_empty((N, R))
    sums, meet = exchange(layout, team, mean)
    kept, taken = (RELU.value, NONE.value) if hidden_activation == RELU.value else (NONE.value, hidden_activation)
    launch(
        _se_resident_fwd_kernel, N * team.size,
        x, w1, b1, w2, b2, None if residual is None else layout.dense(residual), y, mean, hidden, gate,
        sums, mean.new_empty((N, team.size, R)), meet, C, HW, R, layout.stride_n, layout.stride_o,
        *w1.stride()[:2], *w2.stride()[:2],
        KEPT=kept, TAKEN=taken, GATE=gate_activation, ACTIVATION=activation, **blocks(team, R),
    )  # fmt: skip
    return y, mean, hidden, gate


def _resident_bwd(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, team: Team, w1: torch.Tensor, w2: torch.Tensor,
    residual: torch.Tensor | None, mean: torch.Tensor, hidden: torch.Tensor, gate: torch.Tensor,
    activation: int, hidden_activation: int, gate_activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """`se_bwd` in two launches, of which the first reads grad and x once; the weights' gradients are the second."""
    R = w1.shape[0]
    dx, dresidual = layout.empty(x), layout.empty(x) if activation else x.new_empty(0)
    dz, dhidden = torch.empty_like(gate), torch.empty_like(hidden)
    sums, meet = exchange(layout, team, gate)
    launch(
        _se_resident_bwd_kernel, layout.N * team.size,
        layout.dense(grad), x, w1, w2, layout.dense(residual) if activation and residual is not None else None,
        hidden, gate, dx, dresidual, dz, dhidden, sums, gate.new_empty((layout.N, team.size, R)), meet,
        layout.C, layout.HW, R, layout.stride_n, layout.stride_o, *w1.stride()[:2], *w2.stride()[:2],
        HIDDEN=hidden_activation, GATE=gate_activation, ACTIVATION=activation, **blocks(team, R),
    )  # fmt: skip
    mlp = mlp_grads(dz, dhidden, w1, w2, mean, hidden, hidden_activation)
    mlp.run()
    return dx, dresidual, *mlp.results
