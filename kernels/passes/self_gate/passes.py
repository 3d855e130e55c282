"""Forward and backward of a self-gate with statistics of each image: by whole planes if they fit in a tile."""

from __future__ import annotations

import torch

from ...core.layout import Layout
from ..partials import combine
from .gate import Gate, gate_plane_tile
from .moments import mean_and_scale
from .planes import plane_gate, plane_gate_bwd
from .streams import apply_self_gate, logit_sums, self_gate_dx


def self_gate(
    x: torch.Tensor, layout: Layout, gate: Gate, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, and mean and scale [N, C] of each channel. Reads x once if planes fit in a tile, else twice."""
    if t := gate_plane_tile(layout, gate):
        return plane_gate(x, layout, gate, t, residual, activation)
    mean, scale = mean_and_scale(x, layout, gate)
    return apply_self_gate(x, layout, gate, mean, scale, residual, activation), mean, scale


def self_gate_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    gate: Gate,
    mean: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dresidual, sums): sums [N, 2, C] of r and r d in the order of y; SimAM, without weights, needs none.

    Reads x and grad once if planes fit in a tile, else twice. With an activation, g' is also written and returned as
    dresidual (else empty: it is grad), and a residual is read once.
    """
    if t := gate_plane_tile(layout, gate, backward=True):
        return plane_gate_bwd(grad, x, layout, gate, t, mean, scale, residual, activation)
    g, dresidual, partials = logit_sums(grad, x, layout, gate, mean, scale, residual, activation)
    dx, sums = layout.empty(x), mean.new_empty((layout.N, 2, layout.C))
    combine(partials.flatten(2), None, sums)
    self_gate_dx(g, x, layout, gate, mean, scale, sums, dx)
    return dx, dresidual, sums
