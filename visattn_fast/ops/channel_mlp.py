"""An MLP over each pixel's channels, times x: ``y = x * (w2 relu(w1 x + b1) + b2)``.

On every device the products are PyTorch's, in x's dtype and layout; sums over images are in the accumulation dtype. The
hidden map and the factor of x are saved for backward, as autograd would save them: computing the factor again costs one
product more than eager mode has, and was up to a tenth slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .declare import composed_op
from .layout import accumulation_dtype, empty_small, memory_format, zeros_small
from .library import define
from .shapes import Arguments
from .signature import MAP


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """Returns x as ``[N, H W, C]``, a view of its memory format, and True if channels are the inner axis there."""
    form = memory_format(x)
    return x.contiguous(memory_format=form).flatten(2).mT, form == torch.channels_last


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, inner: bool) -> Tensor:
    """Computes ``rows weight^T + bias``, ``[N, P, K]``, with K (``inner``) or P as the inner axis in memory."""
    weight, bias = weight.flatten(1).to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    if inner:
        return torch.nn.functional.linear(rows, weight, bias)
    n = rows.shape[0]
    if bias is None:
        return torch.bmm(weight.expand(n, -1, -1), rows.mT).mT
    return torch.baddbmm(bias[:, None], weight.expand(n, -1, -1), rows.mT).mT


def _weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    """Sums ``left^T right`` over images and pixels: ``[K, C]``."""
    wide = accumulation_dtype(left)
    if left.shape[0] == 0:
        return zeros_small(left, left.shape[2], right.shape[2])
    return torch.bmm(left.mT, right).sum(0, dtype=wide)


def _as_map(rows: Tensor, x: Tensor) -> Tensor:
    return rows.mT.unflatten(2, x.shape[2:])


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_small(x, 0, dtype=x.dtype), empty_small(x, 0, dtype=x.dtype)


def _channel_mlp_fwd_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, keep: bool
) -> tuple[Tensor, ...]:
    rows, inner = _rows(x)
    hidden = _product(rows, w1, b1, inner).relu_()
    factor = _product(hidden, w2, b2, inner)
    if not keep:
        return _as_map(factor.mul_(rows), x), *_nothing(x)
    y = torch.mul(factor, rows, out=torch.empty_like(factor))  # with the factor's strides, even for a single pixel
    return _as_map(y, x), _as_map(hidden, x), _as_map(factor, x)


def _channel_mlp_bwd_reference(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, hidden: Tensor, factor: Tensor
) -> tuple[Tensor, ...]:
    rows, inner = _rows(x)
    form = torch.channels_last if inner else torch.contiguous_format
    grad = grad.to(x.dtype).contiguous(memory_format=form).flatten(2).mT
    hidden, factor = hidden.flatten(2).mT, factor.flatten(2).mT
    dfactor = grad * rows
    dw2, db2 = _weight_gradient(dfactor, hidden), dfactor.sum((0, 1), dtype=accumulation_dtype(x))
    dhidden = torch.ops.aten.threshold_backward(_product(dfactor, w2.flatten(1).t(), None, inner), hidden, 0)
    dw1, db1 = _weight_gradient(dhidden, rows), dhidden.sum((0, 1), dtype=accumulation_dtype(x))
    dx = _product(dhidden, w1.flatten(1).t(), None, inner).addcmul_(grad, factor)
    return _as_map(dx, x), dw1.view(w1.shape), db1, dw2.view(w2.shape), db2


def _hidden(given: Arguments) -> Tensor:
    """Allocates the hidden map, in x's memory format, from the op's arguments by name; empty unless it is kept."""
    x, units = given["x"], given["w1"].shape[0]
    shape = x.shape[0], units, *x.shape[2:]
    kept = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return kept if given["keep"] else empty_small(x, 0, dtype=x.dtype)


_LAYERS = {"x": MAP, "w1": "R C : floating", "w2": "C R : floating"}
channel_mlp_fwd = define(
    "channel_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool keep)"
    " -> (Tensor y, Tensor hidden, Tensor factor)",
    None,
    _channel_mlp_fwd_reference,
    ("like x", _hidden, lambda given: "like x" if given["keep"] else "0 : x"),
    {**_LAYERS, "b1": "R : floating", "b2": "C : floating"},
)
channel_mlp_bwd = define(
    "channel_mlp_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor hidden, Tensor factor)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    None,
    _channel_mlp_bwd_reference,
    ("like x", "shape of w1", "R", "shape of w2", "C"),
    {**_LAYERS, "grad": "like x", "hidden": "N R H W : x strided", "factor": "like x"},
)


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any) -> tuple[Tensor | None, ...]:
    x, w1, _, w2, _ = tensors
    return channel_mlp_bwd(grad, x, w1, w2, *small)


def _mathematics(*tensors_and_keep: Any) -> Tensor:
    return reference.channel_mlp(*tensors_and_keep[:-1])


CHANNEL_MLP = composed_op("channel_mlp", channel_mlp_fwd, _gradients, _mathematics, tiny=49)
