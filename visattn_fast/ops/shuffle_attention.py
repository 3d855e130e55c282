"""Shuffle attention: half of the channels have a gate per channel, the others a gate per element; then a shuffle.

Mean and rstd, in the order of x's channels, are saved for backward. The Triton kernels move the bytes of x twice
forward and 3 times backward if planes fit in a tile, else 3 and 5 times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.checks import ACTIVATIONS
from ..reference.epilogue import epilogue
from ..reference.shuffle_attention import shuffle
from .declare import gate_op
from .epilogue import residual_gradient, start_backward
from .layout import to_map
from .self_gate import Coefficients, deviation_and_gate, input_gradient, logit_gradient, moments


def _channelwise(x: Tensor, weights: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Expands the weights to x's channels, ``[C]``. The last result is True in channels with a gate per element."""
    width = weights[0].numel()
    groups = x.shape[1] // (2 * width)
    spatial = (torch.arange(x.shape[1], device=x.device) // width) % 2 == 1
    return *(w.flatten().to(dtype).repeat(2 * groups) for w in weights), spatial


def _coefficients(weights: Any, mean: Tensor, rstd: Tensor, pixels: int) -> Coefficients:
    cweight, cbias, sweight, sbias, gn_weight, gn_bias, spatial = weights
    # A single pixel equals its mean, so d is 0; a, as large as 1 / sqrt(eps), would only add rounding to dx.
    a = torch.where(spatial, sweight * gn_weight * rstd, 0.0) if pixels > 1 else 0.0
    b = torch.where(spatial, sweight * gn_bias + sbias, cweight * mean + cbias)
    return Coefficients(mean, a=a, b=b)


def _deviation_and_gate(x: Tensor, k: Coefficients, spatial: Tensor) -> tuple[Tensor, ...]:
    """Returns d and the gate. In channels with a gate per channel d is 0: x may be infinite, and a has no effect."""
    d, gate = deviation_and_gate(x, k)
    constant = torch.sigmoid(torch.as_tensor(k.b))[..., None, None]
    spatial = spatial[:, None, None]
    return torch.where(spatial, d, 0.0), torch.where(spatial, gate, constant)


def _forward(
    x: Tensor,
    cweight: Tensor,
    cbias: Tensor,
    sweight: Tensor,
    sbias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    residual: Tensor | None,
    activation: int,
    eps: float,
) -> tuple[Tensor, ...]:
    mean, second = moments(x, (2, 3))
    pixels = x.shape[2] * x.shape[3]
    rstd = (second / pixels + eps).rsqrt()
    weights = _channelwise(x, (cweight, cbias, sweight, sbias, gn_weight, gn_bias), mean.dtype)
    _, gate = _deviation_and_gate(x, _coefficients(weights, mean, rstd, pixels), weights[-1])
    return to_map(epilogue(shuffle(x * gate), residual, ACTIVATIONS[activation]), x), mean, rstd


def _backward(
    grad: Tensor,
    x: Tensor,
    cweight: Tensor,
    cbias: Tensor,
    sweight: Tensor,
    sbias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: int,
) -> tuple[Tensor, ...]:
    pixels, width = x.shape[2] * x.shape[3], cweight.numel()
    weights = _channelwise(x, (cweight, cbias, sweight, sbias, gn_weight, gn_bias), mean.dtype)
    w_c, _, w_s, _, gn_w, gn_b, spatial = weights
    k = _coefficients(weights, mean, rstd, pixels)
    d, gate = _deviation_and_gate(x, k, spatial)
    grad = start_backward(grad, shuffle(x), shuffle(gate), residual, activation)
    dresidual = residual_gradient(grad, x, activation)
    n, c, h, w = grad.shape
    grad = grad.reshape(n, c // 2, 2, h, w).transpose(1, 2).reshape(n, c, h, w)  # undoes the shuffle
    r = logit_gradient(grad, x, gate)
    sum_r, sum_rd = r.sum((2, 3)), (r * d).sum((2, 3))
    u = torch.where(spatial, -k.a * rstd.square() * sum_rd / pixels, 0.0)
    v = torch.where(spatial, -k.a, w_c) * sum_r / pixels
    dx = to_map(input_gradient(grad, gate, d, r, k, u, v), x)

    def over_groups(value: Tensor, half: int) -> Tensor:
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


SHUFFLE_ATTENTION = gate_op(
    "shuffle_attention",
    weights=dict.fromkeys(("cweight", "cbias", "sweight", "sbias"), "1 D 1 1") | {"gn_weight": "D", "gn_bias": "D"},
    options="float eps",
    ranges={"eps": "0..", "C": "C//(2*D)*(2*D)"},
    backward_options="",
    saves={"mean": "N C", "rstd": "N C"},
    forward=_forward,
    backward=_backward,
    mathematics=reference.shuffle_attention,
)
