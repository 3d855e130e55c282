"""Normalization-based attention: ops and autograd. Given statistics are an argument of their own, else the batch's."""

from __future__ import annotations

from .. import reference
from .autograd import fused_function
from .epilogue import empty_residual_gradient, finish, residual_gradient, start_backward, with_epilogue
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define
from .self_gate import Coefficients, deviation_and_gate, fixed_or_batch_statistics, input_gradient, logit_gradient


def share_of(weight, dtype):
    """``abs(weight) / sum(abs(weight))``."""
    share = weight.detach().to(dtype).abs()
    return share / share.sum()


def _coefficients(x, weight, bias, mean, var, eps):
    dtype = accumulation_dtype(x)
    share = share_of(weight, dtype)
    return Coefficients(mean, a=weight.to(dtype) * share * (var + eps).rsqrt(), b=bias.to(dtype) * share)


def _nam_fwd_reference(x, weight, bias, mean, var, residual, activation, eps):
    mean, var = fixed_or_batch_statistics(x, mean, var)
    _, gate = deviation_and_gate(x, _coefficients(x, weight, bias, mean, var, eps))
    return finish(x, gate, residual, activation), mean, var


def _nam_bwd_reference(grad, x, weight, bias, residual, mean, var, activation, eps, fixed):
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


def _nam_fwd_fake(x, weight, bias, mean, var, residual, activation, eps):
    return empty_map(x), empty_small(x, x.shape[1]), empty_small(x, x.shape[1])


def _nam_bwd_fake(grad, x, weight, bias, residual, mean, var, activation, eps, fixed):
    c = x.shape[1]
    return empty_map(x), empty_residual_gradient(x, activation), empty_small(x, c), empty_small(x, c)


nam_fwd = define(
    "nam_fwd(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, Tensor? residual, int activation,"
    " float eps) -> (Tensor y, Tensor mean, Tensor var)",
    "nam",
    _nam_fwd_reference,
    _nam_fwd_fake,
)
nam_bwd = define(
    "nam_bwd(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor mean, Tensor var,"
    " int activation, float eps, bool fixed) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    "nam",
    _nam_bwd_reference,
    _nam_bwd_fake,
    gradients_of=("weight", "bias"),
)


def _gradients(grad, tensors, small, options):
    x, weight, bias, given_mean, _, residual = tensors
    fixed = given_mean is not None
    dx, dresidual, dweight, dbias = nam_bwd(grad, x, weight, bias, residual, *small, *options, fixed)
    return dx, dweight, dbias, None, None, dresidual


def _mathematics(x, weight, bias, mean, var, eps):
    return reference.nam(x, weight, bias, mean, var, training=mean is None, momentum=0.0, eps=eps)


NAMFunction = fused_function("NAMFunction", nam_fwd, _gradients, with_epilogue(_mathematics, options=1))
