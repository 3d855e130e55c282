"""The epilogue ``act(gated + residual)`` and its derivative, for reference implementations and double backward.

In all ops ``activation`` is a code, an index into ACTIVATIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..reference import epilogue
from ..reference.checks import ACTIVATIONS
from .autograd import mixed
from .layout import accumulation_dtype, empty_map, empty_small, to_map


def finish(x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    """Returns ``act(x * gate + residual)`` in x's dtype and memory format. The gate broadcasts to x."""
    return to_map(epilogue(x * gate.to(accumulation_dtype(x)), residual, ACTIVATIONS[activation]), x)


def start_backward(grad: Tensor, x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    """Returns the gradient before the activation, in the accumulation dtype, from the gradient of the result."""
    grad = grad.to(accumulation_dtype(x))
    if activation == 0:
        return grad
    return activation_gradient(grad, epilogue(x * gate.to(accumulation_dtype(x)), residual), activation)


def activation_gradient(grad: Tensor, pre: Tensor, activation: int) -> Tensor:
    """Returns ``grad * act'(pre)`` for ReLU and SiLU."""
    if activation == 1:
        return torch.where(pre <= 0, 0.0, grad)
    s = torch.sigmoid(pre)
    return grad * s * (1 + pre * (1 - s))


def residual_gradient(grad: Tensor, x: Tensor, activation: int) -> Tensor:
    """Converts `start_backward`'s gradient to the result of an op: empty without an activation, when it equals grad."""
    return empty_small(x, 0, dtype=x.dtype) if activation == 0 else to_map(grad, x)


def residual_gradient_shape(given: Mapping[str, Any]) -> Tensor:
    """Allocates the result of `residual_gradient`, from the op's arguments by name: its declared shape."""
    x = given["x"]
    return empty_small(x, 0, dtype=x.dtype) if given["activation"] == 0 else empty_map(x)


def with_epilogue(mathematics: Callable[..., Tensor], options: int = 0) -> Callable[..., Tensor]:
    """Adds the epilogue to the mathematics of a gate.

    Args:
        mathematics: ``(x, *weights, *options) -> y``.
        options: the number of options.

    Returns:
        ``(x, *weights, residual, activation, *options) -> y``, in the ops' order of arguments.
    """

    def gated(*args: Any) -> Tensor:
        *tensors, residual, activation = args[: len(args) - options]
        y = mixed(mathematics, *tensors, *args[len(args) - options :])
        return epilogue(y, residual, ACTIVATIONS[activation])

    return gated
