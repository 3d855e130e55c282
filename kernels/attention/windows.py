"""Attention inside (shifted) windows: how launchers prepare tensors and geometry for its kernels."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..core.heuristics import cdiv, next_power_of_2, registers_for
from ..core.layout import accumulation_dtype
from ..core.product import product
from .tiles import LOG2E, Head, head
from .window_tiles import Grid, Window

WHOLE = 64  # most tokens of a window whose rows of weights fit on the chip
LARGEST = 256  # most tokens of a window that the kernels hold
PROGRAMS = 512  # the least number of programs, if there are so many windows
MOST_WINDOWS = 8  # the most windows that a program takes one after the other


class Windows(NamedTuple):
    """The windows of qkv as the kernels take them."""

    qkv: torch.Tensor
    bias: torch.Tensor | None  # [3 C]
    table: torch.Tensor  # [heads, T], times log2(e)
    window: Window
    shift: tuple[int, int]
    head: Head

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.qkv, self.bias, self.table

    def tiles(self, block: int, step: int, warps: int, **more: Any) -> tuple[dict[str, Any], int]:
        """Returns a kernel's keywords for tiles of at most ``block`` tokens, and the number of such tiles in a window.

        Args:
            step: tokens that are met at a time; 0 for a kernel that meets all at once.
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
        """Tokens of a window."""
        return self.window.H * self.window.W

    @property
    def wide(self) -> bool:
        """True if a number has more than 16 bits."""
        return self.qkv.itemsize > 2

    def shared(self, tiles: int = 1) -> tuple[int, Grid]:
        """Returns the number of groups that share the windows, and their geometry.

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
        grid = Grid(
            steps=steps,
            heads=self.heads,
            N=N,
            down=down,
            across=across,
            inner_h=inner_h,
            inner_w=inner_w,
            start_1=start_1,
            start_2=start_2,
            start_3=start_3,
            shift_h=shift_h,
            shift_w=shift_w,
            H=H,
            W=W,
            cycle_h=cycle_h,
            cycle_w=cycle_w,
            roll_h=shift_h % cycle_h,
            roll_w=shift_w % cycle_w,
        )
        return groups, grid


def prepare(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: int,
) -> Windows:
    """Prepares qkv `[N, H, W, 3 C]`; raises ValueError for windows of more than 256 tokens."""
    if window_h * window_w > LARGEST:
        raise ValueError(f"the Triton kernels are for windows of up to {LARGEST} tokens, got {window_h} x {window_w}")
    D, options = qkv.shape[3] // 3 // heads, product(qkv, qkv)._asdict()
    if qkv.dtype == torch.float32:
        options["PRECISION"] = "ieee"  # registers do not hold the parts in bfloat16
    if qkv.itemsize > 2 and D > 32:
        options["CHUNK"] = 32  # registers do not hold all channels of two tiles
    return Windows(
        qkv.contiguous(),
        None if bias is None else bias.to(qkv.dtype).contiguous(),  # a wider one takes too many registers
        (table.to(accumulation_dtype(qkv)) * LOG2E.value).t().contiguous(),
        Window(window_h, window_w, bool(pad_first), shift_h > 0 or shift_w > 0),
        (shift_h, shift_w),
        head(qkv, D, (), scale, **options),
    )
