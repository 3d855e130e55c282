"""Pieces of the attention kernels: tiles of queries, keys and values, the bias of offsets, and how blocks are chosen.

Queries, keys and values lie side by side, qkv [N, L, 3, heads, d], L positions of a map of width W. A program works for
one head of one image. Scores are in powers of two: the scale has a factor of log2(e), and so has the table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._heuristics import next_power_of_2
from ._layout import accumulation_dtype
from ._product import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WIDEST_HEAD = 128


@triton.jit
def program_head(heads, L, BLOCK: tl.constexpr):
    """This program's image (int64), head, and rows [BLOCK]; neighbours share a head, whose keys stay in the cache."""
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (head // heads).to(tl.int64), head % heads, rows


@triton.jit
def row_tile(rows, there, stride_l, D, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets, int64, and mask, [rows, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    offsets = tl.multiple_of(rows[:, None].to(tl.int64) * stride_l + d[None, :], [1, ALIGN])
    return offsets, tl.max_constancy(there[:, None] & (d < D)[None, :], [1, ALIGN])


@triton.jit
def load_rows(ptr, rows, there, stride_l, D, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [rows, BLOCK_D], with zeros as those that are not there."""
    offsets, mask = row_tile(rows, there, stride_l, D, ALIGN, BLOCK_D)
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def keys_seen(mask_ptr, j, n, L):
    """Whether there are keys j [rows], and the mask, if there is one, leaves them."""
    seen = j < L
    if mask_ptr is not None:
        seen &= tl.load(mask_ptr + n * L + j, mask=seen, other=0) != 0
    return seen


@triton.jit
def place(rows, W, COLUMNS):
    """Where positions lie in the table: the difference of two is their offset."""
    return (rows // W) * COLUMNS + rows % W


@triton.jit
def offset_bias(table_ptr, offsets, there):
    """The bias of offsets, none without a table; the pointer is to the offset 0, 0."""
    bias = 0.0
    if table_ptr is not None:
        bias = tl.load(table_ptr + offsets, mask=there, other=0.0)
    return bias


@triton.jit
def pairs(a, b, acc_ty: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T: products of all rows of a with all rows of b."""
    return dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], acc_ty), DOT, PRECISION)


@triton.jit
def scores(s, bias, seen, SCALE: tl.constexpr):
    """SCALE s + bias, -inf where keys are not seen."""
    return tl.where(seen, s * SCALE + bias, -float("inf"))


@triton.jit
def finite_or_zero(v):
    """-inf, of a row without any key, becomes 0, so that exp2(-inf - v) is 0."""
    return tl.where(v == -float("inf"), 0.0, v)


class Blocks(NamedTuple):
    """`_asdict()` is what a kernel takes: rows of its own, rows that it meets at a time, and options."""

    BLOCK: int
    STEP: int
    num_warps: int
    num_stages: int


class Heads(NamedTuple):
    """qkv as the kernels see it."""

    qkv: torch.Tensor
    N: int
    L: int
    W: int
    heads: int
    D: int
    strides: tuple[int, int, int, int]  # of an image, a position, a third, a head

    @property
    def meta(self) -> dict[str, int]:
        """D, the power of two that divides it and all strides, and the block that holds it."""
        bits = self.D | 16
        for stride in self.strides:
            bits |= stride
        return {"D": self.D, "ALIGN": bits & -bits, "BLOCK_D": max(next_power_of_2(self.D), 16)}

    def blocks(self, block: int, step: int, warps: int, stages: int) -> dict[str, Any]:
        """At most so many rows, or as a map has. Triton's interpreter, on a CPU, has no registers to fill."""
        rows = max(next_power_of_2(self.L), 16)
        block, step = (64, 64) if self.qkv.is_cpu else (block, step)
        return Blocks(min(block, rows), min(step, rows), warps if rows > 32 else min(warps, 4), stages)._asdict()


def split(qkv: torch.Tensor) -> Heads:
    """qkv `[N, H, W, 3, heads, d]`, copied only where a head or the positions are not evenly spaced.

    Raises:
        ValueError: heads of more than 128.
    """
    N, H, W, _, heads, D = qkv.shape
    if D > WIDEST_HEAD:
        raise ValueError(f"the Triton kernels are for heads of up to {WIDEST_HEAD}, got {D}")
    stride_n, stride_h, stride_w, stride_t, stride_head, stride_d = qkv.stride()
    if (stride_d != 1 and D > 1) or (H > 1 and W > 1 and stride_h != W * stride_w):
        return split(qkv.contiguous())
    return Heads(qkv, N, H * W, W, heads, D, (stride_n, stride_w if W > 1 else stride_h, stride_t, stride_head))


class Bias(NamedTuple):
    """The table as the kernels read it: [heads, ..] times log2(e), the place of offset 0, 0, and the row's length."""

    table: torch.Tensor | None
    CENTRE: int = 0
    COLUMNS: int = 0
    OFFSETS: int = 0


def bias(table: torch.Tensor | None) -> Bias:
    """Of a table `[2H - 1, 2W - 1, heads]`, or none."""
    if table is None:
        return Bias(None)
    rows, columns, _ = table.shape
    scaled = (table.to(accumulation_dtype(table)) * LOG2E.value).permute(2, 0, 1).contiguous()
    return Bias(scaled, rows // 2 * columns + columns // 2, columns, rows * columns)
