"""Triplet attention: launchers of the passes over x that pool it along each axis, and that apply the gates.

Faces [N, F] hold a value for each pair of indices; see `visattn_fast.ops.triplet_attention`.
"""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..passes.faces.gates import apply_faces, face_sums
from ..passes.faces.pool import pool_faces
from ..passes.lines.axis_tiles import canonical_with_lines


def triplet_pool(x: torch.Tensor, spatial: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes maximum and mean along each axis. x [N, C, H, W]. Reads x once.

    Returns pooled [N, 2, F], and argmax [N, F] (int32), the index of each maximum along its axis.
    """
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        return pool_faces(x, layout, spatial)


def triplet_scale(x: torch.Tensor, gates: torch.Tensor, residual: torch.Tensor | None, activation: int) -> torch.Tensor:
    """Computes y = act(x * mean gate + residual) from gates [N, F]. Reads x (and the residual), writes y."""
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        return apply_faces(x, layout, (layout.stride_n, layout.stride_o), gates, residual, activation=activation)


def triplet_scale_bwd(
    grad: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes dgates [N, F]: sums of g' x along each axis, g' = grad * act'(x * mean gate + residual).

    Returns dgates, dresidual. Reads x and grad once. With an activation g' is written as dresidual (else empty), and a
    residual is read.
    """
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        return face_sums(grad, x, layout, gates, residual, activation)


def triplet_input_grad(
    grad: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, dpooled: torch.Tensor, argmax: torch.Tensor
) -> torch.Tensor:
    """Computes dx = grad * mean gate + the gradients of maxima and means, dpooled [N, 2, F]. Reads grad, writes dx."""
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        strides = (layout.C * layout.HW, layout.C if layout.channels_last else layout.HW)
        grad, dpooled, argmax = layout.dense(grad), dpooled.contiguous(), argmax.contiguous()
        return apply_faces(grad, layout, strides, gates, dpooled=dpooled, argmax=argmax)
