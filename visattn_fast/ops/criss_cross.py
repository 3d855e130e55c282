"""Criss-cross attention in blocks of rows and columns, by PyTorch's matrix products.

Queries, keys and values lie side by side as ``[N, H, W, 2 R + C]``: each row, and each column, is a matrix with dense
channels. Queries of a row meet only keys of that row, so blocks of rows are independent; blocks of columns follow, and
the two softmaxes are joined as in flash attention. Small images are processed in groups. The packed map, the attended
values and the logarithms of the softmax sums are saved for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import flops
from .declare import composed_op
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define
from .signature import MAP

_BLOCK = 1 << 16  # weights computed at a time
_PIXELS = 1 << 10  # pixels of each image summed at a time: rounding grows with the length of a sum


class _Lines(NamedTuple):
    """Tensors of some images as ``[images, lines, length, channels]``; lines are rows, or columns if ``columns``."""

    columns: bool
    tensors: tuple[Tensor, ...]

    def blocks(self) -> Iterator[list[Tensor]]:
        images, lines, length, _ = self.tensors[0].shape
        step = max(_BLOCK // (images * length**2), 1)
        for start in range(0, lines, step):
            yield [t[:, start : start + step] for t in self.tensors]

    def energies(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits ``[G, B, L, L]`` of q and k ``[G, B, L, R]``. Columns leave out the position itself: rows have it."""
        found = q @ k.mT
        if self.columns:
            found.diagonal(0, 2, 3).fill_(-torch.inf)
        return found


def _rows_and_columns(*tensors: Tensor) -> tuple[_Lines, _Lines]:
    return _Lines(False, tensors), _Lines(True, tuple(t.transpose(1, 2) for t in tensors))


def _groups(images: int, height: int, width: int) -> Iterator[slice]:
    """Yields slices of the batch: several small images, or a single one."""
    step = max(_BLOCK // max(height * width * max(height, width), 1), 1)
    return (slice(start, start + step) for start in range(0, images, step))


def _split(packed: Tensor, channels: int) -> tuple[Tensor, ...]:
    hidden = (packed.shape[-1] - channels) // 2
    return packed.split([hidden, hidden, channels], -1)


def _criss_cross_fwd_reference(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    n, c, height, width = x.shape
    a = accumulation_dtype(x)
    weight, bias, gamma = weight.to(a), bias.to(a), gamma.to(a)
    packed = x.permute(0, 2, 3, 1).flatten(1, 2).to(a) @ weight.t()
    packed = packed.add_(bias).unflatten(1, (height, width))
    # The keys' mean moves all logits of a query alike, so the softmax ignores it. Without it, gradients cancel less.
    keys = _split(packed, c)[1]
    keys -= keys.nan_to_num(0.0, 0.0, 0.0).mean((1, 2), keepdim=True)  # NaN stays where it is
    out, lse = empty_small(x, n, height, width, c), empty_small(x, n, height, width)
    for images in _groups(n, height, width):
        total = torch.empty_like(lse[images])
        rows, columns = _rows_and_columns(*_split(packed[images], c), out[images], lse[images], total)
        for q, k, v, o, top, count in rows.blocks():
            p = rows.energies(q, k)
            top.copy_(p.amax(3))
            p.sub_(top[..., None]).exp_()
            count.copy_(p.sum(3))
            o.copy_(p @ v)
        for q, k, v, o, top, count in columns.blocks():
            p = columns.energies(q, k)
            new_top = torch.maximum(top, p.amax(3))
            p.sub_(new_top[..., None]).exp_()
            shrunk = top.sub_(new_top).exp_()  # factor of the rows' sums
            count.mul_(shrunk).add_(p.sum(3))
            o.mul_(shrunk[..., None]).add_(p @ v).div_(count[..., None])
            top.copy_(new_top.add_(count.log()))
    y, attended = empty_map(x), out.permute(0, 3, 1, 2)
    if x.dtype == a:
        torch.addcmul(x, attended, gamma, out=y)
    else:
        y.copy_(attended * gamma + x)
    return y, packed, out, lse


def _criss_cross_bwd_reference(
    grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, packed: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    n, c, height, width = x.shape
    a = accumulation_dtype(x)
    weight, gamma = weight.to(a), gamma.to(a)
    dpacked, dgamma = torch.zeros_like(packed), torch.zeros_like(gamma)
    for images in _groups(n, height, width):
        upstream, dot = grad[images].permute(0, 2, 3, 1), torch.empty_like(lse[images])
        shared = (*_split(packed[images], c), *_split(dpacked[images], c), upstream, out[images], lse[images], dot)
        for lines in _rows_and_columns(*shared):
            for q, k, v, dq, dk, dv, g, o, norm, d in lines.blocks():
                g = g.to(a).contiguous()
                if not lines.columns:
                    d.copy_((g * o).sum(3))
                p = lines.energies(q, k).sub_(norm[..., None]).exp_()
                dv += p.mT @ g
                p *= (g @ v.mT).sub_(d[..., None])  # gradient of the logits
                dq += p @ k
                dk += p.mT @ q
        dgamma += dot.sum()
    hidden = (weight.shape[0] - c) // 2
    if height * width == 1:  # the softmax of a single logit is constant
        dpacked[..., : 2 * hidden] = 0.0
    dpacked = dpacked.mul_(gamma).flatten(1, 2)  # [N, H W, 2 R + C]
    dweight = torch.zeros_like(weight)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    for d, v in zip(dpacked.split(_PIXELS, 1), pixels.split(_PIXELS, 1), strict=True):
        dweight += (d.mT @ v.to(a)).sum(0)
    # The keys' part is zero but for rounding: it is set to zero, and removed from the gradient of their weights.
    dbias = dpacked.sum(1)  # [N, 2 R + C]
    dweight[hidden : 2 * hidden] -= dbias[:, hidden : 2 * hidden].t() @ pixels.mean(1, dtype=a)
    dbias = dbias.sum(0)
    dbias[hidden : 2 * hidden] = 0.0
    # The weights of a query add up to one, so the values' part is the sum of the gradients of the attended values. It
    # has no rounding of the weights. NaN comes from the values' own gradients.
    of_values = dbias[2 * hidden :]
    total = grad.sum((0, 2, 3), dtype=a) * gamma
    of_values.copy_(torch.where(of_values.isfinite(), total, of_values))
    dx = to_map(grad, x)
    if x.dtype != a:
        dx.copy_(grad + (dpacked @ weight).unflatten(1, (height, width)).permute(0, 3, 1, 2))
    elif dx.is_contiguous():
        dx.flatten(2).baddbmm_(weight.t().expand(n, -1, -1), dpacked.mT)
    else:
        dx.permute(0, 2, 3, 1).flatten(1, 2).baddbmm_(dpacked, weight.expand(n, -1, -1))
    return dx, dweight, dbias, dgamma


def _criss_cross_bwd_flops(grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, *_: Tensor) -> int:
    hidden = (weight.shape[0] - x.shape[1]) // 2

    def mathematics(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        split = (t.split([hidden, hidden, x.shape[1]]) for t in (weight, bias))
        (wq, wk, wv), (bq, bk, bv) = split
        return reference.criss_cross(x, wq, bq, wk, bk, wv, bv, gamma)

    return flops.count_gradient(mathematics, (x, weight, empty_small(x, weight.shape[0]), gamma))


_LAYERS = {"x": MAP, "weight": "C+2*d C : floating", "d": "1..", "gamma": "1 : floating"}
criss_cross_fwd = define(
    "criss_cross_fwd(Tensor x, Tensor weight, Tensor bias, Tensor gamma)"
    " -> (Tensor y, Tensor packed, Tensor out, Tensor lse)",
    None,
    _criss_cross_fwd_reference,
    ("like x", "N H W C+2*d", "N H W C", "N H W"),
    {**_LAYERS, "bias": "C+2*d : floating"},
)
criss_cross_bwd = define(
    "criss_cross_bwd(Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor packed, Tensor out, Tensor lse)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dgamma)",
    None,
    _criss_cross_bwd_reference,
    ("like x", "shape of weight", "C+2*d", "1"),
    {**_LAYERS, "grad": "like x", "packed": "N H W C+2*d", "out": "N H W C", "lse": "N H W"},
    flops_of=_criss_cross_bwd_flops,
)


def _pack(*tensors: Tensor) -> Tensor:
    """Concatenates the weights (or biases) of queries, keys and values."""
    return torch.cat([t.flatten(1) if t.dim() > 1 else t for t in tensors])


def _forward(
    x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor, wv: Tensor, bv: Tensor, gamma: Tensor
) -> tuple[Tensor, ...]:
    return criss_cross_fwd(x, _pack(wq, wk, wv), _pack(bq, bk, bv), gamma)


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any) -> tuple[Tensor | None, ...]:
    x, wq, _, wk, _, wv, _, gamma = tensors
    dx, dweight, dbias, dgamma = criss_cross_bwd(grad, x, _pack(wq, wk, wv), gamma, *small)
    sizes = [wq.shape[0], wk.shape[0], wv.shape[0]]
    dwq, dwk, dwv = (d.view(w.shape) for d, w in zip(dweight.split(sizes), (wq, wk, wv), strict=True))
    dbq, dbk, dbv = dbias.split(sizes)
    return dx, dwq, dbq, dwk, dbk, dwv, dbv, dgamma


CRISS_CROSS = composed_op("criss_cross", _forward, _gradients, reference.criss_cross)
