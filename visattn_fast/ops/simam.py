"""SimAM: ops and autograd."""

from __future__ import annotations

from .. import reference
from .autograd import fused_function
from .epilogue import empty_residual_gradient, finish, residual_gradient, start_backward, with_epilogue
from .layout import empty_map, empty_small, to_map
from .library import define
from .self_gate import Coefficients, deviation_and_gate, input_gradient, logit_gradient, moments


def _simam_fwd_reference(x, residual, activation, e_lambda):
    mean, second = moments(x, (2, 3))
    scale = 1 / (4 * (second / max(x.shape[2] * x.shape[3] - 1, 1) + e_lambda))
    _, gate = deviation_and_gate(x, Coefficients(mean, q=scale, b=0.5))
    return finish(x, gate, residual, activation), mean, scale


def _simam_bwd_reference(grad, x, residual, mean, scale, activation):
    k, pixels = Coefficients(mean, q=scale, b=0.5), x.shape[2] * x.shape[3]
    d, gate = deviation_and_gate(x, k)
    grad = start_backward(grad, x, gate, residual, activation)
    r = logit_gradient(grad, x, gate)
    u = -8 * scale.square() * (r * d * d).sum((2, 3)) / max(pixels - 1, 1)
    v = -2 * scale * (r * d).sum((2, 3)) / pixels
    return to_map(input_gradient(grad, gate, d, r, k, u, v), x), residual_gradient(grad, x, activation)


def _simam_fwd_fake(x, residual, activation, e_lambda):
    n, c = x.shape[0], x.shape[1]
    return empty_map(x), empty_small(x, n, c), empty_small(x, n, c)


def _simam_bwd_fake(grad, x, residual, mean, scale, activation):
    return empty_map(x), empty_residual_gradient(x, activation)


simam_fwd = define(
    "simam_fwd(Tensor x, Tensor? residual, int activation, float e_lambda) -> (Tensor y, Tensor mean, Tensor scale)",
    "simam",
    _simam_fwd_reference,
    _simam_fwd_fake,
)
simam_bwd = define(
    "simam_bwd(Tensor grad, Tensor x, Tensor? residual, Tensor mean, Tensor scale, int activation)"
    " -> (Tensor dx, Tensor dresidual)",
    "simam",
    _simam_bwd_reference,
    _simam_bwd_fake,
)


def _gradients(grad, tensors, small, options):
    activation, _ = options
    return simam_bwd(grad, *tensors, *small, activation)


SimAMFunction = fused_function("SimAMFunction", simam_fwd, _gradients, with_epilogue(reference.simam, options=1))
