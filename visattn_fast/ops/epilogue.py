"""The epilogue ``act(gated + residual)`` and its derivative, for reference implementations and double backward.

``activation`` is an index into ACTIVATIONS throughout the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..reference import epilogue
from ..reference.checks import ACTIVATIONS
from .autograd import mixed
from .layout import accumulation_dtype, empty_map, to_map


def finish(x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    """``act(x * gate + residual)`` for a gate that broadcasts to x, in x's dtype and memory format."""
    return to_map(epilogue(x * gate.to(accumulation_dtype(x)), residual, ACTIVATIONS[activation]), x)


def start_backward(grad: Tensor, x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    """Gradient of ``x * gate + residual``, in accumulation precision, from that of ``act(x * gate + residual)``."""
    grad = grad.to(accumulation_dtype(x))
    if activation == 0:
        return grad
    return activation_gradient(grad, epilogue(x * gate.to(accumulation_dtype(x)), residual), activation)


def activation_gradient(grad: Tensor, pre: Tensor, activation: int) -> Tensor:
    """``grad * act'(pre)``, for ReLU and SiLU."""
    if activation == 1:
        return torch.where(pre <= 0, 0.0, grad)
    s = torch.sigmoid(pre)
    return grad * s * (1 + pre * (1 - s))


def residual_gradient(grad: Tensor, x: Tensor, activation: int) -> Tensor:
    """`start_backward`'s gradient as ops return it: empty where no activation has changed it."""
    return x.new_empty(0) if activation == 0 else to_map(grad, x)


def residual_gradient_shape(given: Mapping[str, Any]) -> Tensor:
    """The declared shape of `residual_gradient`, from an op's arguments by name."""
    return given["x"].new_empty(0) if given["activation"] == 0 else empty_map(given["x"])


def with_epilogue(mathematics: Callable[..., Tensor], options: int = 0) -> Callable[..., Tensor]:
    """The mathematics of a gate, ``(x, *weights, *options) -> y``, followed by the epilogue.

    Returns:
        ``(x, *weights, residual, activation, *options) -> y``, as the ops order their arguments.
    """

    def gated(*args: Any) -> Tensor:
        *tensors, residual, activation = args[: len(args) - options]
        y = mixed(mathematics, *tensors, *args[len(args) - options :])
        return epilogue(y, residual, ACTIVATIONS[activation])

    return gated
