"""Mean and maximum over the pixels or over the channels, and the ordered sum of partial results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import TILE, cdiv, grain, next_power_of_2, reduction, vector_block
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..core.tiles import INDEX_MAX, NONE, SIGMOID, activate, gate_grad, max_first, tile_mask, tile_offsets


@triton.jit
def _pool_kernel(
    x_ptr, gate_ptr, out_ptr, argmax_ptr, C, HW, stride_n, stride_o, divisor, steps,
    OVER_C: tl.constexpr, EVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out [N, parts, 1 or 2, kept] = (sum / divisor, max) of x [* gate [N, C]] over parts of the pixels or channels.

    argmax is the first of equal maxima; with EVEN, minus their number where there are several.
    """
    acc_ty = out_ptr.dtype.element_ty
    kept = HW if OVER_C else C
    blocks = tl.cdiv(kept, BLOCK_P if OVER_C else BLOCK_C)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first_tile = tl.program_id(1) * steps
    c = (first_tile if OVER_C else block) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (block if OVER_C else first_tile) * BLOCK_P + tl.arange(0, BLOCK_P)

    total = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    if argmax_ptr is not None:
        best = tl.full([BLOCK_C, BLOCK_P], float("-inf"), acc_ty)
        # The step alone says where a lane found its maximum; one that sees nothing but -inf keeps its first position.
        best_step = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
        if EVEN:
            equals = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    for step in range(steps):
        cs = c + step * BLOCK_C if OVER_C else c
        ps = p if OVER_C else p + step * BLOCK_P
        mask = tile_mask(cs, ps, C, HW, CHANNELS_LAST, ALIGN)
        offsets = tile_offsets(n * stride_n, cs, ps, stride_o, CHANNELS_LAST, ALIGN)
        v = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if gate_ptr is not None:
            v *= tl.load(gate_ptr + n * C + cs, mask=cs < C, other=0.0)[:, None]
        total += v
        if argmax_ptr is not None:
            v = tl.where(mask, v, -float("inf"))
            take = (v > best) | ((v != v) & (best == best))
            if EVEN:
                equals = tl.where(take, 1, equals + ((v == best) & mask).to(tl.int32))
            best = tl.where(take, v, best)
            best_step = tl.where(take, step, best_step)

    k = p if OVER_C else c
    row = (n * tl.num_programs(1) + tl.program_id(1)) * kept
    REDUCED: tl.constexpr = 0 if OVER_C else 1
    total = tl.sum(total, REDUCED) / divisor
    if argmax_ptr is None:
        tl.store(out_ptr + row + k, total, mask=k < kept)
    else:
        index = c[:, None] + best_step * BLOCK_C if OVER_C else p[None, :] + best_step * BLOCK_P
        value, first = max_first(best, index, REDUCED)
        if EVEN:
            first = _first_or_count(first, tl.where(best == tl.expand_dims(value, REDUCED), equals, 0), REDUCED)
        tl.store(out_ptr + 2 * row + k, total, mask=k < kept)
        tl.store(out_ptr + 2 * row + kept + k, value, mask=k < kept)
        tl.store(argmax_ptr + row + k, first, mask=k < kept)


@triton.jit
def _first_or_count(first, equals, AXIS: tl.constexpr):
    """first, or minus the sum of equals where that is more than one."""
    count = tl.sum(equals, AXIS)
    return tl.where(count > 1, -count, first)


@triton.jit
def _part_rows(parts_ptr, n, k, L, parts, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of one image's parts [N, parts, ROWS, L]: where the first rows lie, and the mask, [BLOCK_S, columns]."""
    s = tl.arange(0, BLOCK_S)
    return parts_ptr + (n * parts + s[:, None]) * ROWS * L + k[None, :], (s < parts)[:, None] & (k < L)[None, :]


@triton.jit
def parts_sum(parts_ptr, n, k, L, parts, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sum of the parts' first rows at columns k, in order."""
    rows, mask = _part_rows(parts_ptr, n, k, L, parts, ROWS, BLOCK_S)
    return tl.sum(tl.load(rows, mask=mask, other=0.0), 0)


@triton.jit
def pair_sums(parts_ptr, k, L, rows, BLOCK_S: tl.constexpr):
    """Both sums of parts [rows, 2, L] over the rows at columns k, BLOCK_S rows at a time, in order."""
    acc_ty = parts_ptr.dtype.element_ty
    firsts = tl.zeros([BLOCK_S, k.shape[0]], acc_ty)
    seconds = tl.zeros([BLOCK_S, k.shape[0]], acc_ty)
    for start in range(0, rows, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        mask = (row < rows)[:, None] & (k < L)[None, :]
        at = parts_ptr + row[:, None].to(tl.int64) * 2 * L + k[None, :]
        firsts += tl.load(at, mask=mask, other=0.0)
        seconds += tl.load(at + L, mask=mask, other=0.0)
    return tl.sum(firsts, 0), tl.sum(seconds, 0)


@triton.jit
def parts_max(parts_ptr, parts_argmax_ptr, n, k, L, parts, EVEN: tl.constexpr, BLOCK_S: tl.constexpr):
    """Maximum of the parts' second rows at columns k, and its index, or minus the number of equals."""
    rows, mask = _part_rows(parts_ptr + L, n, k, L, parts, 2, BLOCK_S)
    values = tl.load(rows, mask=mask, other=-float("inf"))
    index_rows, _ = _part_rows(parts_argmax_ptr, n, k, L, parts, 1, BLOCK_S)
    index = tl.load(index_rows, mask=mask, other=INDEX_MAX)
    value, first = max_first(values, index, 0)
    if EVEN:
        equals = (values == tl.expand_dims(value, 0)) & mask
        first = _first_or_count(first, tl.where(equals, tl.where(index < 0, -index, 1), 0), 0)
    return value, first


@triton.jit
def _combine_pool_kernel(
    parts_ptr, parts_argmax_ptr, out_ptr, argmax_ptr, L, parts, divisor,
    EVEN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """[N, parts, 2, L] -> [N, 2, L]: (sum / divisor, max), parts in order."""
    blocks = tl.cdiv(L, BLOCK_L)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    total = parts_sum(parts_ptr, n, k, L, parts, 2, BLOCK_S) / divisor
    value, first = parts_max(parts_ptr, parts_argmax_ptr, n, k, L, parts, EVEN, BLOCK_S)
    tl.store(out_ptr + n * 2 * L + k, total, mask=k < L)
    tl.store(out_ptr + (2 * n + 1) * L + k, value, mask=k < L)
    tl.store(argmax_ptr + n * L + k, first, mask=k < L)


@triton.jit
def _combine_kernel(
    parts_ptr, gate_ptr, bias_ptr, out_ptr, L, parts, divisor,
    GATE: tl.constexpr, RESULT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """out [M, L] = act(sum over parts of [M, parts, L] / divisor [* the derivative at gate] [+ bias]), parts in order.

    gate is [M, L], bias [1].
    """
    wide: tl.constexpr = parts_ptr.dtype.element_ty.primitive_bitwidth >= 32  # else the sum is as wide as its result
    acc_ty: tl.constexpr = parts_ptr.dtype.element_ty if wide else out_ptr.dtype.element_ty
    blocks = tl.cdiv(L, BLOCK_L)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_S, BLOCK_L], acc_ty)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < parts)[:, None] & (k < L)[None, :]
        total += tl.load(parts_ptr + (m * parts + s[:, None]) * L + k[None, :], mask=mask, other=0.0).to(acc_ty)
    out = tl.sum(total, 0) / divisor
    if gate_ptr is not None:
        out *= gate_grad(tl.load(gate_ptr + m * L + k, mask=k < L, other=0.0).to(acc_ty), GATE)
    if bias_ptr is not None:
        out += tl.load(bias_ptr).to(acc_ty)
    tl.store(out_ptr + m * L + k, activate(out, RESULT), mask=k < L)


class Parts(NamedTuple):
    """Parts [N * slots, kept] of sums, or [N * slots, 2, kept] of sums and maxima, with where these came from.

    Sums are yet to be divided, but for one part alone of divisor 1, which is the result.
    """

    values: torch.Tensor
    argmax: torch.Tensor | None
    slots: int
    divisor: int

    @property
    def images(self) -> int:
        return self.values.shape[0] // self.slots

    @property
    def complete(self) -> bool:
        return self.slots == self.divisor == 1

    @property
    def branches(self) -> int:
        return self.values.shape[1] if self.values.dim() == 3 else 1

    def empty(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Room for the results."""
        values = self.values.new_empty((self.images, *self.values.shape[1:]))
        return values, None if self.argmax is None else self.argmax.new_empty((self.images, self.values.shape[-1]))


def pool_hw(x: torch.Tensor, layout: Layout, with_max: bool) -> Parts:
    """Parts of the mean over the pixels [N, C], or of mean and maximum [N, 2, C]. Reads x once."""
    return _pool(x, None, layout, with_max, over_c=False)


def mean_hw(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Mean over the pixels [N, C]. Reads x once."""
    return combine_parts(pool_hw(x, layout, with_max=False))[0]


def mean_max_hw(x: torch.Tensor, layout: Layout, even: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, max) over the pixels [N, 2, C], argmax h * W + w [N, C] (int32). Reads x once.

    With ``even`` it is minus their number where several are equal.
    """
    return combine_parts(_pool(x, None, layout, with_max=True, over_c=False, even=even), even)


def mean_max_c(
    x: torch.Tensor, gate: torch.Tensor | None, layout: Layout, even: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, max) of x [* gate [N, C]] over the channels [N, 2, H, W], argmax [N, H, W] (int32). Reads x once.

    With ``even`` it is minus their number where several are equal.
    """
    maps, argmax = combine_parts(_pool(x, gate, layout, with_max=True, over_c=True, even=even), even)
    return maps.view(layout.N, 2, layout.H, layout.W), argmax.view(layout.N, layout.H, layout.W)


def _pool(
    x: torch.Tensor, gate: torch.Tensor | None, layout: Layout, with_max: bool, over_c: bool, even: bool = False
) -> Parts:
    N, C, HW = layout.N, layout.C, layout.HW
    name = "maps" if over_c else "mean and maximum" if with_max else "mean"
    t, blocks, parts, steps = reduction(layout, over_c, *grain(name, layout))
    kept, reduced = (HW, C) if over_c else (C, HW)
    rows = N * parts
    out = x.new_empty((rows, 2, kept) if with_max else (rows, kept), dtype=accumulation_dtype(x))
    argmax = x.new_empty((rows, kept), dtype=torch.int32) if with_max else None
    launch(
        _pool_kernel, N * blocks, x, gate, out, argmax, C, HW, layout.stride_n, layout.stride_o,
        reduced if parts == 1 else 1, steps, OVER_C=over_c, EVEN=even, **t._asdict(), parts=parts,
    )  # fmt: skip
    return Parts(out, argmax, parts, 1 if parts == 1 else reduced)


def combine_parts(p: Parts, even: bool = False) -> tuple[torch.Tensor, Any]:
    """The results and, with maxima, their argmax [N, kept]."""
    if p.complete:
        return p.values, p.argmax
    (out, argmax), kept = p.empty(), p.values.shape[-1]
    if argmax is None:
        return combine(p.values.view(-1, p.slots, kept), None, out, divisor=p.divisor), None
    block_s = next_power_of_2(p.slots)
    block = vector_block(kept, max(TILE // block_s, 4))
    launch(
        _combine_pool_kernel, p.images * cdiv(kept, block),
        p.values, p.argmax, out, argmax, kept, p.slots, p.divisor, EVEN=even, BLOCK_S=block_s, BLOCK_L=block,
    )  # fmt: skip
    return out, argmax


def combine(
    parts: torch.Tensor, gate: torch.Tensor | None, out: torch.Tensor, activation: int = SIGMOID.value,
    divisor: int = 1, bias: torch.Tensor | None = None, result: tl.constexpr = NONE,
) -> torch.Tensor:  # fmt: skip
    """out [M, L] = sum of parts [M, S, L] over S, in a fixed order, / divisor [* gate'] [+ bias [1]], in out's dtype.

    gate' is the derivative of the activation, a sigmoid or a hard sigmoid, told from its value. ``result`` is an
    activation that is applied at the end.
    """
    M, S, L = parts.shape
    block = vector_block(L, 64)
    block_s = min(next_power_of_2(S), 2048 // block)
    launch(
        _combine_kernel, M * cdiv(L, block), parts, gate, bias, out, L, S, divisor,
        GATE=activation, RESULT=result.value, BLOCK_S=block_s, BLOCK_L=block,
    )  # fmt: skip
    return out
