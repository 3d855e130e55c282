"""LocalAttention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import accumulation_dtype, canonical
from ..passes.gate import apply_gates
from ..passes.mlp import pooled_gate, pooled_gate_bwd
from ..passes.pixel_mlp import pixel_mlp_gate
from ..passes.pixel_mlp_dx import pixel_mlp_dx
from ..passes.pixel_mlp_grads import pixel_mlp_grads, pixel_mlp_weight_grads


def local_attention_fwd(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    p1: torch.Tensor,
    q1: torch.Tensor | None,
    p2: torch.Tensor,
    q2: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes y = act(x * channel_gate * spatial_gate + residual).

    The gates are sigmoid(w2 relu(w1 mean + b1) + b2), mean over H and W, and sigmoid(p2 relu(p1 x + q1) + q2). x,
    residual [N, C, H, W]; w1 [R, C], w2 [C, R], p1 [S, C], p2 [1, S] (or 1x1 filters), any dtype. Returns y, mean
    [N, C], hidden [N, R], channel_gate [N, C], spatial_gate [N, H, W], signs [N, words, H, W]. Moves 3 times the bytes
    of x: read for the means and the spatial gate, read to scale, write y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        partials, spatial_gate, signs = pixel_mlp_gate(x, layout, p1, q1, p2, q2, accumulation_dtype(x))
        channel_gate = spatial_gate.new_empty((layout.N, layout.C))
        mean, _, hidden = pooled_gate(partials, w1, b1, w2, b2, channel_gate)
        y = apply_gates(x, layout, channel_gate, spatial_gate, residual, activation)
        return y, mean, hidden, channel_gate, spatial_gate, signs


def local_attention_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    p1: torch.Tensor,
    q1: torch.Tensor | None,
    p2: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    hidden: torch.Tensor,
    channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor,
    signs: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes dx = g' * channel_gate * spatial_gate + (p2 p1)^T (mask dlogits) + dmean / HW, and weights' gradients.

    g' = grad * act'(x * gates + residual). Returns dx, dresidual, dw1, db1, dw2, db2, dp1, dq1, dp2, dq2. Moves 4 times
    the bytes of x: read grad and x, read grad, write dx. If a program cannot hold all channels, 5: p1's gradient needs
    dlogits, a sum over them, before it reads x. With an activation, g' is also written and returned as dresidual (else
    empty: it is grad), and a residual is read.
    """
    with device_guard(x):
        x, layout = canonical(x)
        if not layout.N:
            biased = (p for w in (w1, w2, p1, p2) for p in (w.new_zeros(w.shape), w.new_zeros(w.shape[0])))
            return layout.empty(x), layout.empty_dresidual(x, activation), *biased
        d, sums, counts = pixel_mlp_grads(grad, x, layout, p1, channel_gate, spatial_gate, signs, residual, activation)
        dmean, mlp = pooled_gate_bwd(d.dchannel, channel_gate, w1, w2, mean, hidden)
        weight, dperceptron = pixel_mlp_weight_grads(mlp, sums, counts, p1, q1, p2)
        dx = pixel_mlp_dx(d.g, x, layout, channel_gate, spatial_gate, dmean, p1, weight, d.dlogits, signs)
        return dx, d.dresidual, *mlp.results, *dperceptron
