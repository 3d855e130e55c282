"""Memory layout of the big tensors: how the kernels see them, and how results are allocated.

Kernels see `[N, C, P]` with `P = H * W`. One of C and P is dense (the inner axis: P in nchw, C in nhwc), the other
one and N have free strides, so that slices and expanded tensors are read without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """Where the elements of x `[N, C, H, W]` lie, and what results in the same layout look like."""

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
    def align(self) -> int:
        """The power of two, at most 16, that divides the inner extent and both strides, and so every row's start."""
        bits = (self.C if self.channels_last else self.HW) | self.stride_n | self.stride_o | 16
        return bits & -bits

    def is_dense(self, t: torch.Tensor) -> bool:
        return t.is_contiguous(memory_format=self.memory_format)

    def dense(self, t: torch.Tensor) -> torch.Tensor:
        """t itself where it is dense in this layout, else a copy that is."""
        return t if self.is_dense(t) else t.contiguous(memory_format=self.memory_format)

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """A new dense tensor of x's shape and dtype."""
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=self.memory_format)


def canonical(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """x and its layout; x is copied only where neither C nor H * W is dense."""
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
    stride_p = stride_w if W > 1 else stride_h if H > 1 else C  # of one pixel any, and C keeps loads wide
    return x, Layout(N, C, H, W, channels_last, stride_n, stride_p if channels_last else stride_c, memory_format)


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """A weight's elements side by side, as kernels read them."""
    return None if t is None else t.contiguous()


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
