"""Shuffle attention: ops and autograd. Statistics are in the order of x's channels."""

from __future__ import annotations

import torch

from .. import reference
from ..reference.checks import ACTIVATIONS
from ..reference.epilogue import epilogue
from ..reference.shuffle_attention import shuffle
from .autograd import fused_function
from .epilogue import empty_residual_gradient, residual_gradient, start_backward, with_epilogue
from .layout import empty_map, empty_small, to_map
from .library import define
from .self_gate import Coefficients, deviation_and_gate, input_gradient, logit_gradient, moments


def _channelwise(x, weights, dtype):
    """The weights by channel of x ``[C]``, and which channels have a gate per element."""
    width = weights[0].numel()
    groups = x.shape[1] // (2 * width)
    spatial = (torch.arange(x.shape[1], device=x.device) // width) % 2 == 1
    return *(w.flatten().to(dtype).repeat(2 * groups) for w in weights), spatial


def _coefficients(weights, mean, rstd, pixels):
    cweight, cbias, sweight, sbias, gn_weight, gn_bias, spatial = weights
    # One pixel is its own mean: d is 0, and a, large as 1 / sqrt(eps), would only be rounded in dx.
    a = torch.where(spatial, sweight * gn_weight * rstd, 0.0) if pixels > 1 else 0.0
    b = torch.where(spatial, sweight * gn_bias + sbias, cweight * mean + cbias)
    return Coefficients(mean, a=a, b=b)


def _deviation_and_gate(x, k, spatial):
    """As for other gates, but d is 0 where the gate is the channel's: there x may be infinite, and a is not felt."""
    d, gate = deviation_and_gate(x, k)
    constant = torch.sigmoid(k.b)[..., None, None]
    spatial = spatial[:, None, None]
    return torch.where(spatial, d, 0.0), torch.where(spatial, gate, constant)


def _shuffle_attention_fwd_reference(x, cweight, cbias, sweight, sbias, gn_weight, gn_bias, residual, activation, eps):
    mean, second = moments(x, (2, 3))
    pixels = x.shape[2] * x.shape[3]
    rstd = (second / pixels + eps).rsqrt()
    weights = _channelwise(x, (cweight, cbias, sweight, sbias, gn_weight, gn_bias), mean.dtype)
    _, gate = _deviation_and_gate(x, _coefficients(weights, mean, rstd, pixels), weights[-1])
    return to_map(epilogue(shuffle(x * gate), residual, ACTIVATIONS[activation]), x), mean, rstd


def _shuffle_attention_bwd_reference(
    grad, x, cweight, cbias, sweight, sbias, gn_weight, gn_bias, residual, mean, rstd, activation
):
    pixels, width = x.shape[2] * x.shape[3], cweight.numel()
    weights = _channelwise(x, (cweight, cbias, sweight, sbias, gn_weight, gn_bias), mean.dtype)
    w_c, _, w_s, _, gn_w, gn_b, spatial = weights
    k = _coefficients(weights, mean, rstd, pixels)
    d, gate = _deviation_and_gate(x, k, spatial)
    grad = start_backward(grad, shuffle(x), shuffle(gate), residual, activation)
    dresidual = residual_gradient(grad, x, activation)
    n, c, h, w = grad.shape
    grad = grad.reshape(n, c // 2, 2, h, w).transpose(1, 2).reshape(n, c, h, w)  # in the order of x
    r = logit_gradient(grad, x, gate)
    sum_r, sum_rd = r.sum((2, 3)), (r * d).sum((2, 3))
    u = torch.where(spatial, -k.a * rstd.square() * sum_rd / pixels, 0.0)
    v = torch.where(spatial, -k.a, w_c) * sum_r / pixels
    dx = to_map(input_gradient(grad, gate, d, r, k, u, v), x)

    def over_groups(value, half):
        return value.view(n, c // (2 * width), 2, width)[:, :, half].sum((0, 1))

    normed = rstd * sum_rd
    dsweight = over_groups(gn_w * normed + gn_b * sum_r, 1)
    found = (
        over_groups(mean * sum_r, 0),
        over_groups(sum_r, 0),
        dsweight,
        over_groups(sum_r, 1),
        over_groups(w_s * normed, 1),
        over_groups(w_s * sum_r, 1),
    )
    shapes = (cweight, cbias, sweight, sbias, gn_weight, gn_bias)
    return dx, dresidual, *(value.view(p.shape) for value, p in zip(found, shapes, strict=True))


def _shuffle_attention_fwd_fake(x, cweight, cbias, sweight, sbias, gn_weight, gn_bias, residual, activation, eps):
    n, c = x.shape[0], x.shape[1]
    return empty_map(x), empty_small(x, n, c), empty_small(x, n, c)


def _shuffle_attention_bwd_fake(
    grad, x, cweight, cbias, sweight, sbias, gn_weight, gn_bias, residual, mean, rstd, activation
):
    dweights = (empty_small(x, *w.shape) for w in (cweight, cbias, sweight, sbias, gn_weight, gn_bias))
    return empty_map(x), empty_residual_gradient(x, activation), *dweights


_WEIGHTS = "Tensor cweight, Tensor cbias, Tensor sweight, Tensor sbias, Tensor gn_weight, Tensor gn_bias"
shuffle_attention_fwd = define(
    f"shuffle_attention_fwd(Tensor x, {_WEIGHTS}, Tensor? residual, int activation, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    "shuffle_attention",
    _shuffle_attention_fwd_reference,
    _shuffle_attention_fwd_fake,
)
shuffle_attention_bwd = define(
    f"shuffle_attention_bwd(Tensor grad, Tensor x, {_WEIGHTS}, Tensor? residual, Tensor mean, Tensor rstd,"
    " int activation) -> (Tensor dx, Tensor dresidual, Tensor dcweight, Tensor dcbias, Tensor dsweight, Tensor dsbias,"
    " Tensor dgn_weight, Tensor dgn_bias)",
    "shuffle_attention",
    _shuffle_attention_bwd_reference,
    _shuffle_attention_bwd_fake,
    gradients_of=("cweight", "cbias", "sweight", "sbias", "gn_weight", "gn_bias"),
)


def _gradients(grad, tensors, small, options):
    activation, _ = options
    dx, dresidual, *dweights = shuffle_attention_bwd(grad, *tensors, *small, activation)
    return dx, *dweights, dresidual


ShuffleAttentionFunction = fused_function(
    "ShuffleAttentionFunction",
    shuffle_attention_fwd,
    _gradients,
    with_epilogue(reference.shuffle_attention, options=1),
)
