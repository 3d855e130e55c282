"""scSE: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ._gate import SUM, input_grad, scale
from ._launch import device_guard
from ._layout import canonical
from ._mlp import mlp_gate, mlp_gate_bwd
from ._pixel import linear_gate, pixel_grads, sum_images


def scse_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None,
    ws: torch.Tensor, bs: torch.Tensor | None, residual: torch.Tensor | None, activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """y = act(x * (channel_gate + spatial_gate) + residual), the gates sigmoid(w2 relu(w1 mean + b1) + b2), mean over

    H and W, and sigmoid(ws x + bs). x, residual [N, C, H, W]; w1 [R, C], w2 [C, R], ws [1, C] (or 1x1 filters), any
    dtype. Returns y, mean [N, C], hidden [N, R], channel_gate [N, C], spatial_gate [N, H, W]. Moves 3 times the bytes
    of x: read for the means and the spatial gate, read to scale, write y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        mean, spatial_gate = linear_gate(x, layout, ws, bs)
        channel_gate = torch.empty_like(mean)
        hidden = mlp_gate(mean, w1, b1, w2, b2, channel_gate)
        y = scale(x, layout, channel_gate, spatial_gate, residual, activation, SUM)
        return y, mean, hidden, channel_gate, spatial_gate


def scse_bwd(
    grad: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, ws: torch.Tensor,
    residual: torch.Tensor | None, mean: torch.Tensor, hidden: torch.Tensor, channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor, activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dx, dresidual, dw1, db1, dw2, db2, dws, dbs), g' = grad * act'(x * (channel_gate + spatial_gate) + residual),

    dx = g' * (channel_gate + spatial_gate) + ws dz + dmean / HW. Moves 4 times the bytes of x: read grad and x, read
    grad, write dx; where the channels do not fit a tile, x comes from the L2 cache a second time. With an activation,
    g' is written once more and returned as dresidual (else empty: it is grad), and a residual is read once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        g, dresidual, dz_c, dz_s, dws = pixel_grads(
            grad, x, layout, channel_gate, spatial_gate, residual, activation, SUM
        )
        assert dws is not None
        dmean, *dweights = mlp_gate_bwd(dz_c, w1, w2, mean, hidden)
        dx = input_grad(
            x, layout, grad=g, channel_gate=channel_gate, spatial_gate=spatial_gate, dpooled=dmean,
            ws=ws.reshape(-1).contiguous(), dz=dz_s,
        )  # fmt: skip
        return dx, dresidual, *dweights, dws.view(ws.shape), sum_images(dz_s.view(layout.N, layout.HW, 1))
