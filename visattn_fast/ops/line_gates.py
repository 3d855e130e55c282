"""Gates for every row and column of a channel, from the means of all rows and columns. x itself is not read.

``gates = sigmoid(w hardswish(bn(w1 means + b1)) + b)``; w and b differ for rows and columns of x. Lines ``[N, C, L]``,
``L = H + W``, are multiplied to ``[N, L, M]``, M hidden channels, normalised, activated, and multiplied to lines again.
The norm uses given statistics, or the batch's, which are then results. Results are dense as the means are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import converted, empty_small
from .library import define
from .shapes import Arguments


def _normed(
    z: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Any, var: Any, eps: float
) -> tuple[Tensor, ...]:
    """Returns z normalised, the same with weight and bias applied, and the factor of z in it."""
    inverse = torch.rsqrt(var.to(z.dtype) + eps)
    normal = (z - mean.to(z.dtype)) * inverse
    affine = normal if bn_weight is None else normal * bn_weight
    affine = affine if bn_bias is None else affine + bn_bias
    return normal, affine, inverse if bn_weight is None else inverse * bn_weight


def _to_rows(lines: Tensor, weight: Tensor, bias: Tensor | None, channels_inside: bool) -> Tensor:
    """Multiplies lines ``[N, C, L]`` by the weight: ``[N, L, M]``, dense."""
    if channels_inside:
        return F.linear(lines.mT, weight, bias)
    product = torch.bmm(lines.mT, weight.t().expand(lines.shape[0], -1, -1))
    return product if bias is None else product.add_(bias)


def _to_lines(rows: Tensor, weight: Tensor, bias: Tensor | None, channels_inside: bool) -> Tensor:
    """Multiplies ``[N, L, M]`` by the weight: lines ``[N, C, L]``, dense as lines are."""
    if channels_inside:
        return F.linear(rows, weight, bias).mT
    product = torch.bmm(weight.expand(rows.shape[0], -1, -1), rows.mT)
    return product if bias is None else product.add_(bias[:, None])


def _line_gates_fwd_reference(
    means: Tensor,
    height: int,
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
) -> tuple[Tensor, ...]:
    weights = (w1.flatten(1), w_h.flatten(1), w_w.flatten(1), b1, bn_weight, bn_bias, b_h, b_w)
    w1, w_h, w_w, b1, bn_weight, bn_bias, b_h, b_w = converted(weights, [means.dtype] * len(weights))
    inside = not means.is_contiguous()
    z = _to_rows(means, w1, b1, inside)
    statistics = empty_small(means, 0), empty_small(means, 0)
    if mean is None:
        # For equal values var_mean returns exactly this value, and zero. It would warn about an empty batch.
        units = z.flatten(0, 1)
        var, mean = torch.var_mean(units, 0, correction=0) if len(units) else (units.sum(0), units.sum(0))
        statistics = mean, var
    hidden = F.hardswish(_normed(z, bn_weight, bn_bias, mean, var, eps)[1])
    rows = _to_lines(hidden[:, :height], w_h, b_h, inside)
    columns = _to_lines(hidden[:, height:], w_w, b_w, inside)
    logits = torch.cat([rows.mT, columns.mT], 1).mT if inside else torch.cat([rows, columns], 2)
    return logits.sigmoid_(), z, *statistics


def _line_gates_bwd_reference(
    dgates: Tensor,
    gates: Tensor,
    means: Tensor,
    z: Tensor,
    height: int,
    w1: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    w_h: Tensor,
    w_w: Tensor,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, ...]:
    inside = not means.is_contiguous()
    weights = (w1.flatten(1), w_h.flatten(1), w_w.flatten(1), bn_weight, bn_bias)
    w1_, w_h_, w_w_, bn_weight, bn_bias = converted(weights, [means.dtype] * len(weights))
    normal, affine, gain = _normed(z, bn_weight, bn_bias, mean, var, eps)
    hidden = F.hardswish(affine)
    dlines = torch.ops.aten.sigmoid_backward(dgates, gates)
    drows, dcolumns = dlines[:, :, :height], dlines[:, :, height:]
    dw_h = torch.bmm(drows, hidden[:, :height]).sum(0).view(w_h.shape)
    dw_w = torch.bmm(dcolumns, hidden[:, height:]).sum(0).view(w_w.shape)
    # Sum over images first, to [C, L]: images follow each other in memory, whereas a slice of lines has gaps.
    images = dlines.sum(0)
    db_h, db_w = images[:, :height].sum(1), images[:, height:].sum(1)
    daffine = torch.ops.aten.hardswish_backward(torch.cat([drows.mT @ w_h_, dcolumns.mT @ w_w_], 1), affine)
    dbias, dweight = daffine.sum((0, 1)), (daffine * normal).sum((0, 1))
    if not fixed:
        count = max(normal.shape[0] * normal.shape[1], 1)
        daffine = torch.addcmul(torch.sub(daffine, dbias, alpha=1 / count), normal, dweight, value=-1 / count)
    db1 = dbias * gain if fixed else torch.zeros_like(dbias)  # the batch's mean cancels b1
    dz = daffine * gain
    dw1 = torch.bmm(dz.mT, means.mT).sum(0).view(w1.shape)
    return _to_lines(dz, w1_.t(), None, inside), torch.stack([dbias, dweight, db1]), db_h, db_w, dw1, dw_h, dw_w


def _like_means(given: Arguments) -> Tensor:
    return torch.empty_like(given["means"])


def _batch_statistic(given: Arguments) -> Tensor:
    """Allocates a statistic of the batch; empty if statistics are given."""
    return empty_small(given["means"], 0 if given["mean"] is not None else given["w1"].shape[0])


_NORM = dict.fromkeys(("bn_weight", "bn_bias", "mean"), "M : floating") | {"var": "M : floating with mean"}
_LAYERS = {"means": "N C L : sums lines of means", "height": "1..L-1", "w1": "M C : floating", **_NORM, "eps": "0.."}
_LAYERS |= dict.fromkeys(("w_h", "w_w"), "C M : floating")
_BIASES = {"b1": "M : floating", "b_h": "C : floating", "b_w": "C : floating"}
line_gates_fwd = define(
    "line_gates_fwd(Tensor means, SymInt height, Tensor w1, Tensor? b1, Tensor? bn_weight, Tensor? bn_bias,"
    " Tensor? mean, Tensor? var, Tensor w_h, Tensor? b_h, Tensor w_w, Tensor? b_w, float eps)"
    " -> (Tensor gates, Tensor z, Tensor mean, Tensor var)",
    "line_gates",
    _line_gates_fwd_reference,
    (_like_means, "N L M", _batch_statistic, _batch_statistic),
    {**_LAYERS, **_BIASES},
)
# sums [3, M]: gradients of the norm's bias, the norm's weight, and b1.
line_gates_bwd = define(
    "line_gates_bwd(Tensor dgates, Tensor gates, Tensor means, Tensor z, SymInt height, Tensor w1, Tensor? bn_weight,"
    " Tensor? bn_bias, Tensor mean, Tensor var, Tensor w_h, Tensor w_w, float eps, bool fixed)"
    " -> (Tensor dmeans, Tensor sums, Tensor db_h, Tensor db_w, Tensor dw1, Tensor dw_h, Tensor dw_w)",
    "line_gates",
    _line_gates_bwd_reference,
    (_like_means, "3 M", "C", "C", "shape of w1", "shape of w_h", "shape of w_w"),
    {**_LAYERS, "dgates": "N C L : lines of means", "gates": "N C L : lines of means", "z": "N L M"},
    gradients_of=("w1", "w_h", "w_w"),
)
