"""Gates per pair of indices, as faces: the pass that applies their mean, and the sums that are their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.activations import NONE, activate, activation_grad
from ...core.heuristics import registers_for
from ...core.launch import launch
from ...core.layout import Layout
from .cube import (
    ONE,
    cube_grid,
    cube_mask,
    cube_offsets,
    cube_program,
    dense_cube_offsets,
    face_offsets,
    face_starts,
)
from .pool import combine_faces


@triton.jit
def _load_gate(gates_ptr, start, i, j, rows, columns):
    """Returns the gates [rows i, columns j] of a face that begins at ``start``."""
    at, there = face_offsets(i, j, rows, columns)
    return tl.load(gates_ptr + start + at, mask=there, other=0.0)


@triton.jit
def _face_sums_kernel(
    grad_ptr,
    x_ptr,
    residual_ptr,
    gates_ptr,
    dresidual_ptr,
    out_ptr,
    size,
    partials,
    steps,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """out [N, partials of F] = sums of g' x along each axis, g' = grad * act'(x * mean gate + residual), in one read.

    With an activation g' is stored in dresidual.
    """
    acc_ty = out_ptr.dtype.element_ty
    BLOCK_A: tl.constexpr = TILE.BLOCK_A
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    HAS_AB: tl.constexpr = TILE.SPATIAL or not TILE.CHANNELS_LAST
    HAS_BD: tl.constexpr = TILE.SPATIAL or TILE.CHANNELS_LAST
    GATES: tl.constexpr = 3 if TILE.SPATIAL else 2
    n, block_b, block_d, b, d = cube_program(tl.program_id(0), size, TILE)
    share = tl.program_id(1)
    ab, ad, bd, end = face_starts(size, partials.ab, partials.ad, partials.bd, TILE.CHANNELS_LAST, TILE.SPATIAL)
    out_ptr += n * end
    if ACTIVATION != NONE:
        gate_ab, gate_ad, gate_bd, gates = face_starts(size, 1, 1, 1, TILE.CHANNELS_LAST, TILE.SPATIAL)
        gates_ptr += n * gates
        plane = tl.zeros([BLOCK_B, BLOCK_D], acc_ty)
        if HAS_BD:
            plane = _load_gate(gates_ptr, gate_bd, b, d, size.B, size.D)
    acc = tl.zeros([BLOCK_A, BLOCK_B, BLOCK_D], acc_ty)
    for step in range(steps):
        a = (share * steps + step) * BLOCK_A + tl.arange(0, BLOCK_A)
        mask = cube_mask(a, b, d, size, TILE)
        x_offsets = cube_offsets(n, a, b, d, size, TILE)
        offsets = dense_cube_offsets(n, a, b, d, size, TILE)
        v = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_ty)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if ACTIVATION != NONE:
            gate = plane[None, :, :] + _load_gate(gates_ptr, gate_ad, a, d, size.A, size.D)[:, None, :]
            if HAS_AB:
                gate += _load_gate(gates_ptr, gate_ab, a, b, size.A, size.B)[:, :, None]
            z = v * (gate / GATES)
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = activation_grad(g, z, ACTIVATION)
            tl.store(dresidual_ptr + offsets, g, mask=mask)
        v *= g
        acc += v
        if HAS_AB:
            at, there = face_offsets(a, b, size.A, size.B)
            tl.store(out_ptr + ab + block_d * size.A * size.B + at, tl.sum(v, 2) / GATES, mask=there)
        at, there = face_offsets(a, d, size.A, size.D)
        tl.store(out_ptr + ad + block_b * size.A * size.D + at, tl.sum(v, 1) / GATES, mask=there)
    if HAS_BD:
        at, there = face_offsets(b, d, size.B, size.D)
        tl.store(out_ptr + bd + share * size.B * size.D + at, tl.sum(acc, 0) / GATES, mask=there)


@triton.jit
def _pooled_grad(dpooled_ptr, argmax_ptr, start, end, i, j, rows, columns, extent):
    """Returns one face's gradients for each element, of the means, of the maxima, and the maxima's indices."""
    at, there = face_offsets(i, j, rows, columns)
    dmax = tl.load(dpooled_ptr + start + at, mask=there, other=0.0)
    dmean = tl.load(dpooled_ptr + end + start + at, mask=there, other=0.0) / extent
    return dmean, dmax, tl.load(argmax_ptr + start + at, mask=there, other=-1)


@triton.jit
def _apply_faces_kernel(
    v_ptr,
    gates_ptr,
    residual_ptr,
    dpooled_ptr,
    argmax_ptr,
    out_ptr,
    size,
    steps,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = act(v * mean gate [+ residual] [+ the gradients of the pooled faces]).

    A program keeps a block of the face [B, D] and walks a share of A. What the sums read last comes first: it may still
    be in the L2 cache.
    """
    acc_ty = gates_ptr.dtype.element_ty
    BLOCK_A: tl.constexpr = TILE.BLOCK_A
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    HAS_AB: tl.constexpr = TILE.SPATIAL or not TILE.CHANNELS_LAST
    HAS_BD: tl.constexpr = TILE.SPATIAL or TILE.CHANNELS_LAST
    GATES: tl.constexpr = 3 if TILE.SPATIAL else 2
    n, _, _, b, d = cube_program(tl.num_programs(0) - 1 - tl.program_id(0), size, TILE)
    share = tl.num_programs(1) - 1 - tl.program_id(1)
    ab, ad, bd, end = face_starts(size, 1, 1, 1, TILE.CHANNELS_LAST, TILE.SPATIAL)
    gates_ptr += n * end
    plane = tl.zeros([BLOCK_B, BLOCK_D], acc_ty)
    if HAS_BD:
        plane = _load_gate(gates_ptr, bd, b, d, size.B, size.D) / GATES
    if dpooled_ptr is not None:
        dpooled_ptr += n * 2 * end
        argmax_ptr += n * end
        if HAS_BD:
            dmean, dmax, argmax = _pooled_grad(dpooled_ptr, argmax_ptr, bd, end, b, d, size.B, size.D, size.A)
    for step in range(steps):
        a = (share * steps + step) * BLOCK_A + tl.arange(0, BLOCK_A)
        mask = cube_mask(a, b, d, size, TILE)
        v_offsets = cube_offsets(n, a, b, d, size, TILE)
        offsets = dense_cube_offsets(n, a, b, d, size, TILE)
        v = tl.load(v_ptr + v_offsets, mask=mask, other=0.0).to(acc_ty)
        gate = plane[None, :, :] + (_load_gate(gates_ptr, ad, a, d, size.A, size.D) / GATES)[:, None, :]
        if HAS_AB:
            gate += (_load_gate(gates_ptr, ab, a, b, size.A, size.B) / GATES)[:, :, None]
        v *= gate
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if dpooled_ptr is not None:
            mean, top, at = _pooled_grad(dpooled_ptr, argmax_ptr, ad, end, a, d, size.A, size.D, size.B)
            v += mean[:, None, :] + tl.where(at[:, None, :] == b[None, :, None], top[:, None, :], 0.0)
            if HAS_AB:
                mean, top, at = _pooled_grad(dpooled_ptr, argmax_ptr, ab, end, a, b, size.A, size.B, size.D)
                v += mean[:, :, None] + tl.where(at[:, :, None] == d[None, None, :], top[:, :, None], 0.0)
            if HAS_BD:
                v += dmean[None, :, :] + tl.where(argmax[None, :, :] == a[:, None, None], dmax[None, :, :], 0.0)
        tl.store(out_ptr + offsets, activate(v, ACTIVATION), mask=mask)


def _spatial(gates: torch.Tensor, layout: Layout) -> bool:
    """True if the gates [N, F] have a face of H and W."""
    return gates.shape[1] > layout.C * (layout.H + layout.W)


def apply_faces(
    v: torch.Tensor,
    layout: Layout,
    strides: tuple[int, int],
    gates: torch.Tensor,
    residual: torch.Tensor | None = None,
    dpooled: torch.Tensor | None = None,
    argmax: torch.Tensor | None = None,
    activation: int = NONE.value,
) -> torch.Tensor:
    """Returns the map of `_apply_faces_kernel` in this layout. Reads v, which has these strides, and the residual."""
    layout = layout._replace(stride_n=strides[0], stride_o=strides[1])
    g = cube_grid(layout, v.element_size(), _spatial(gates, layout))
    out = layout.empty(v)
    launch(
        _apply_faces_kernel,
        g.programs,
        v,
        gates.contiguous(),
        layout.dense_or_none(residual),
        dpooled,
        argmax,
        out,
        g.size,
        g.steps,
        ACTIVATION=activation,
        TILE=g.tile,
        num_warps=g.tile.num_warps,
        **registers_for(v, g.tile.num_warps),
        splits=g.splits,
    )
    return out


def face_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    gates: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dgates [N, F] and dresidual of `_face_sums_kernel`. Reads x, grad and the residual once."""
    g = cube_grid(layout, x.element_size(), _spatial(gates, layout))
    dresidual = layout.empty_dresidual(x, activation)
    out = gates.new_empty((layout.N, g.faces(g.partials)))
    launch(
        _face_sums_kernel,
        g.programs,
        layout.dense(grad),
        x,
        layout.dense_or_none(residual if activation else None),
        gates.contiguous(),
        dresidual if activation else None,
        out,
        g.size,
        g.partials,
        g.steps,
        ACTIVATION=activation,
        TILE=g.tile,
        num_warps=g.tile.num_warps,
        **registers_for(x, g.tile.num_warps),
        splits=g.splits,
    )
    return combine_faces(out, None, g, ONE)[0] if g.several else out, dresidual
