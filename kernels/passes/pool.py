"""Mean and maximum of x over its pixels or over its channels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.heuristics import grain, reduction
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..core.tiles import load_channels, tile_full, tile_mask, x_offsets
from .partials import Partials, combine_pooled, first_or_count, max_first


@triton.jit
def _pool_kernel(
    x_ptr,
    gate_ptr,
    out_ptr,
    argmax_ptr,
    size,
    divisor,
    steps,
    OVER_C: tl.constexpr,
    SHARE_TIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """out [N, splits, 1 or 2, kept] = (sum / divisor, max) of x [* gate [N, C]] over a share of the pixels or channels.

    argmax is the first of equal maxima; with SHARE_TIES, minus their number if there are several.
    """
    acc_ty = out_ptr.dtype.element_ty
    kept = size.HW if OVER_C else size.C
    blocks = tl.cdiv(kept, TILE.BLOCK_P if OVER_C else TILE.BLOCK_C)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first_tile = tl.program_id(1) * steps
    c = (first_tile if OVER_C else block) * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    p = (block if OVER_C else first_tile) * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)

    total = tile_full(0, TILE, acc_ty)
    if argmax_ptr is not None:
        best = tile_full(float("-inf"), TILE, acc_ty)
        # The step alone says where a lane found its maximum; one that sees nothing but -inf keeps its first position.
        best_step = tile_full(0, TILE, tl.int32)
        if SHARE_TIES:
            ties = tile_full(0, TILE, tl.int32)
    for step in range(steps):
        cs = c + step * TILE.BLOCK_C if OVER_C else c
        ps = p if OVER_C else p + step * TILE.BLOCK_P
        mask = tile_mask(cs, ps, size, TILE)
        v = tl.load(x_ptr + x_offsets(n, cs, ps, size, TILE), mask=mask, other=0.0).to(acc_ty)
        if gate_ptr is not None:
            v *= load_channels(gate_ptr, n, cs, size)[:, None]
        total += v
        if argmax_ptr is not None:
            v = tl.where(mask, v, -float("inf"))
            take = (v > best) | ((v != v) & (best == best))
            if SHARE_TIES:
                ties = tl.where(take, 1, ties + ((v == best) & mask).to(tl.int32))
            best = tl.where(take, v, best)
            best_step = tl.where(take, step, best_step)

    k = p if OVER_C else c
    row = (n * tl.num_programs(1) + tl.program_id(1)) * kept
    REDUCED: tl.constexpr = 0 if OVER_C else 1
    total = tl.sum(total, REDUCED) / divisor
    if argmax_ptr is None:
        tl.store(out_ptr + row + k, total, mask=k < kept)
    else:
        index = c[:, None] + best_step * TILE.BLOCK_C if OVER_C else p[None, :] + best_step * TILE.BLOCK_P
        value, first = max_first(best, index, REDUCED)
        if SHARE_TIES:
            first = first_or_count(first, tl.where(best == tl.expand_dims(value, REDUCED), ties, 0), REDUCED)
        tl.store(out_ptr + 2 * row + k, total, mask=k < kept)
        tl.store(out_ptr + 2 * row + kept + k, value, mask=k < kept)
        tl.store(argmax_ptr + row + k, first, mask=k < kept)


def pool_hw(x: torch.Tensor, layout: Layout, with_max: bool) -> Partials:
    """Returns partials of the mean over the pixels [N, C], or of mean and maximum [N, 2, C]. Reads x once."""
    return _pool(x, None, layout, with_max, over_c=False)


def mean_hw(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns the mean over the pixels [N, C]. Reads x once."""
    return combine_pooled(pool_hw(x, layout, with_max=False))[0]


def mean_max_hw(x: torch.Tensor, layout: Layout, share_ties: bool = False) -> tuple[torch.Tensor, Any]:
    """Returns (mean, max) over the pixels [N, 2, C] and argmax h * W + w [N, C], int32. Reads x once.

    With ``share_ties`` argmax is minus the number of equal maxima if there are several.
    """
    return combine_pooled(_pool(x, None, layout, with_max=True, over_c=False, share_ties=share_ties), share_ties)


def mean_max_c(
    x: torch.Tensor, gate: torch.Tensor | None, layout: Layout, share_ties: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (mean, max) of x [* gate [N, C]] over the channels [N, 2, H, W] and argmax [N, H, W], int32.

    Reads x once. With ``share_ties`` argmax is minus the number of equal maxima if there are several.
    """
    partials = _pool(x, gate, layout, with_max=True, over_c=True, share_ties=share_ties)
    maps, argmax = combine_pooled(partials, share_ties)
    assert argmax is not None
    return maps.view(layout.N, 2, layout.H, layout.W), argmax.view(layout.N, layout.H, layout.W)


def _pool(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    layout: Layout,
    with_max: bool,
    over_c: bool,
    share_ties: bool = False,
) -> Partials:
    name = "maps" if over_c else "mean and maximum" if with_max else "mean"
    t, blocks, splits, steps = reduction(layout, over_c, *grain(name, layout))
    kept, reduced = (layout.HW, layout.C) if over_c else (layout.C, layout.HW)
    rows = layout.N * splits
    out = x.new_empty((rows, 2, kept) if with_max else (rows, kept), dtype=accumulation_dtype(x))
    argmax = x.new_empty((rows, kept), dtype=torch.int32) if with_max else None
    launch(
        _pool_kernel,
        layout.N * blocks,
        x,
        gate,
        out,
        argmax,
        layout.sizes,
        reduced if splits == 1 else 1,
        steps,
        OVER_C=over_c,
        SHARE_TIES=share_ties,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    return Partials(out, argmax, splits, 1 if splits == 1 else reduced)
