"""The two memory layouts, accumulation, and allocation of results, for fakes and reference implementations.

C++ and Triton launchers follow the same rules; the strides they return are held against the fakes by opcheck.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The dense format in which results for x come: channels_last if x's channels are dense and its planes are not."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    (_, _, height, width), (_, stride_c, stride_h, stride_w) = x.shape, x.stride()
    if (width == 1 or stride_w == 1) and (height == 1 or stride_h == width):
        return torch.contiguous_format
    return torch.channels_last if stride_c == 1 else torch.contiguous_format


def empty_map(x: Tensor) -> Tensor:
    """An uninitialised map of x's shape, dtype and memory format."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are kept: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_small(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on x's device, in the accumulation dtype unless another is given."""
    return torch.empty(shape, dtype=dtype or accumulation_dtype(x), device=x.device)


def to_map(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in x's dtype and memory format, as a tensor of its own."""
    return empty_map(x).copy_(value)
