"""A map scaled by the sigmoid of another map's batch norm: ``x * sigmoid(bn(m))``.

Given statistics are arguments; the batch's own are only results. Both are saved for backward. The Triton kernels move
the bytes of x 4 times forward and 8 times backward (3 and 5 with given statistics).
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .declare import gate_op
from .epilogue import finish, residual_gradient, start_backward
from .layout import accumulation_dtype, to_map
from .self_gate import Coefficients, deviation_and_gate, fixed_or_batch_statistics, input_gradient, logit_gradient


def _coefficients(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Coefficients:
    dtype = accumulation_dtype(x)
    return Coefficients(mean, a=weight.to(dtype) * (var + eps).rsqrt(), b=bias.to(dtype))


def _forward(
    x: Tensor,
    m: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    activation: int,
    eps: float,
) -> tuple[Tensor, ...]:
    mean, var = fixed_or_batch_statistics(m, mean, var)
    _, gate = deviation_and_gate(m, _coefficients(x, weight, bias, mean, var, eps))
    return finish(x, gate, residual, activation), mean, var


def _backward(
    grad: Tensor,
    x: Tensor,
    m: Tensor,
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
    d, gate = deviation_and_gate(m, k)
    grad = start_backward(grad, x, gate, residual, activation)
    r = logit_gradient(grad, x, gate)
    sum_r, sum_rd = r.sum((0, 2, 3)), (r * d).sum((0, 2, 3))
    rstd, count = (var + eps).rsqrt(), max(x.numel() // x.shape[1], 1)
    u = 0.0 if fixed else -k.a * rstd.square() * sum_rd / count
    v = 0.0 if fixed else -k.a * sum_r / count
    dm = to_map(input_gradient(grad, 0.0, d, r, k, u, v), x)
    return to_map(grad * gate, x), dm, residual_gradient(grad, x, activation), rstd * sum_rd, sum_r


def _mathematics(
    x: Tensor, m: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> Tensor:
    return reference.norm_gate(x, m, weight, bias, mean, var, training=mean is None, momentum=0.0, eps=eps)


# m has x's shape and dtype; maps that are results have x's memory format.
NORM_GATE = gate_op(
    "norm_gate",
    weights={"m": "like x", "weight": "C", "bias": "C", "mean": "C or None", "var": "C or None"},
    statistics=("mean", "var"),
    options="float eps",
    ranges={"eps": "0.."},
    backward_options="float eps, bool fixed",
    derived={"fixed": lambda given: given["mean"] is not None},
    saves={"mean": "C", "var": "C"},
    forward=_forward,
    backward=_backward,
    mathematics=_mathematics,
    tiny=49,
)
