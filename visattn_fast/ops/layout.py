"""Memory layouts, accumulation dtypes and allocation of results, for fakes and reference implementations.

C++ and Triton launchers follow the same rules; opcheck compares the strides of their results with the fakes'. Ops call
no ``x.new_empty`` and its like: subclasses of tensors override these methods with narrower arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FEW = 1 << 16  # elements; converting fewer takes less time than launching a kernel for it


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results for x: channels_last if x's channels are dense and its planes are not, else NCHW."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    (_, _, height, width), (_, stride_c, stride_h, stride_w) = x.shape, x.stride()
    if (width == 1 or stride_w == 1) and (height == 1 or stride_h == width):
        return torch.contiguous_format
    return torch.channels_last if stride_c == 1 else torch.contiguous_format


def empty_map(x: Tensor) -> Tensor:
    """Allocates a map with x's shape, dtype and memory format."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_small(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocates a contiguous tensor on x's device, in the accumulation dtype unless ``dtype`` is given."""
    return torch.empty(shape, dtype=dtype or accumulation_dtype(x), device=x.device)


def zeros_small(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Does what `empty_small` does, and fills the tensor with zeros."""
    return torch.zeros(shape, dtype=dtype or accumulation_dtype(x), device=x.device)


def as_matrices(dtype: torch.dtype, *weights: Tensor | None) -> list[Any]:
    """Converts weights to ``dtype``, and those of 1x1 convolutions to ``[R, C]``. None stays None."""
    return [None if t is None else (t.flatten(1) if t.dim() > 1 else t).to(dtype) for t in weights]


def to_map(value: Tensor, x: Tensor) -> Tensor:
    """Copies ``value`` to a new tensor with x's dtype and memory format."""
    return empty_map(x).copy_(value)


def converted(tensors: Iterable[Tensor | None], dtypes: Iterable[torch.dtype | None]) -> list[Any]:
    """Converts each tensor to its dtype; several small ones together, because on a GPU each launch costs the most."""
    found: list[Any] = list(tensors)
    groups: dict[Any, list[int]] = {}
    for i, (t, dtype) in enumerate(zip(found, dtypes, strict=True)):
        if t is not None and dtype not in (None, t.dtype):
            groups.setdefault((t.dtype, dtype, t.numel() <= _FEW), []).append(i)
    for (_, dtype, few), members in groups.items():
        old = [found[i] for i in members]
        if few and len(old) > 2 and not torch.compiler.is_compiling():
            new = torch.cat([t.flatten() for t in old]).to(dtype).split([t.numel() for t in old])
        else:
            new = tuple(t.to(dtype) for t in old)
        for i, t, part in zip(members, old, new, strict=True):
            found[i] = part.view(t.shape)
    return found
