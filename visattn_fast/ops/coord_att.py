"""Coordinate attention: the passes over x of `axis`, and between them the gates of `line_gates`.

Forward reads x twice and writes y; backward reads grad and x, then grad, and writes dx. Means, hidden layer and gates
are saved for backward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from .autograd import without_autocast
from .axis import axis_input_grad, axis_mean, axis_scale, axis_scale_bwd
from .declare import composed_op
from .layout import memory_format
from .line_gates import line_gates_bwd, line_gates_fwd


@without_autocast
def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    residual: Tensor | None,
    activation: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Normalises with mean and var or, if they are None, with the batch's statistics, then the last two results."""
    means = axis_mean(x)
    weights = (w1, b1, bn_weight, bn_bias, mean, var, w_h, b_h, w_w, b_w)
    gates, z, *statistics = line_gates_fwd(means, x.shape[2], *weights, eps)
    return axis_scale(x, gates, residual, activation), means, z, gates, *(statistics if mean is None else ())


@without_autocast
def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any, needs: Any) -> tuple[Tensor | None, ...]:
    x, w1, _, bn_weight, bn_bias, mean, var, w_h, _, w_w, _, residual = tensors
    (means, z, gates, *batch), (activation, eps) = small, options
    grad = grad.contiguous(memory_format=memory_format(x))
    dgates, dresidual = axis_scale_bwd(grad, x, gates, residual, activation)
    statistics = batch or (mean, var)
    dmeans, sums, db_h, db_w, dw1, dw_h, dw_w = line_gates_bwd(
        dgates, gates, means, z, x.shape[2], w1, bn_weight, bn_bias, *statistics, w_h, w_w, eps, not batch
    )
    dx = axis_input_grad(dresidual if activation else grad, x, gates, dmeans) if needs[0] else None
    dbias, dweight, db1 = sums
    return dx, dw1, db1, dweight, dbias, None, None, dw_h, db_h, dw_w, db_w, dresidual


def _mathematics(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    eps: float,
) -> Tensor:
    weights = (w1, b1, bn_weight, bn_bias, mean, var, w_h, b_h, w_w, b_w)
    return reference.coord_att(x, *weights, mean is None, 0.0, eps)


COORD_ATT = composed_op("coord_att", _forward, _gradients, _mathematics, epilogue=True, options=1, partial=True)
