"""Pieces of the attention kernels: tiles of queries, keys and values, and their products.

Scores are exponents of two: the scale and the table of biases are multiplied by log2(e).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import next_power_of_2
from ..core.layout import accumulation_dtype
from ..core.product import add_product

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Head(NamedTuple):
    """A head as kernels know it when they are compiled, as ``HEAD``; has the fields of `product.Product`."""

    SCALE: float
    D: int
    ALIGN: int  # the largest power of two up to 16 that divides D and all strides
    BLOCK_D: int
    CHUNK: int  # channels that scores are summed over at a time, if registers do not hold all
    ACC: Any  # the dtype of sums
    DOT: Any
    PRECISION: str


class Rows(NamedTuple):
    """Rows of one head, [rows, D]."""

    ptr: Any
    at: Any  # their indices, [rows]
    exists: Any  # [rows]; the other rows are loaded as zeros
    stride: Any


def head(qkv: torch.Tensor, D: int, strides: tuple[int, ...], scale: float, **options: Any) -> Head:
    """Returns a head of D channels, which lie side by side.

    Args:
        options: DOT and PRECISION, as `product.product` returns them, and CHUNK, if it is not all.
    """
    bits = D | 16
    for stride in strides:
        bits |= stride
    acc = tl.float64 if accumulation_dtype(qkv) == torch.float64 else tl.float32
    block_d = max(next_power_of_2(D), 16)
    return Head(SCALE=scale, D=D, ALIGN=bits & -bits, BLOCK_D=block_d, ACC=acc, **{"CHUNK": block_d, **options})


@triton.jit
def _tile(rows, D, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns offsets, int64, and their mask, [rows, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    offsets = tl.multiple_of(rows.at[:, None].to(tl.int64) * rows.stride + d[None, :], [1, ALIGN])
    return offsets, tl.max_constancy(rows.exists[:, None] & (d < D)[None, :], [1, ALIGN])


@triton.jit
def load_rows(rows, HEAD: tl.constexpr):
    """Loads rows, [rows, BLOCK_D]."""
    return _load_chunk(rows, 0, HEAD, HEAD.BLOCK_D)


@triton.jit
def _load_chunk(rows, c, HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """Loads channels from c on, [rows, CHUNK]."""
    offsets, mask = _tile(rows, HEAD.D - c, HEAD.ALIGN, CHUNK)
    return tl.load(rows.ptr + c + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(rows, tile, HEAD: tl.constexpr):
    """Stores a tile [rows, BLOCK_D]."""
    offsets, mask = _tile(rows, HEAD.D, HEAD.ALIGN, HEAD.BLOCK_D)
    tl.store(rows.ptr + offsets, tile, mask=mask)


@triton.jit
def zero_rows(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Returns zeros [ROWS, BLOCK_D] in the dtype of sums."""
    BLOCK_D: tl.constexpr = HEAD.BLOCK_D  # a list accepts no field
    return tl.zeros([ROWS, BLOCK_D], HEAD.ACC)


@triton.jit
def table_index(rows, W, COLUMNS):
    """Returns the index of positions in the table; the difference of two indices is that of their offset."""
    return (rows // W) * COLUMNS + rows % W


@triton.jit
def pairs(a_rows, a, b_rows, b, HEAD: tl.constexpr):
    """Returns a b^T, the products of all rows of a and b; rows are loaded again if they are multiplied in chunks."""
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
    """Returns v with 0 for -inf, the maximum of a row without any key, so that exp2(-inf - v) is 0."""
    return tl.where(v == -float("inf"), 0.0, v)
