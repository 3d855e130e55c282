"""Maximum and mean of x along each of its axes, as faces, and the ordered sum of their partial results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.heuristics import cdiv, registers_for
from ...core.launch import launch
from ...core.layout import Layout, accumulation_dtype
from ..partials import max_first
from .cube import (
    ONE,
    CubeGrid,
    FacePartials,
    cube_grid,
    cube_mask,
    cube_offsets,
    cube_program,
    face_offsets,
    face_starts,
)

BLOCK = 1024  # elements of the faces that a program puts together


@triton.jit
def _store_pooled(out_ptr, argmax_ptr, start, offsets, mask, end, total, divisor, maximum, first):
    """Stores one face's part of the maxima, the means and the maxima's indices."""
    tl.store(out_ptr + start + offsets, maximum, mask=mask)
    tl.store(out_ptr + end + start + offsets, total / divisor, mask=mask)
    tl.store(argmax_ptr + start + offsets, first, mask=mask)


@triton.jit
def _pool_faces_kernel(
    x_ptr,
    out_ptr,
    argmax_ptr,
    size,
    partials,
    divisors,
    steps,
    TILE: tl.constexpr,
):
    """out [N, 2, partials of F] = (max, sum / divisor) of x along each axis, argmax [N, partials of F]: one read of x.

    A program keeps a block of [B, D] and walks a share of A.
    """
    acc_ty = out_ptr.dtype.element_ty
    BLOCK_A: tl.constexpr = TILE.BLOCK_A
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    HAS_AB: tl.constexpr = TILE.SPATIAL or not TILE.CHANNELS_LAST
    HAS_BD: tl.constexpr = TILE.SPATIAL or TILE.CHANNELS_LAST
    n, block_b, block_d, b, d = cube_program(tl.program_id(0), size, TILE)
    share = tl.program_id(1)
    ab, ad, bd, end = face_starts(size, partials.ab, partials.ad, partials.bd, TILE.CHANNELS_LAST, TILE.SPATIAL)
    out_ptr += n * 2 * end
    argmax_ptr += n * end
    acc = tl.zeros([BLOCK_A, BLOCK_B, BLOCK_D], acc_ty)
    best = tl.full([BLOCK_A, BLOCK_B, BLOCK_D], float("-inf"), acc_ty)
    best_step = tl.zeros([BLOCK_A, BLOCK_B, BLOCK_D], tl.int32)
    first_a = share * steps * BLOCK_A + tl.arange(0, BLOCK_A)
    for step in range(steps):
        a = first_a + step * BLOCK_A
        mask = cube_mask(a, b, d, size, TILE)
        offsets = cube_offsets(n, a, b, d, size, TILE)
        v = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        total_d, total_b = tl.sum(v, 2), tl.sum(v, 1)
        acc += v
        v = tl.where(mask, v, -float("inf"))
        if HAS_AB:
            maximum, first = max_first(v, d[None, None, :], 2)
            at, there = face_offsets(a, b, size.A, size.B)
            start = ab + block_d * size.A * size.B
            _store_pooled(out_ptr, argmax_ptr, start, at, there, end, total_d, divisors.ab, maximum, first)
        maximum, first = max_first(v, b[None, :, None], 1)
        at, there = face_offsets(a, d, size.A, size.D)
        start = ad + block_b * size.A * size.D
        _store_pooled(out_ptr, argmax_ptr, start, at, there, end, total_b, divisors.ad, maximum, first)
        take = (best == best) & ~(v <= best)  # a NaN wins, and stays
        best = tl.where(take, v, best)
        best_step = tl.where(take, step, best_step)
    if HAS_BD:
        maximum, first = max_first(best, first_a[:, None, None] + best_step * BLOCK_A, 0)
        at, there = face_offsets(b, d, size.B, size.D)
        start = bd + share * size.B * size.D
        _store_pooled(out_ptr, argmax_ptr, start, at, there, end, tl.sum(acc, 0), divisors.bd, maximum, first)


@triton.jit
def _combine_faces_kernel(
    partials_ptr,
    argmax_ptr,
    out_ptr,
    out_argmax_ptr,
    size,
    partials,
    divisors,
    most,
    CHANNELS_LAST: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [N, F] = the sums of the partials, divided; with argmax_ptr, [N, 2, F]: their maxima come first."""
    acc_ty = out_ptr.dtype.element_ty
    ab, ad, bd, end = face_starts(size, 1, 1, 1, CHANNELS_LAST, SPATIAL)
    of_ab, of_ad, of_bd, length_all = face_starts(size, partials.ab, partials.ad, partials.bd, CHANNELS_LAST, SPATIAL)
    blocks = tl.cdiv(end, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_ab = (i >= ab) & (i < ab + size.A * size.B)
    is_ad = (i >= ad) & (i < ad + size.A * size.D)
    count = tl.where(is_ab, partials.ab, tl.where(is_ad, partials.ad, partials.bd))
    length = tl.where(is_ab, size.A * size.B, tl.where(is_ad, size.A * size.D, size.B * size.D)).to(tl.int64)
    first = i + tl.where(is_ab, of_ab - ab, tl.where(is_ad, of_ad - ad, of_bd - bd))
    divisor = tl.where(is_ab, divisors.ab, tl.where(is_ad, divisors.ad, divisors.bd)).to(acc_ty)
    total = tl.zeros([BLOCK], acc_ty)
    best = tl.full([BLOCK], float("-inf"), acc_ty)
    argmax = tl.zeros([BLOCK], tl.int32)
    ROWS: tl.constexpr = 1 if argmax_ptr is None else 2
    partials_ptr += n * ROWS * length_all
    for k in range(most):
        mask = (i < end) & (k < count)
        at = first + k * length
        if argmax_ptr is not None:
            v = tl.load(partials_ptr + at, mask=mask, other=-float("inf"))
            index = tl.load(argmax_ptr + n * length_all + at, mask=mask, other=0)
            take = (v > best) | ((v != v) & (best == best)) | (k == 0)
            best = tl.where(take, v, best)
            argmax = tl.where(take, index, argmax)
        total += tl.load(partials_ptr + (ROWS - 1) * length_all + at, mask=mask, other=0.0)
    tl.store(out_ptr + (n * ROWS + ROWS - 1) * end + i, total / divisor, mask=i < end)
    if argmax_ptr is not None:
        tl.store(out_ptr + n * 2 * end + i, best, mask=i < end)
        tl.store(out_argmax_ptr + n * end + i, argmax, mask=i < end)


def combine_faces(
    partials: torch.Tensor, argmax: torch.Tensor | None, g: CubeGrid, divisors: FacePartials
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Puts the partials of faces [N, (2,) P] together: [N, (2,) F], and the maxima's indices."""
    F = g.faces(ONE)
    N = partials.shape[0]
    out = partials.new_empty((*partials.shape[:-1], F))
    out_argmax = None if argmax is None else argmax.new_empty((N, F))
    launch(
        _combine_faces_kernel,
        N * cdiv(F, BLOCK),
        partials,
        argmax,
        out,
        out_argmax,
        g.size,
        g.partials,
        divisors,
        max(g.partials),
        CHANNELS_LAST=g.tile.CHANNELS_LAST,
        SPATIAL=g.tile.SPATIAL,
        BLOCK=BLOCK,
    )
    return out, out_argmax


def pool_faces(x: torch.Tensor, layout: Layout, spatial: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns pooled [N, 2, F], maximum and mean, and argmax [N, F] (int32). Reads x once."""
    g = cube_grid(layout, x.element_size(), spatial)
    N, length = layout.N, g.faces(g.partials)
    out = x.new_empty((N, 2, length), dtype=accumulation_dtype(x))
    argmax = x.new_empty((N, length), dtype=torch.int32)
    divisors = FacePartials(g.size.D, g.size.B, g.size.A)
    launch(
        _pool_faces_kernel,
        g.programs,
        x,
        out,
        argmax,
        g.size,
        g.partials,
        ONE if g.several else divisors,
        g.steps,
        TILE=g.tile,
        num_warps=g.tile.num_warps,
        **registers_for(x, g.tile.num_warps),
        splits=g.splits,
    )
    if not g.several:
        return out, argmax
    pooled, first = combine_faces(out, argmax, g, divisors)
    assert first is not None
    return pooled, first
