"""Feature maps as token grids, whose gradients come in the memory format of the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autograd import run
from ._layout import memory_format


class _TokensFunction(torch.autograd.Function):
    """A copy of an NCHW map as ``[N, H, W, C]``. Autograd by itself would return a gradient in channels_last."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor]:
        return (x.permute(0, 2, 3, 1).contiguous(),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.permute(0, 3, 1, 2).contiguous()


def tokens(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` -> ``[N, H, W, C]``: a view of a map in channels_last, a copy of one in NCHW."""
    if memory_format(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1)
    return run(_TokensFunction, x)[0]


def from_tokens(y: Tensor, x: Tensor) -> Tensor:
    """``[N, H, W, C]`` -> ``[N, C, H, W]`` in x's memory format."""
    return y.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))
