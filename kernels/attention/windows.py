"""What the launchers of attention inside (shifted) windows make of tensors and geometry."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..core.heuristics import cdiv, next_power_of_2, registers_for
from ..core.layout import accumulation_dtype
from ..core.product import product
from .tiles import LOG2E, Head, head
from .window_tiles import Grid, Window

WHOLE = 64  # tokens of a window, at most, whose rows of weights fit on the chip
LARGEST = 256  # tokens of a window that the kernels hold
PROGRAMS = 512  # at least, where there are so many windows
MOST_WINDOWS = 8  # that a program takes one after the other


class Windows(NamedTuple):
    """The windows of qkv as the kernels see them."""

    qkv: torch.Tensor
    bias: torch.Tensor | None
    table: torch.Tensor  # [heads, T], times log2(e)
    window: Window
    shift: tuple[int, int]
    head: Head

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.qkv, self.bias, self.table

    def tiles(self, block: int, step: int, warps: int, **more: Any) -> tuple[dict[str, Any], int]:
        """What a kernel takes for tiles of at most so many tokens, and how many of ``block`` are in a window.

        Args:
            step: tokens that are met at a time; 0 of a kernel that meets all at once.
        """
        tokens = max(next_power_of_2(self.tokens), 16)
        block, met = min(block, tokens), {"STEP": min(step, tokens)} if step else {}
        meta = {"HEAD": self.head, "WINDOW": self.window, "BLOCK": block, **met, **more}
        registers = registers_for(self.qkv, warps) if self.wide or self.head.D > 32 or self.tokens > WHOLE else {}
        return {**meta, **registers, "num_warps": warps, "num_stages": 1}, cdiv(self.tokens, block)

    @property
    def heads(self) -> int:
        return self.table.shape[0]

    @property
    def tokens(self) -> int:
        """Of a window."""
        return self.window.H * self.window.W

    @property
    def wide(self) -> bool:
        """Whether a number has more than 16 bits."""
        return self.qkv.itemsize > 2

    def shared(self, tiles: int = 1) -> tuple[int, Grid]:
        """Among how many groups of programs.

        Args:
            tiles: programs that share a group's windows and head; each may take more windows.
        """
        N, H, W, _ = self.qkv.shape
        window, (shift_h, shift_w) = self.window, self.shift
        down, across = cdiv(H, window.H), cdiv(W, window.W)
        steps = max(min(N * down * across * self.heads * tiles // PROGRAMS, MOST_WINDOWS * tiles), 1)
        inner_h, inner_w = down - (shift_h > 0), across - (shift_w > 0)
        last_h, last_w = down - inner_h, across - inner_w
        kinds = ((inner_h, inner_w), (last_h, inner_w), (inner_h, last_w), (last_h, last_w))
        start_1, start_2, start_3, groups = accumulate(cdiv(N * h * w, steps) for h, w in kinds)
        cycle_h, cycle_w = (down * window.H, across * window.W) if window.PAD_FIRST else (H, W)
        return groups, Grid(
            steps, self.heads, N, down, across, inner_h, inner_w, start_1, start_2, start_3,
            shift_h, shift_w, H, W, cycle_h, cycle_w, shift_h % cycle_h, shift_w % cycle_w,
        )  # fmt: skip


def prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first) -> Windows:
    """Raises ValueError for windows of more than 256 tokens."""
    if window_h * window_w > LARGEST:
        raise ValueError(f"the Triton kernels are for windows of up to {LARGEST} tokens, got {window_h} x {window_w}")
    D, options = qkv.shape[3] // 3 // heads, product(qkv, qkv)
    if qkv.dtype == torch.float32:
        options["PRECISION"] = "ieee"  # bfloat16 parts are more than registers hold
    if qkv.itemsize > 2 and D > 32:
        options["CHUNK"] = 32  # as all channels of two tiles are
    return Windows(
        qkv.contiguous(),
        None if bias is None else bias.to(qkv.dtype).contiguous(),  # wider it takes too many registers
        (table.to(accumulation_dtype(qkv)) * LOG2E.value).t().contiguous(),
        Window(window_h, window_w, bool(pad_first), shift_h > 0 or shift_w > 0),
        (shift_h, shift_w),
        head(qkv, D, (), scale, **options),
    )
