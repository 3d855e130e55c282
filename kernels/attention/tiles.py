"""Pieces of the attention kernels: tiles of queries, keys and values, and their products.

Scores are in powers of two: the scale is multiplied by log2(e), and so is the table of biases.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import next_power_of_2
from ..core.layout import accumulation_dtype
from ..core.product import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Head(NamedTuple):
    """What kernels know of a head when they are compiled."""

    SCALE: float
    D: int
    ALIGN: int  # the power of two, of 16 at most, that divides D and all strides
    BLOCK_D: int
    CHUNK: int  # channels that scores are summed over at a time, where registers do not hold all
    ACC: Any  # the dtype of sums
    DOT: Any  # what is multiplied, and how exactly
    PRECISION: str


class Rows(NamedTuple):
    """Rows of one head, [rows, D]."""

    ptr: Any
    at: Any  # which they are, [rows], and whether there are such; others are zeros
    there: Any
    stride: Any


def head(qkv: torch.Tensor, D: int, strides: tuple[int, ...], scale: float, **options: Any) -> Head:
    """Of D channels, which are next to each other.

    Args:
        options: DOT and PRECISION, as `_product.product` returns them, and CHUNK, if it is not all.
    """
    bits = D | 16
    for stride in strides:
        bits |= stride
    acc = tl.float64 if accumulation_dtype(qkv) == torch.float64 else tl.float32
    block_d = max(next_power_of_2(D), 16)
    return Head(SCALE=scale, D=D, ALIGN=bits & -bits, BLOCK_D=block_d, ACC=acc, **{"CHUNK": block_d, **options})


@triton.jit
def _tile(rows, D, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets, int64, and mask, [rows, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    offsets = tl.multiple_of(rows.at[:, None].to(tl.int64) * rows.stride + d[None, :], [1, ALIGN])
    return offsets, tl.max_constancy(rows.there[:, None] & (d < D)[None, :], [1, ALIGN])


@triton.jit
def load_rows(rows, HEAD: tl.constexpr):
    """[rows, BLOCK_D]."""
    return _load_chunk(rows, 0, HEAD, HEAD.BLOCK_D)


@triton.jit
def _load_chunk(rows, c, HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """Channels from c on, [rows, CHUNK]."""
    offsets, mask = _tile(rows, HEAD.D - c, HEAD.ALIGN, CHUNK)
    return tl.load(rows.ptr + c + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(rows, tile, HEAD: tl.constexpr):
    """Of tile [rows, BLOCK_D]."""
    offsets, mask = _tile(rows, HEAD.D, HEAD.ALIGN, HEAD.BLOCK_D)
    tl.store(rows.ptr + offsets, tile, mask=mask)


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
    DOT: tl.constexpr = HEAD.DOT  # Triton 3.6 passes no string on that is a field
    PRECISION: tl.constexpr = HEAD.PRECISION
    return dot(a, b, acc, DOT, PRECISION)


@triton.jit
def pairs(a_rows, a, b_rows, b, HEAD: tl.constexpr):
    """a b^T: products of all rows of a with all rows of b, which are loaded again where they are met in chunks."""
    found = tl.zeros([a.shape[0], b.shape[0]], HEAD.ACC)
    if HEAD.CHUNK < HEAD.BLOCK_D:
        for c in range(0, HEAD.D, HEAD.CHUNK):
            a_chunk = _load_chunk(a_rows, c, HEAD, HEAD.CHUNK)
            found = add_product(a_chunk, tl.trans(_load_chunk(b_rows, c, HEAD, HEAD.CHUNK)), found, HEAD)
    else:
        found = add_product(a, tl.trans(b), found, HEAD)
    return found


@triton.jit
def finite_or_zero(v):
    """-inf, of a row without any key, becomes 0, so that exp2(-inf - v) is 0."""
    return tl.where(v == -float("inf"), 0.0, v)
