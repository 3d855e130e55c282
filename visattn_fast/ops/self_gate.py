"""Self-gates: the gate of each element follows from the element and its channel's statistics. In plain PyTorch.

``y = x * sigmoid((q d + a) d + b)`` with ``d = x - m``, in the accumulation dtype. A module computes m, q, a and b from
the channel's mean and second moment, the sum of ``(x - mean)^2``. In backward, r is the gradient before the sigmoid.
From the sums of r, r d and r d^2 the module computes the gradients of its parameters and the line ``u d + v``, the
statistics' part of dx.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import accumulation_dtype, zeros_small


class Coefficients(NamedTuple):
    """Coefficients of ``d = x - m`` and the logit ``(q d + a) d + b``. Each is ``[N, C]``, ``[C]`` or a number."""

    m: Tensor
    q: Tensor | float = 0.0
    a: Tensor | float = 0.0
    b: Tensor | float = 0.0


def over_pixels(value: Tensor | float) -> Tensor | float:
    """Makes ``[N, C]`` or ``[C]`` broadcast over ``[N, C, H, W]``; numbers stay as they are."""
    return value[..., None, None] if isinstance(value, Tensor) else value


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns mean and second moment over ``dims``."""
    wide = x.to(accumulation_dtype(x))
    mean = wide.mean(dims, keepdim=True)
    return mean.squeeze(dims), (wide - mean).square().sum(dims)


def fixed_or_batch_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns mean and variance for a batch norm of x, ``[C]``: copies of those given, or x's own (biased)."""
    dtype = accumulation_dtype(x)
    if mean is not None and var is not None:
        return mean.to(dtype, copy=True), var.to(dtype, copy=True)
    if not x.shape[0]:
        return zeros_small(x, x.shape[1]), zeros_small(x, x.shape[1])
    mean, second = moments(x, (0, 2, 3))
    return mean.clone(), second / (x.numel() // x.shape[1])


def deviation_and_gate(x: Tensor, k: Coefficients) -> tuple[Tensor, Tensor]:
    """Returns d and the gate ``sigmoid((q d + a) d + b)``, both ``[N, C, H, W]``."""
    m, q, a, b = map(over_pixels, k)
    d = x.to(accumulation_dtype(x)) - m
    slope = a if isinstance(q, float) and q == 0.0 else q * d + a  # no q: 0 * inf would be NaN
    return d, torch.sigmoid(slope * d + b)


def logit_gradient(grad: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Returns r, the gradient before the sigmoid."""
    return grad * x * gate * (1 - gate)


def input_gradient(
    grad: Tensor, gate: Tensor | float, d: Tensor, r: Tensor, k: Coefficients, u: Tensor | float, v: Tensor | float
) -> Tensor:
    """Returns ``dx = grad gate + r (2 q d + a) + u d + v``."""
    _, q, a, _ = map(over_pixels, k)
    return grad * gate + r * (2 * q * d + a) + over_pixels(u) * d + over_pixels(v)
