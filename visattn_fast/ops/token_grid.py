"""Maps as dense tokens. Gradients come back in the map's memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import call_function, is_batched
from .layout import memory_format


class _TokenGridFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor]:
        return (x.permute(0, 2, 3, 1).contiguous(),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.format = memory_format(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        dx = grad.permute(0, 3, 1, 2)
        return dx if is_batched(grad) else dx.contiguous(memory_format=ctx.format)  # a batch takes no memory format


def token_grid(x: Tensor) -> Tensor:
    """Converts ``[N, C, H, W]`` to dense tokens ``[N, H, W, C]``, without a copy if x is in channels_last."""
    return call_function(_TokenGridFunction, x)[0]


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Returns the map y, dense in x's memory format."""
    return y.contiguous(memory_format=memory_format(x))
