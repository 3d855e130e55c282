"""Coordinate attention: the passes of `axis`, between them PyTorch on lines, and autograd.

Lines ``[N, C, L]``, ``L = H + W``, become rows ``[N, L, M]`` of M hidden channels and lines again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ._autograd import fused_function, without_autocast
from ._epilogue import with_epilogue
from ._layout import accumulation_dtype, converted, memory_format
from .axis import axis_input_grad, axis_mean, axis_scale, axis_scale_bwd


def _gates(hidden: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """Hidden rows ``[N, H, M]`` -> lines ``[N, C, H]`` before the sigmoid, dense as lines are."""
    if channels_last:
        return F.linear(hidden, weight, bias).mT
    product = torch.bmm(weight.expand(hidden.shape[0], -1, -1), hidden.mT)
    return product if bias is None else product.add_(bias[:, None])


def _concatenate(rows: Tensor, columns: Tensor, channels_last: bool) -> Tensor:
    return torch.cat([rows.mT, columns.mT], 1).mT if channels_last else torch.cat([rows, columns], 2)


@without_autocast
def _forward(x, w1, b1, bn_weight, bn_bias, mean, var, w_h, b_h, w_w, b_w, residual, activation, eps):
    """mean and var are the statistics to normalise with, or None for the batch's, which are then the last results."""
    a, height, channels_last = accumulation_dtype(x), x.shape[2], memory_format(x) == torch.channels_last
    weights = (w1.flatten(1), w_h.flatten(1), w_w.flatten(1), b1, bn_weight, bn_bias, b_h, b_w)
    w1, w_h, w_w, b1, bn_weight, bn_bias, b_h, b_w = converted(weights, [a] * len(weights))
    means = axis_mean(x)
    z = F.linear(means.mT, w1, b1)
    statistics: tuple[Tensor, ...] = ()
    if mean is None:
        # Of equal values var_mean finds exactly their value, and zero. It warns of an empty batch. Along memory it has
        # enough for every thread of a GPU to do: there are only M results.
        units = z.flatten(0, 1).t().contiguous()
        var, mean = torch.var_mean(units, 1, correction=0) if x.shape[0] else (units.sum(1), units.sum(1))
        statistics = (mean, var)
    z = z - mean.to(a)
    inverse = torch.rsqrt(var.to(a) + eps)
    normal = z * inverse
    affine = normal if bn_weight is None else normal * bn_weight
    affine = affine if bn_bias is None else affine + bn_bias
    hidden = F.hardswish(affine)
    rows = _gates(hidden[:, :height], w_h, b_h, channels_last)
    columns = _gates(hidden[:, height:], w_w, b_w, channels_last)
    gates = _concatenate(rows, columns, channels_last).sigmoid_()
    y = axis_scale(x, gates, residual, activation)
    return y, means, normal, inverse, affine, hidden, gates, *statistics


@without_autocast
def _gradients(grad, tensors, small, options):
    x, w1, b1, bn_weight, bn_bias, running_mean, _, w_h, b_h, w_w, b_w, residual = tensors
    means, normal, inverse, affine, hidden, gates = small[:6]
    a, height, form = gates.dtype, x.shape[2], memory_format(x)
    w1_, w_h_, w_w_ = converted((w1.flatten(1), w_h.flatten(1), w_w.flatten(1)), [a] * 3)
    grad = grad.contiguous(memory_format=form)
    dgates, dresidual = axis_scale_bwd(grad, x, gates, residual, options[0])
    batch = running_mean is None
    upstream = dresidual if options[0] else grad

    dlines = torch.ops.aten.sigmoid_backward(dgates, gates)
    drows, dcolumns = dlines[:, :, :height], dlines[:, :, height:]
    dw_h = torch.bmm(drows, hidden[:, :height]).sum(0).view(w_h.shape)
    dw_w = torch.bmm(dcolumns, hidden[:, height:]).sum(0).view(w_w.shape)
    dhidden = torch.cat([drows.mT @ w_h_, dcolumns.mT @ w_w_], 1)
    daffine = torch.ops.aten.hardswish_backward(dhidden, affine)
    dbias, dweight = daffine.sum((0, 1)), (daffine * normal).sum((0, 1))
    if batch:
        count = max(normal.shape[0] * normal.shape[1], 1)
        daffine = torch.addcmul(torch.sub(daffine, dbias, alpha=1 / count), normal, dweight, value=-1 / count)
    dz = daffine * (inverse if bn_weight is None else inverse * bn_weight)
    dw1 = torch.bmm(dz.mT, means.mT).sum(0).view(w1.shape)
    db1 = inverse.new_zeros(w1.shape[0]) if batch else dz.sum((0, 1))  # the batch's mean takes it out
    dmeans = (dz @ w1_).mT if form == torch.channels_last else torch.bmm(w1_.t().expand(dz.shape[0], -1, -1), dz.mT)
    dx = axis_input_grad(upstream, x, gates, dmeans)

    dnorm = (None if bn_weight is None else dweight, None if bn_bias is None else dbias)
    # [C, L] first: the images lie behind each other, whereas the lines of a channel have gaps between them.
    images = dlines.sum(0)
    db_h, db_w = (None if b is None else d.sum(1) for b, d in ((b_h, images[:, :height]), (b_w, images[:, height:])))
    return dx, dw1, None if b1 is None else db1, *dnorm, None, None, dw_h, db_h, dw_w, db_w, dresidual


def _mathematics(x, w1, b1, bn_weight, bn_bias, mean, var, w_h, b_h, w_w, b_w, eps):
    weights = (w1, b1, bn_weight, bn_bias, mean, var, w_h, b_h, w_w, b_w)
    return reference.coord_att(x, *weights, mean is None, 0.0, eps)


CoordAttFunction = fused_function("CoordAttFunction", _forward, _gradients, with_epilogue(_mathematics, options=1))
