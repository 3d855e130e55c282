"""Memory layout of maps: how kernels see x, and how results are allocated.

Kernels see `[N, C, P]` with `P = H * W`. One of C and P is dense, the inner axis: P in nchw, C in channels_last. The
other one and N have any stride, so slices and expanded tensors are read without a copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class MapSizes(NamedTuple):
    """The sizes and strides of x `[N, C, HW]` that kernels get when they run, as one argument."""

    C: Any
    HW: Any
    stride_n: Any
    stride_o: Any  # of the outer axis


class Layout(NamedTuple):
    """Where the elements of x `[N, C, H, W]` lie, and how to allocate results in the same layout."""

    N: int
    C: int
    H: int
    W: int
    channels_last: bool  # inner axis: C if true, else P
    stride_n: int
    stride_o: int  # of the outer axis
    memory_format: torch.memory_format

    @property
    def HW(self) -> int:
        return self.H * self.W

    @property
    def sizes(self) -> MapSizes:
        return MapSizes(self.C, self.HW, self.stride_n, self.stride_o)

    @property
    def align(self) -> int:
        """The largest power of two up to 16 that divides the inner extent and both strides, so every row's start."""
        bits = (self.C if self.channels_last else self.HW) | self.stride_n | self.stride_o | 16
        return bits & -bits

    def is_dense(self, t: torch.Tensor) -> bool:
        return t.is_contiguous(memory_format=self.memory_format)

    def dense(self, t: torch.Tensor) -> torch.Tensor:
        """Returns t, or a copy of it if it is not dense in this layout."""
        return t if self.is_dense(t) else t.contiguous(memory_format=self.memory_format)

    def dense_or_none(self, t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else self.dense(t)

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """Allocates a dense tensor of x's shape and dtype."""
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=self.memory_format)

    def empty_dresidual(self, x: torch.Tensor, activation: int) -> torch.Tensor:
        """Allocates the residual's gradient; empty without an activation, because it is then the output's gradient."""
        return self.empty(x) if activation else x.new_empty((0,))


def canonical(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """Returns x and its layout; copies x only if neither C nor H * W is dense."""
    N, C, H, W = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if x.is_contiguous():
        channels_last = False
    elif x.is_contiguous(memory_format=torch.channels_last):
        channels_last = True
    elif (W == 1 or stride_w == 1) and (H == 1 or stride_h == W):
        channels_last = False
    elif stride_c == 1 and (H == 1 or W == 1 or stride_h == W * stride_w):
        channels_last = True
    else:
        memory_format = torch.channels_last if stride_c == 1 else torch.contiguous_format
        return canonical(x.contiguous(memory_format=memory_format))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    # A 1x1 map is dense in both layouts, but only C is long enough for wide loads.
    channels_last = channels_last or (H * W == 1 and stride_c == 1)
    stride_p = stride_w if W > 1 else stride_h if H > 1 else C  # one pixel has any stride; C keeps loads wide
    return x, Layout(N, C, H, W, channels_last, stride_n, stride_p if channels_last else stride_c, memory_format)


def canonical_dense(x: torch.Tensor, *others: torch.Tensor) -> tuple[Layout, list[torch.Tensor]]:
    """Returns the layout of dense x, and all tensors dense in it; copies only those that are not."""
    _, layout = canonical(x)
    x, layout = canonical(layout.dense(x))
    return layout, [x, *map(layout.dense, others)]


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a weight's elements side by side, as kernels read them."""
    return None if t is None else t.contiguous()


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
