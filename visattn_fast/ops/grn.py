"""Global response normalization: ``x (1 + weight n) + bias``, n the norm of each channel beside their mean.

The norms are saved for backward. The kernels move the bytes of x 3 times forward (read to pool, read to scale, write y)
and 5 times backward (read grad and x; read grad and x, write dx).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import flops
from .declare import composed_op
from .layout import accumulation_dtype, to_map
from .library import define
from .signature import MAP


def _factors(norm: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the response n of each channel and the factor of x, ``[N, C]``."""
    n = norm / (norm.mean(1, keepdim=True) + eps)
    return n, 1 + weight.to(norm.dtype) * n


def _grn_fwd_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    a = accumulation_dtype(x)
    norm = x.to(a).square().sum((2, 3)).sqrt()
    _, factor = _factors(norm, weight, eps)
    return to_map(x * factor[:, :, None, None] + bias.to(a)[:, None, None], x), norm


def _grn_bwd_reference(
    grad: Tensor, x: Tensor, weight: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, factor = _factors(norm, weight, eps)
    g = grad.to(norm.dtype)
    dot = (g * x).sum((2, 3))
    slope = _norm_gradient(dot * weight.to(norm.dtype), n, norm, eps)
    dx = g * factor[:, :, None, None] + x * slope[:, :, None, None]
    return to_map(dx, x), (dot * n).sum(0), g.sum((0, 2, 3))


def _norm_gradient(dn: Tensor, n: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Returns the gradient of the norms, divided by the norms; 0 for a channel that is zero everywhere."""
    mean = norm.mean(1, keepdim=True) + eps
    dnorm = (dn - (dn * n).mean(1, keepdim=True)) / mean
    return torch.where(norm == 0, 0.0, dnorm / norm)


_WEIGHTS = {"x": MAP, "weight": "C : floating", "bias": "C : floating", "eps": "0.."}
grn_fwd = define(
    "grn_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor norm)",
    "grn",
    _grn_fwd_reference,
    ("like x", "N C"),
    _WEIGHTS,
    flops_of=lambda *args: flops.count(reference.grn, *args),
)
grn_bwd = define(
    "grn_bwd(Tensor grad, Tensor x, Tensor weight, Tensor norm, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "grn",
    _grn_bwd_reference,
    ("like x", "C", "C"),
    {**{key: text for key, text in _WEIGHTS.items() if key != "bias"}, "grad": "like x", "norm": "N C"},
    gradients_of=("weight", "weight"),
    flops_of=lambda grad, x, weight, norm, eps: flops.count_gradient(reference.grn, (x, weight, weight, eps)),
)


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any) -> tuple[Tensor, ...]:
    x, weight, _ = tensors
    return grn_bwd(grad, x, weight, *small, *options)


GRN = composed_op("grn", grn_fwd, _gradients, reference.grn, over_positions=True)
