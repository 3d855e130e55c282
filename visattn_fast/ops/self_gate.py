"""Gates that each element computes of itself and of its channel, in plain PyTorch and accumulation precision.

``y = x * sigmoid((q d + a) d + b)`` with ``d = x - m``: a module brings m, q, a and b as functions of the channel's
mean and of its second moment, the sum of ``(x - mean)^2``. Backward it turns the sums of r, r d and r d^2, where r is
the gradient before the sigmoid, into the gradients of its parameters and the line ``u d + v`` that the statistics add
to dx.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import accumulation_dtype


class Coefficients(NamedTuple):
    """Of ``d = x - m`` and of the logit ``(q d + a) d + b``; each ``[N, C]``, ``[C]`` or a number."""

    m: Tensor
    q: Tensor | float = 0.0
    a: Tensor | float = 0.0
    b: Tensor | float = 0.0


def over_pixels(value: Tensor | float) -> Tensor | float:
    """``[N, C]`` or ``[C]``, to broadcast over ``[N, C, H, W]``."""
    return value[..., None, None] if isinstance(value, Tensor) else value


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and second moment over ``dims``."""
    wide = x.to(accumulation_dtype(x))
    mean = wide.mean(dims, keepdim=True)
    return mean.squeeze(dims), (wide - mean).square().sum(dims)


def fixed_or_batch_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a batch norm of x takes, new tensors ``[C]``: copies of those given, else x's mean and biased variance."""
    dtype = accumulation_dtype(x)
    if mean is not None and var is not None:
        return mean.to(dtype, copy=True), var.to(dtype, copy=True)
    if not x.shape[0]:
        return x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    mean, second = moments(x, (0, 2, 3))
    return mean.clone(), second / (x.numel() // x.shape[1])


def deviation_and_gate(x: Tensor, k: Coefficients) -> tuple[Tensor, Tensor]:
    """d and ``sigmoid((q d + a) d + b)``, both ``[N, C, H, W]``."""
    m, q, a, b = map(over_pixels, k)
    d = x.to(accumulation_dtype(x)) - m
    slope = a if isinstance(q, float) and q == 0.0 else q * d + a  # 0 * inf is NaN
    return d, torch.sigmoid(slope * d + b)


def logit_gradient(grad: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """r, the gradient before the sigmoid."""
    return grad * x * gate * (1 - gate)


def input_gradient(
    grad: Tensor, gate: Tensor | float, d: Tensor, r: Tensor, k: Coefficients, u: Tensor | float, v: Tensor | float
) -> Tensor:
    """``dx = grad gate + r (2 q d + a) + u d + v``."""
    _, q, a, _ = map(over_pixels, k)
    return grad * gate + r * (2 * q * d + a) + over_pixels(u) * d + over_pixels(v)
