"""Mean and maximum over the pixels or over the channels, and the ordered sum of partial results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._heuristics import SCALE_TILE, TILE, splits, tile, vector_block
from ._layout import Layout, accumulation_dtype
from ._tiles import INDEX_MAX, max_first, sigmoid_grad, tile_mask, tile_offsets


@triton.jit
def _pool_kernel(
    x_ptr, gate_ptr, out_ptr, argmax_ptr, C, HW, stride_n, stride_o, divisor, parts, steps,
    OVER_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out [N, parts, 1 or 2, kept] = (sum / divisor, max) of x [* gate [N, C]] over one part of the pixels or channels."""
    acc_ty = out_ptr.dtype.element_ty
    pid = tl.program_id(0)
    kept = HW if OVER_C else C
    blocks = tl.cdiv(kept, BLOCK_P if OVER_C else BLOCK_C)
    part = pid // blocks % parts
    n = (pid // blocks // parts).to(tl.int64)
    first_tile = part * steps
    c = (first_tile if OVER_C else pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (pid % blocks if OVER_C else first_tile) * BLOCK_P + tl.arange(0, BLOCK_P)

    total = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    if argmax_ptr is not None:
        best = tl.full([BLOCK_C, BLOCK_P], float("-inf"), acc_ty)
        # Not a sentinel: a lane that sees nothing but -inf keeps its first position.
        index = (c[:, None] if OVER_C else p[None, :]) + tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    for step in range(steps):
        cs = c + step * BLOCK_C if OVER_C else c
        ps = p if OVER_C else p + step * BLOCK_P
        mask = tile_mask(cs, ps, C, HW, CHANNELS_LAST, ALIGN)
        offsets = n * stride_n + tile_offsets(cs, ps, stride_o, CHANNELS_LAST, ALIGN)
        v = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if gate_ptr is not None:
            v *= tl.load(gate_ptr + n * C + cs, mask=cs < C, other=0.0)[:, None]
        total += v
        if argmax_ptr is not None:
            v = tl.where(mask, v, -float("inf"))
            take = (v > best) | ((v != v) & (best == best))
            best = tl.where(take, v, best)
            index = tl.where(take, cs[:, None] if OVER_C else ps[None, :], index)

    k = p if OVER_C else c
    row = (n * parts + part) * kept
    REDUCED: tl.constexpr = 0 if OVER_C else 1
    total = tl.sum(total, REDUCED) / divisor
    if argmax_ptr is None:
        tl.store(out_ptr + row + k, total, mask=k < kept)
    else:
        value, first = max_first(best, index, REDUCED)
        tl.store(out_ptr + 2 * row + k, total, mask=k < kept)
        tl.store(out_ptr + 2 * row + kept + k, value, mask=k < kept)
        tl.store(argmax_ptr + row + k, first, mask=k < kept)


@triton.jit
def _combine_pool_kernel(
    parts_ptr, parts_argmax_ptr, out_ptr, argmax_ptr, L, parts, divisor, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr
):
    """[N, parts, 1 or 2, L] -> [N, 1 or 2, L]: (sum / divisor, max), parts in order."""
    ROWS: tl.constexpr = 1 if argmax_ptr is None else 2
    blocks = tl.cdiv(L, BLOCK_L)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    s = tl.arange(0, BLOCK_S)
    mask = (s < parts)[:, None] & (k < L)[None, :]
    rows = (n * parts + s[:, None]) * L
    total = tl.sum(tl.load(parts_ptr + ROWS * rows + k[None, :], mask=mask, other=0.0), 0) / divisor
    tl.store(out_ptr + n * ROWS * L + k, total, mask=k < L)
    if argmax_ptr is not None:
        values = tl.load(parts_ptr + 2 * rows + L + k[None, :], mask=mask, other=-float("inf"))
        index = tl.load(parts_argmax_ptr + rows + k[None, :], mask=mask, other=INDEX_MAX)
        value, first = max_first(values, index, 0)
        tl.store(out_ptr + (2 * n + 1) * L + k, value, mask=k < L)
        tl.store(argmax_ptr + n * L + k, first, mask=k < L)


@triton.jit
def _combine_kernel(parts_ptr, gate_ptr, out_ptr, L, parts, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr):
    """out [M, L] = sum over parts of [M, parts, L], in order [* gate (1 - gate), gate [M, L]]."""
    acc_ty = out_ptr.dtype.element_ty
    blocks = tl.cdiv(L, BLOCK_L)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_S, BLOCK_L], acc_ty)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < parts)[:, None] & (k < L)[None, :]
        total += tl.load(parts_ptr + (m * parts + s[:, None]) * L + k[None, :], mask=mask, other=0.0).to(acc_ty)
    out = tl.sum(total, 0)
    if gate_ptr is not None:
        out *= sigmoid_grad(tl.load(gate_ptr + m * L + k, mask=k < L, other=0.0).to(acc_ty))
    tl.store(out_ptr + m * L + k, out, mask=k < L)


def pool_hw(x: torch.Tensor, layout: Layout, with_max: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean over the pixels [N, C], or (mean, max) [N, 2, C] with argmax [N, C] (int32, h * W + w). Reads x once."""
    return _pool(x, None, layout, layout.C, layout.HW, with_max, over_c=False)


def pool_c(
    x: torch.Tensor, gate: torch.Tensor | None, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, max) of x [* gate [N, C]] over the channels [N, 2, HW], argmax [N, HW] (int32). Reads x once."""
    maps, argmax = _pool(x, gate, layout, layout.HW, layout.C, True, over_c=True)
    assert argmax is not None
    return maps, argmax


def _pool(
    x: torch.Tensor, gate: torch.Tensor | None, layout: Layout, kept: int, reduced: int, with_max: bool, over_c: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    N, C, HW = layout.N, layout.C, layout.HW
    # With the channels inside, one tile is nearly the whole reduction over them: make it worth a program.
    elements = SCALE_TILE if over_c and layout.channels_last else TILE
    t = tile(layout, elements)
    programs = N * triton.cdiv(kept, t.BLOCK_P if over_c else t.BLOCK_C)
    parts, steps = splits(programs, triton.cdiv(reduced, t.BLOCK_C if over_c else t.BLOCK_P))

    def allocate(rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = x.new_empty((rows, 2, kept) if with_max else (rows, kept), dtype=accumulation_dtype(x))
        return out, x.new_empty((rows, kept), dtype=torch.int32) if with_max else None

    part, part_argmax = allocate(N * parts)
    if N:
        _pool_kernel[(programs * parts,)](
            x, gate, part, part_argmax, C, HW, layout.stride_n, layout.stride_o, reduced if parts == 1 else 1,
            parts, steps, OVER_C=over_c, **t._asdict(),
        )  # fmt: skip
    if parts == 1:
        return part, part_argmax
    out, argmax = allocate(N)
    block = vector_block(kept, 128)
    _combine_pool_kernel[(N * triton.cdiv(kept, block),)](
        part, part_argmax, out, argmax, kept, parts, reduced, BLOCK_S=triton.next_power_of_2(parts), BLOCK_L=block
    )
    return out, argmax


def combine(parts: torch.Tensor, gate: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """out [M, L] = sum of parts [M, S, L] over S, in a fixed order [* gate (1 - gate)]; out's dtype accumulates."""
    M, S, L = parts.shape
    block_l = vector_block(L, 64)
    block_s = min(triton.next_power_of_2(S), 2048 // block_l)
    if M:
        _combine_kernel[(M * triton.cdiv(L, block_l),)](parts, gate, out, L, S, BLOCK_S=block_s, BLOCK_L=block_l)
    return out
