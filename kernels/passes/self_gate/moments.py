"""Mean and second moment of every channel, of an image or of the batch, from partials of the pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.heuristics import TILE, cdiv, next_power_of_2, vector_block
from ...core.launch import launch
from ...core.layout import Layout, accumulation_dtype
from ...core.tiles import tile_full, tile_mask, x_offsets
from .gate import Gate, gate_reduction
from .tiles import scale_of


@triton.jit
def _moments_kernel(x_ptr, partials_ptr, size, steps, TILE: tl.constexpr):
    """partials [N, splits, 2, C]: mean and second moment of a share of the pixels. Each lane follows its own mean."""
    acc_ty = partials_ptr.dtype.element_ty
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    C = size.C
    blocks = tl.cdiv(C, TILE.BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    share = tl.program_id(1)
    c = tl.program_id(0) % blocks * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    p = share * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    mean = tile_full(0, TILE, acc_ty)
    second = tile_full(0, TILE, acc_ty)
    for step in range(steps):
        ps = p + step * BLOCK_P
        mask = tile_mask(c, ps, size, TILE)
        x = tl.load(x_ptr + x_offsets(n, c, ps, size, TILE), mask=mask, other=0.0).to(acc_ty)
        d = tl.where(mask, x - mean, 0.0)
        mean += d * (tl.full([], 1.0, acc_ty) / (step + 1))
        second += tl.where(mask, d * (x - mean), 0.0)
    seen = tl.minimum(tl.maximum((size.HW - p + BLOCK_P - 1) // BLOCK_P, 0), steps).to(acc_ty)[None, :]
    total = tl.sum(seen * mean, 1) / tl.sum(seen, 1)
    # The rest corrects the mean, so that it is exact for equal values: a batch norm magnifies any difference.
    rest = tl.sum(tl.where(seen > 0, seen * (mean - total[:, None]), 0.0), 1) / tl.sum(seen, 1)
    total += tl.where(rest == rest, rest, 0.0)  # an infinite mean leaves nothing but NaN
    apart = tl.where(seen > 0, mean - total[:, None], 0.0)
    second = tl.sum(second + seen * apart * apart, 1)
    row = (n * tl.num_programs(1) + share) * 2 * C
    tl.store(partials_ptr + row + c, total, mask=c < C)
    tl.store(partials_ptr + row + C + c, second, mask=c < C)


@triton.jit
def combined_moments(partials_ptr, c, size, rows, splits, span, count, BLOCK_S: tl.constexpr):
    """Returns mean and second moment of channels c, from those of partials [rows, 2, C] in order.

    Row i holds the pixels of split i % splits of an image: `span` pixels, fewer in the last split. All rows together
    hold `count` values.
    """
    acc_ty = partials_ptr.dtype.element_ty
    C, HW = size.C, size.HW
    first = tl.load(partials_ptr + c, mask=c < C, other=0.0)
    first = tl.where(tl.abs(first) < float("inf"), first, 0.0)  # the differences of equal means are 0
    total = tl.zeros([BLOCK_S, c.shape[0]], acc_ty)
    for start in range(0, rows, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        mask = (i < rows)[:, None] & (c < C)[None, :]
        values = tl.minimum(HW - i % splits * span, span).to(acc_ty)[:, None]
        at = partials_ptr + i[:, None].to(tl.int64) * 2 * C + c[None, :]
        total += values * tl.where(mask, tl.load(at, mask=mask, other=0.0) - first[None, :], 0.0)
    mean = first + tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_S, c.shape[0]], acc_ty)
    for start in range(0, rows, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        mask = (i < rows)[:, None] & (c < C)[None, :]
        values = tl.minimum(HW - i % splits * span, span).to(acc_ty)[:, None]
        at = partials_ptr + i[:, None].to(tl.int64) * 2 * C + c[None, :]
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        total += tl.load(at + C, mask=mask, other=0.0) + values * apart * apart
    return mean, tl.sum(total, 0)


@triton.jit
def _combine_moments_kernel(
    partials_ptr,
    mean_ptr,
    scale_ptr,
    size,
    splits,
    span,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """mean and scale [N, C] of each image from its partials [N, splits, 2, C]."""
    C, HW = size.C, size.HW
    blocks = tl.cdiv(C, BLOCK_L)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    mean, second = combined_moments(partials_ptr + n * splits * 2 * C, c, size, splits, splits, span, HW, BLOCK_S)
    tl.store(mean_ptr + n * C + c, mean, mask=c < C)
    tl.store(scale_ptr + n * C + c, scale_of(second, HW, EPS, KIND), mask=c < C)


def moments(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, int]:
    """Returns mean and second moment [N, splits, 2, C] of shares of the pixels, and the pixels of a share.

    Reads x once.
    """
    t, blocks, splits, steps = gate_reduction(layout)
    values = x.new_empty((layout.N, splits, 2, layout.C), dtype=accumulation_dtype(x))
    launch(
        _moments_kernel,
        layout.N * blocks,
        x,
        values,
        layout.sizes,
        steps,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    return values, steps * t.BLOCK_P


def mean_and_scale(x: torch.Tensor, layout: Layout, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and scale [N, C]. Reads x once."""
    values, span = moments(x, layout)
    splits, block = values.shape[1], vector_block(layout.C, 16)
    mean = values.new_empty((layout.N, layout.C))
    scale = torch.empty_like(mean)
    launch(
        _combine_moments_kernel,
        layout.N * cdiv(layout.C, block),
        values,
        mean,
        scale,
        layout.sizes,
        splits,
        span,
        EPS=gate.eps,
        KIND=gate.kind.value,
        BLOCK_S=min(next_power_of_2(splits), TILE // 2 // block),
        BLOCK_L=block,
    )
    return mean, scale
