"""Normalization-based attention: ``x * sigmoid(bn(x) * share)`` with ``share = abs(weight) / sum(abs(weight))``.

Given statistics are arguments; the batch's own are only results. Both are saved for backward. The Triton kernels move
the bytes of x 3 times forward and 5 times backward (2 and 3 with given statistics).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .declare import gate_op
from .epilogue import finish, residual_gradient, start_backward
from .layout import accumulation_dtype, to_map
from .self_gate import Coefficients, deviation_and_gate, fixed_or_batch_statistics, input_gradient, logit_gradient


def share_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``abs(weight) / sum(abs(weight))``, without its gradient."""
    share = weight.detach().to(dtype).abs()
    return share / share.sum()


def _coefficients(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Coefficients:
    dtype = accumulation_dtype(x)
    share = share_of(weight, dtype)
    return Coefficients(mean, a=weight.to(dtype) * share * (var + eps).rsqrt(), b=bias.to(dtype) * share)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    activation: int,
    eps: float,
) -> tuple[Tensor, ...]:
    mean, var = fixed_or_batch_statistics(x, mean, var)
    _, gate = deviation_and_gate(x, _coefficients(x, weight, bias, mean, var, eps))
    return finish(x, gate, residual, activation), mean, var


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation: int,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, ...]:
    k = _coefficients(x, weight, bias, mean, var, eps)
    d, gate = deviation_and_gate(x, k)
    grad = start_backward(grad, x, gate, residual, activation)
    r = logit_gradient(grad, x, gate)
    sum_r, sum_rd = r.sum((0, 2, 3)), (r * d).sum((0, 2, 3))
    share, rstd = share_of(weight, mean.dtype), (var + eps).rsqrt()
    count = max(x.numel() // x.shape[1], 1)
    u = 0.0 if fixed else -k.a * rstd.square() * sum_rd / count
    v = 0.0 if fixed else -k.a * sum_r / count
    dx = to_map(input_gradient(grad, gate, d, r, k, u, v), x)
    return dx, residual_gradient(grad, x, activation), share * rstd * sum_rd, share * sum_r


def _mathematics(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> Tensor:
    return reference.nam(x, weight, bias, mean, var, training=mean is None, momentum=0.0, eps=eps)


NAM = gate_op(
    "nam",
    weights={"weight": "C", "bias": "C", "mean": "C or None", "var": "C or None"},
    statistics=("mean", "var"),
    options="float eps",
    ranges={"eps": "0.."},
    backward_options="float eps, bool fixed",
    derived={"fixed": lambda given: given["mean"] is not None},
    saves={"mean": "C", "var": "C"},
    forward=_forward,
    backward=_backward,
    mathematics=_mathematics,
    tiny=196,
)
