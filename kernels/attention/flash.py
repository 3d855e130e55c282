"""Attention over all positions of a map: pieces of its kernels, and how launchers prepare tensors for them.

Queries, keys and values lie side by side, qkv [N, L, 3, heads, d], with L positions of a map of width W. A program
works for one head of one image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import cdiv, next_power_of_2, registers_for
from ..core.layout import accumulation_dtype
from ..core.product import product
from .tiles import LOG2E, Head, head, table_index

WIDEST_HEAD = 128


class FlashSizes(NamedTuple):
    """The sizes of qkv and of the table of biases [heads, rows, columns]; kernels get them as ``size``."""

    L: Any
    W: Any
    heads: Any
    stride_n: Any  # of an image, a position, a third, a head
    stride_l: Any
    stride_t: Any
    stride_h: Any
    centre: Any  # the index of offset 0, 0 in the table
    columns: Any
    offsets: Any  # of a head


@triton.jit
def program_head(size, BLOCK: tl.constexpr):
    """Returns this program's image (int64), head, and rows [BLOCK]; neighbours share a head, whose keys stay cached."""
    blocks = tl.cdiv(size.L, BLOCK)
    head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (head // size.heads).to(tl.int64), head % size.heads, rows


@triton.jit
def keys_seen(mask_ptr, j, n, size):
    """Returns which of keys j [rows] exist and, if there is a mask, are left by it."""
    seen = j < size.L
    if mask_ptr is not None:
        seen &= tl.load(mask_ptr + n * size.L + j, mask=seen, other=0) != 0
    return seen


@triton.jit
def offset_bias(table_ptr, offsets, mask):
    """Returns the bias at offsets from table_ptr; 0 without a table."""
    bias = 0.0
    if table_ptr is not None:
        bias = tl.load(table_ptr + offsets, mask=mask, other=0.0)
    return bias


@triton.jit
def pair_bias(table_ptr, h, i, j, exists_i, exists_j, size, KEYS_FIRST: tl.constexpr = False):
    """Returns the bias of queries i and keys j of head h, [queries, keys], or [keys, queries]."""
    if table_ptr is not None:
        table_ptr += h * size.offsets + size.centre
    at_i, at_j = table_index(i, size.W, size.columns), table_index(j, size.W, size.columns)
    if KEYS_FIRST:
        offsets, mask = at_i[None, :] - at_j[:, None], exists_i[None, :] & exists_j[:, None]
    else:
        offsets, mask = at_i[:, None] - at_j[None, :], exists_i[:, None] & exists_j[None, :]
    return offset_bias(table_ptr, offsets, mask)


@triton.jit
def scores(s, bias, seen, HEAD: tl.constexpr):
    """Returns SCALE s + bias; -inf for keys that are not seen."""
    return tl.where(seen, s * (HEAD.SCALE * LOG2E) + bias, -float("inf"))


class FlashMaps(NamedTuple):
    """qkv and the table as the kernels take them."""

    qkv: torch.Tensor
    table: torch.Tensor | None  # [heads, rows, columns], times log2(e)
    N: int
    size: FlashSizes
    head: Head

    @property
    def wide(self) -> bool:
        """True if a number has more than 16 bits."""
        return self.qkv.itemsize > 2

    @property
    def biased(self) -> bool:
        return self.table is not None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.qkv, self.table

    def blocks(self, block: int, step: int, warps: int, stages: int) -> dict[str, Any]:
        """Returns a kernel's BLOCK rows of its own, its STEP rows that these meet at a time, and options.

        A block has no more rows than a map, a step no more than half as many: that saves registers on small maps.
        Triton's interpreter, on a CPU, has no registers to fill.
        """
        rows = max(next_power_of_2(self.size.L), 16)
        block, step = (64, 64) if self.qkv.is_cpu else (block, min(step, max(rows // 2, 16)))
        warps = warps if rows > 32 else min(warps, 4)
        registers = registers_for(self.qkv, warps) if self.wide or self.head.ALIGN < 16 else {}
        blocks = {"BLOCK": min(block, rows), "STEP": min(step, rows)}
        return {**blocks, "num_warps": warps, "num_stages": stages, **registers}

    def programs(self, block: int) -> int:
        """Returns the programs: one for every block of every head of every image."""
        return self.N * self.size.heads * cdiv(self.size.L, block)


def prepare(qkv: torch.Tensor, table: torch.Tensor | None, scale: float) -> FlashMaps:
    """Prepares qkv `[N, H, W, 3, heads, d]`; copies it only if a head or the positions are not evenly spaced.

    Args:
        table: `[2H' - 1, 2W' - 1, heads]`.

    Raises:
        ValueError: heads of more than 128.
    """
    N, H, W, _, heads, D = qkv.shape
    if D > WIDEST_HEAD:
        raise ValueError(f"the Triton kernels are for heads of up to {WIDEST_HEAD}, got {D}")
    stride_n, stride_h, stride_w, stride_t, stride_head, stride_d = qkv.stride()
    if (stride_d != 1 and D > 1) or (H > 1 and W > 1 and stride_h != W * stride_w):
        return prepare(
            qkv.clone(memory_format=torch.contiguous_format), table, scale
        )  # sets an empty one's strides, too
    strides = (stride_n, stride_w if W > 1 else stride_h, stride_t, stride_head)
    scaled, offsets = None, (0, 0, 0)
    if table is not None:
        rows, columns, _ = table.shape
        scaled = (table.to(accumulation_dtype(table)) * LOG2E.value).permute(2, 0, 1).contiguous()
        offsets = (rows // 2 * columns + columns // 2, columns, rows * columns)
    size = FlashSizes(H * W, W, heads, *strides, *offsets)
    options = product(qkv, qkv)._asdict()
    if qkv.itemsize > 2 and (D > 64 or (D > 32 and D % 32)):
        # Registers do not hold all of two tiles, let alone their parts in bfloat16.
        options["CHUNK"] = 16 if D % 32 else 32
    return FlashMaps(qkv, scaled, N, size, head(qkv, D, strides, scale, **options))


def mask_bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the mask [N, L] as bytes."""
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)
