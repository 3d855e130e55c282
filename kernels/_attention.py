"""Pieces of the attention kernels: tiles of queries, keys and values, and their products.

Scores are in powers of two: the scale is multiplied by log2(e), and so is the table of biases.
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


class Head(NamedTuple):
    """What kernels know of a head when they are compiled."""

    SCALE: float
    D: int
    ALIGN: int  # the power of two, of 16 at most, that divides D and all strides
    BLOCK_D: int
    ACC: Any  # the dtype of sums
    DOT: Any  # what is multiplied, and how exactly
    PRECISION: str


def head(qkv: torch.Tensor, D: int, strides: tuple[int, ...], scale: float, **product: Any) -> Head:
    """Of D channels, which are next to each other; ``product`` is what `_product.product` returns."""
    bits = D | 16
    for stride in strides:
        bits |= stride
    acc = tl.float64 if accumulation_dtype(qkv) == torch.float64 else tl.float32
    return Head(scale, D, bits & -bits, max(next_power_of_2(D), 16), acc, **product)


@triton.jit
def row_tile(rows, there, stride, D, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets, int64, and mask, [rows, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    offsets = tl.multiple_of(rows[:, None].to(tl.int64) * stride + d[None, :], [1, ALIGN])
    return offsets, tl.max_constancy(there[:, None] & (d < D)[None, :], [1, ALIGN])


@triton.jit
def load_rows(ptr, rows, there, stride, HEAD: tl.constexpr):
    """Rows of one head, [rows, BLOCK_D], with zeros as those that are not there."""
    return load_chunk(ptr, rows, there, stride, 0, HEAD, HEAD.BLOCK_D)


@triton.jit
def load_chunk(ptr, rows, there, stride, c, HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """Their channels from c on, [rows, CHUNK]."""
    offsets, mask = row_tile(rows, there, stride, HEAD.D - c, HEAD.ALIGN, CHUNK)
    return tl.load(ptr + c + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, tile, rows, there, stride, HEAD: tl.constexpr):
    offsets, mask = row_tile(rows, there, stride, HEAD.D, HEAD.ALIGN, HEAD.BLOCK_D)
    tl.store(ptr + offsets, tile, mask=mask)


@triton.jit
def zero_rows(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Sums [ROWS, BLOCK_D] to begin with."""
    BLOCK_D: tl.constexpr = HEAD.BLOCK_D  # in a list no field may stand
    return tl.zeros([ROWS, BLOCK_D], HEAD.ACC)


@triton.jit
def place(rows, W, COLUMNS):
    """Where positions lie in the table: the difference of two is their offset."""
    return (rows // W) * COLUMNS + rows % W


@triton.jit
def add_product(a, b, acc, HEAD: tl.constexpr):
    """acc + a b."""
    return dot(a, b, acc, HEAD.DOT, HEAD.PRECISION)


@triton.jit
def pairs(a, b, HEAD: tl.constexpr):
    """a b^T: products of all rows of a with all rows of b."""
    return add_product(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], HEAD.ACC), HEAD)


@triton.jit
def finite_or_zero(v):
    """-inf, of a row without any key, becomes 0, so that exp2(-inf - v) is 0."""
    return tl.where(v == -float("inf"), 0.0, v)
