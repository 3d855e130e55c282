"""A map scaled by the sigmoid of another one's batch norm: ops and autograd.

Given statistics are an argument of their own, else the batch's.
"""

from __future__ import annotations

from .. import reference
from .autograd import fused_function
from .epilogue import empty_residual_gradient, finish, residual_gradient, start_backward, with_epilogue
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define
from .self_gate import Coefficients, deviation_and_gate, fixed_or_batch_statistics, input_gradient, logit_gradient


def _coefficients(x, weight, bias, mean, var, eps):
    dtype = accumulation_dtype(x)
    return Coefficients(mean, a=weight.to(dtype) * (var + eps).rsqrt(), b=bias.to(dtype))


def _norm_gate_fwd_reference(x, m, weight, bias, mean, var, residual, activation, eps):
    mean, var = fixed_or_batch_statistics(m, mean, var)
    _, gate = deviation_and_gate(m, _coefficients(x, weight, bias, mean, var, eps))
    return finish(x, gate, residual, activation), mean, var


def _norm_gate_bwd_reference(grad, x, m, weight, bias, residual, mean, var, activation, eps, fixed):
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


def _norm_gate_fwd_fake(x, m, weight, bias, mean, var, residual, activation, eps):
    return empty_map(x), empty_small(x, x.shape[1]), empty_small(x, x.shape[1])


def _norm_gate_bwd_fake(grad, x, m, weight, bias, residual, mean, var, activation, eps, fixed):
    small = empty_small(x, x.shape[1]), empty_small(x, x.shape[1])
    return empty_map(x), empty_map(x), empty_residual_gradient(x, activation), *small


# m has x's shape and dtype; results come in x's memory format.
norm_gate_fwd = define(
    "norm_gate_fwd(Tensor x, Tensor m, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, Tensor? residual,"
    " int activation, float eps) -> (Tensor y, Tensor mean, Tensor var)",
    "norm_gate",
    _norm_gate_fwd_reference,
    _norm_gate_fwd_fake,
)
norm_gate_bwd = define(
    "norm_gate_bwd(Tensor grad, Tensor x, Tensor m, Tensor weight, Tensor bias, Tensor? residual, Tensor mean,"
    " Tensor var, int activation, float eps, bool fixed)"
    " -> (Tensor dx, Tensor dm, Tensor dresidual, Tensor dweight, Tensor dbias)",
    "norm_gate",
    _norm_gate_bwd_reference,
    _norm_gate_bwd_fake,
    gradients_of=("weight", "bias"),
)


def _gradients(grad, tensors, small, options):
    x, m, weight, bias, given_mean, _, residual = tensors
    fixed = given_mean is not None
    dx, dm, dresidual, dweight, dbias = norm_gate_bwd(grad, x, m, weight, bias, residual, *small, *options, fixed)
    return dx, dm, dweight, dbias, None, None, dresidual


def _mathematics(x, m, weight, bias, mean, var, eps):
    return reference.norm_gate(x, m, weight, bias, mean, var, training=mean is None, momentum=0.0, eps=eps)


NormGateFunction = fused_function("NormGateFunction", norm_gate_fwd, _gradients, with_epilogue(_mathematics, options=1))
