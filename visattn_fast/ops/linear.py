"""The linear layer of tokens, by oneDNN where it is faster than PyTorch's own choice.

PyTorch multiplies float32 matrices with MKL. On AMD's processors oneDNN is faster for large products of tokens and a
weight, but not for products of tokens and gradients, which give the weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .autograd import call_function
from .layout import empty_small
from .library import define

_SMALL = 1 << 24  # multiplications; below, preparing oneDNN's product costs more than it saves


def _onednn_serves(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    suits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    return suits and bool(torch.backends.mkldnn.enabled)


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0 or weight.numel() == 0 or not _onednn_serves(x, weight, bias):
        return functional.linear(x, weight, bias).contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _rows(x: Tensor, width: int) -> Tensor:
    """Allocates rows of another width than those of x."""
    return empty_small(x, *x.shape[:-1], width, dtype=x.dtype)


linear_fwd = define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    None,
    _linear_reference,
    (lambda given: _rows(given["x"], given["weight"].shape[0]),),
    {"x": "* K : floating strided", "weight": "M K : x strided", "bias": "M : x"},
)


class LinearFunction(torch.autograd.Function):
    """Autograd node of `linear`. Its backward is made of differentiable operations: PyTorch derives higher orders."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (linear_fwd(x, weight, bias),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ weight.T + bias`` for tokens ``[..., K]`` and a weight ``[M, K]``.

    oneDNN serves large float32 products on CPUs, outside of autocast; `torch.nn.functional.linear` all others.
    """
    if not _worthwhile(x, weight) or not _onednn_serves(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    return call_function(LinearFunction, x, weight, bias)[0]


def _worthwhile(x: Tensor, weight: Tensor) -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and (
        torch.compiler.is_compiling() or x.numel() * weight.shape[0] >= _SMALL
    )
