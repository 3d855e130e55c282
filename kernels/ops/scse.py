"""scSE: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.gate import ADDED, apply_gates
from ..passes.input_grad import Terms, input_grad
from ..passes.mlp import pooled_gate, pooled_gate_bwd
from ..passes.pixel_gate import linear_gate, pixel_grads
from ..passes.weight_grads import empty_row_sum


def scse_fwd(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    ws: torch.Tensor,
    bs: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes y = act(x * (channel_gate + spatial_gate) + residual).

    The gates are sigmoid(w2 relu(w1 mean + b1) + b2), mean over H and W, and sigmoid(ws x + bs). x, residual
    [N, C, H, W]; w1 [R, C], w2 [C, R], ws [1, C] (or 1x1 filters), any dtype. Returns y, mean [N, C], hidden [N, R],
    channel_gate [N, C], spatial_gate [N, H, W]. Moves 3 times the bytes of x: read for the means and the spatial gate,
    read to scale, write y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        partials, spatial_gate = linear_gate(x, layout, ws, bs)
        channel_gate = spatial_gate.new_empty((layout.N, layout.C))
        mean, _, hidden = pooled_gate(partials, w1, b1, w2, b2, channel_gate)
        y = apply_gates(x, layout, channel_gate, spatial_gate, residual, activation, ADDED)
        return y, mean, hidden, channel_gate, spatial_gate


def scse_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    ws: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    hidden: torch.Tensor,
    channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes dx = g' * (channel_gate + spatial_gate) + ws dlogits + dmean / HW, and the weights' gradients.

    g' = grad * act'(x * (channel_gate + spatial_gate) + residual). Returns dx, dresidual, dw1, db1, dw2, db2, dws, dbs.
    Moves 4 times the bytes of x: read grad and x, read grad, write dx; if the channels do not fit a tile, x comes from
    the L2 cache a second time. With an activation, g' is also written and returned as dresidual (else empty: it is
    grad), and a residual is read.
    """
    with device_guard(x):
        x, layout = canonical(x)
        d = pixel_grads(grad, x, layout, channel_gate, spatial_gate, residual, activation, ADDED)
        assert d.dweight is not None
        assert d.dbias is not None
        dmean, mlp = pooled_gate_bwd(d.dchannel, channel_gate, w1, w2, mean, hidden)
        dws = empty_row_sum(d.dweight.view(-1, layout.C), ws)
        dbs = empty_row_sum(d.dbias.view(-1, 1), ws.new_empty(1))
        terms = Terms(
            grad=d.g,
            channel_gate=channel_gate,
            spatial_gate=spatial_gate,
            dpooled=dmean,
            ws=ws.reshape(-1).contiguous(),
            dlogits=d.dlogits,
        )
        dx = input_grad(x, layout, terms, mlp=mlp, sums=(dws, dbs))
        return dx, d.dresidual, *mlp.results, dws.out, dbs.out
