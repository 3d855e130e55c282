"""Attention over the positions of a map without its map of weights.

On CPUs PyTorch's fused attention serves, for a few rows of queries at a time: their bias is a small part of the whole.
The result and the logarithms of the softmax sums (lse) are saved for backward. With a bias, backward computes the
weights of these rows again.

Far from zero values and keys would cancel: a score's gradient is the difference of two products with the upstream
gradient, of its value and of the result, and a row of them adds up to zero before it meets the keys. So forward
subtracts the mean of the values and adds it to the result. Backward subtracts both means, which leaves the gradients of
the scores as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.self_attention import split_heads
from . import flops
from .declare import composed_op
from .layout import accumulation_dtype, empty_small, zeros_small
from .library import define
from .shapes import Arguments

_FLASH = 16  # keys; with fewer, less than a vector, PyTorch's CPU kernel returns zeros for a query that is NaN
_BLOCK = 1 << 18  # weights, or biases, computed at a time
_LARGE = 256  # an lse beyond it is rounded by more than 1e-5, and so are weights computed from it

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _blocks(size: int, weights: int) -> Iterator[slice]:
    """Yields slices of ``size`` rows (or images), each with about ``_BLOCK`` weights if one row has ``weights``."""
    step = max(_BLOCK // max(weights, 1), 1)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class _Bias:
    """The terms added to the scores of some rows of queries: the relative bias, and -inf for masked keys.

    In an image whose keys are all masked, none counts as masked: its results are set to zero afterwards.
    """

    def __init__(self, qkv: Tensor, table: Tensor | None, key_mask: Tensor | None) -> None:
        _, self.height, self.width, _, _, _ = qkv.shape
        self.windows = self.shut = None
        dtype = accumulation_dtype(qkv)
        if table is not None:
            flipped = table.to(dtype).permute(2, 0, 1).flip(1, 2)
            # Query (y, x) takes the window at (H - 1 - y, W - 1 - x).
            windows = flipped.unfold(1, self.height, 1).unfold(2, self.width, 1)  # [heads, .., .., h, w]
            y, x = table.shape[0] // 2 + 1, table.shape[1] // 2 + 1
            self.windows = windows[:, y - self.height : y, x - self.width : x]
        if key_mask is not None:
            keys = key_mask.flatten(1)
            shut = torch.zeros(keys.shape, dtype=dtype, device=qkv.device)
            shut.masked_fill_(~keys & keys.any(1, keepdim=True), -torch.inf)
            self.shut = shut[:, None, None]  # [N, 1, 1, L]

    def relative(self, rows: slice) -> Tensor | None:
        """The relative bias of some rows, ``[heads, queries, L]``."""
        if self.windows is None:
            return None
        windows = self.windows[:, self.height - rows.stop : self.height - rows.start]
        return windows.flip(1, 2).flatten(3).flatten(1, 2)

    def blocks(self, row_weights: int) -> Iterator[tuple[slice, Tensor | None]]:
        """Yields slices of queries and their relative bias, if a row of the map has ``row_weights`` weights."""
        for rows in _blocks(self.height, row_weights):
            yield slice(rows.start * self.width, rows.stop * self.width), self.relative(rows)

    def whole_blocks(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Yields slices of queries and all terms of their scores, ``[1 or N, 1 or heads, 1 or queries, L]`` or None."""
        images = 1 if self.shut is None else self.shut.shape[0]
        for queries, bias in self.blocks(0 if self.windows is None else images * self.windows[:, 0].numel()):
            if bias is None:
                yield queries, self.shut
            else:
                yield queries, bias[None] if self.shut is None else bias + self.shut


def _centred(t: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns keys or values minus their mean over the keys that are not masked, and the mean ``[N, heads, 1, d]``.

    t ``[N, heads, L, d]`` has zeros at masked keys. Where the mean is not finite, 0 takes its place.
    """
    keys: Tensor | int = (
        t.shape[2] if key_mask is None else key_mask.flatten(1).sum(1).clamp_(min=1)[:, None, None, None]
    )
    mean = t.sum(2, keepdim=True, dtype=accumulation_dtype(t)) / keys
    mean.masked_fill_(~mean.isfinite(), 0.0)
    return (t - mean).to(t.dtype), mean


def _lie_far(t: Tensor, key_mask: Tensor | None) -> bool:
    """True if in some head the keys or values t ``[N, heads, L, d]`` lie farther from zero than they spread."""
    top = bottom = t
    if key_mask is not None:
        unseen = ~key_mask.flatten(1)[:, None, :, None]
        top, bottom = t.masked_fill(unseen, -torch.inf), t.masked_fill(unseen, torch.inf)
    top, bottom = top.amax(2), bottom.amin(2)
    return bool(((top + bottom).abs().amax(2) > 2 * (top - bottom).amax(2)).any())


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the attended values ``[N, heads, queries, d]`` and lse ``[N, heads, queries]``."""
    if q.is_cpu and k.shape[2] >= _FLASH:
        return _flash(q, k, v, attn_mask=bias, scale=scale)
    q, k, v = (t.to(accumulation_dtype(t)) for t in (q, k, v))
    scores = (q * scale) @ k.mT if bias is None else (q * scale) @ k.mT + bias
    lse = scores.logsumexp(3)
    return scores.sub_(lse[..., None]).exp_() @ v, lse


@torch.no_grad()  # an exported program calls the op without its autograd
def _attention_fwd_reference(
    qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    n, height, width, _, heads, d = qkv.shape
    out = empty_small(qkv, n, height * width, heads, d, dtype=qkv.dtype)
    lse = empty_small(qkv, n, heads, height * width)
    if n:
        q, k, v = split_heads(qkv, key_mask)
        v, mean = _centred(v, key_mask)
        for i, bias in _Bias(qkv, table, key_mask).whole_blocks():
            o, norm = _attend(q[:, :, i], k, v, bias, scale)
            o = o.add_(mean)
            if o.shape[2] == height * width:  # a single block is the whole result
                out, lse = o.transpose(1, 2).to(qkv.dtype).contiguous(), norm.contiguous()
            else:
                out[:, i], lse[:, :, i] = o.transpose(1, 2), norm
    if key_mask is not None:
        blind = ~key_mask.flatten(1).any(1)
        out.masked_fill_(blind[:, None, None, None], 0.0)
        lse.masked_fill_(blind[:, None, None], -torch.inf)
    return out.unflatten(1, (height, width)), lse


class _Products:
    """Attention weights in blocks: some rows of queries of some images at a time."""

    def __init__(self, qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, scale: float) -> None:
        _, height, width, _, self.heads, _ = qkv.shape
        a = accumulation_dtype(qkv)
        q, k, _ = split_heads(qkv, key_mask)
        self.q, self.k = q.to(a).contiguous(), _centred(k.to(a), key_mask)[0]
        self.scale, self.bias = scale, _Bias(qkv, table, key_mask)
        self.row_weights = self.heads * height * width**2

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields slices of images and of queries, and their weights ``[images heads, queries, L]``."""
        for queries, relative in self.bias.blocks(self.row_weights):
            count = queries.stop - queries.start
            for images in _blocks(self.q.shape[0], self.heads * count * self.q.shape[2]):
                yield images, queries, self._weights(images, queries, relative)

    def _weights(self, images: slice, queries: slice, relative: Tensor | None) -> Tensor:
        q, k = self.q[images, :, queries], self.k[images]
        weights = empty_small(q, *q.shape[:3], k.shape[2], dtype=q.dtype)
        if relative is not None:
            weights.copy_(relative)
        beta = 0 if relative is None else 1
        weights.flatten(0, 1).baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT, beta=beta, alpha=self.scale)
        if self.bias.shut is not None:
            weights += self.bias.shut[images]
        return weights.softmax(3).flatten(0, 1)


def _sum_images(dscores: Tensor, heads: int) -> Tensor:
    """Sums over images: ``[images heads, queries, L]`` -> ``[heads, queries, L]``."""
    return dscores if dscores.shape[0] == heads else dscores.unflatten(0, (-1, heads)).sum(0)


def _add_offsets(dtable: Tensor, dscores: Tensor, first: int, width: int) -> None:
    """Adds the gradients of scores to the gradients of the offsets between their query and key.

    Args:
        dtable: gradients of the offsets, ``[heads, 2H - 1, 2W - 1]``; changed in place.
        dscores: gradients of the scores, ``[heads, queries, L]``; queries are whole rows of the map.
        first: the first of these rows.
        width: width of the map.
    """
    d = dscores.unflatten(2, (-1, width)).unflatten(1, (-1, width)).transpose(2, 3)  # [heads, rows, h, w, w]
    # Written in rows of 2 w - 1 and read in rows of 2 w, each offset x' - x is a column, negative ones the last.
    skewed = zeros_small(d, *d.shape[:3], 2 * width**2, dtype=d.dtype)
    skewed[..., : width * (2 * width - 1)].unflatten(3, (width, -1))[..., :width].copy_(d)
    sums = skewed.unflatten(3, (width, 2 * width)).sum(3).roll(width - 1, 3)[..., : 2 * width - 1].flip(2, 3)
    height = d.shape[2]
    h, w = (size // 2 + 1 for size in dtable.shape[1:])
    for row, found in enumerate(sums.unbind(1), first):
        dtable[:, h + row - height : h + row, w - width : w + width - 1] += found


def _fused_gradients(g: Tensor, qkv: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Returns the gradient of qkv by PyTorch's fused attention; g ``[N, heads, L, d]`` is that of the result."""
    q, k, v = split_heads(qkv, key_mask)
    far = _lie_far(k, key_mask) or _lie_far(v, key_mask)
    v, mean = _centred(v, key_mask)
    bias = _Bias(qkv, None, key_mask).shut
    if far:  # what forward saved has too few digits
        k = _centred(k, key_mask)[0]
        o, lse = _attend(q, k, v, bias, scale)
    else:
        o = out.flatten(1, 2).transpose(1, 2) - mean
    gradients = _flash_backward(g, q, k, v, o.to(out.dtype), lse, 0.0, False, attn_mask=bias, scale=scale)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    for into, gradient in zip(split_heads(dqkv, None), gradients, strict=True):
        into.copy_(gradient)
    return dqkv


@torch.no_grad()
def _attention_bwd_reference(
    grad: Tensor, qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    n, _, width, _, heads, _ = qkv.shape
    a = accumulation_dtype(qkv)
    if key_mask is not None:
        grad = grad.masked_fill(~key_mask.flatten(1).any(1)[:, None, None, None, None], 0.0)
    g = grad.flatten(1, 2).transpose(1, 2)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # images without keys: -inf would make NaN
    if table is None and qkv.is_cpu and n and not lse.abs().amax() > _LARGE:
        return _fused_gradients(g, qkv, key_mask, out, lse, scale), empty_small(qkv, 0)
    dqkv = torch.zeros(qkv.shape, dtype=a, device=qkv.device)
    dtable = empty_small(qkv, *(table.permute(2, 0, 1).shape if table is not None else (0,))).zero_()
    dq, dk, dv = split_heads(dqkv, None)
    v = _centred(split_heads(qkv, key_mask)[2], key_mask)[0]
    g, v = (t.to(a).contiguous() for t in (g, v))
    products = _Products(qkv, table, key_mask, scale)
    for images, i, p in products.blocks():
        q, upstream = (t[images, :, i].flatten(0, 1) for t in (products.q, g))
        k, values = (t[images].flatten(0, 1) for t in (products.k, v))
        dv[images] += (p.mT @ upstream).unflatten(0, (-1, heads))
        ds = upstream @ values.mT
        ds.sub_(torch.linalg.vecdot(p, ds)[..., None]).mul_(p)
        dq[images, :, i] = (ds @ k).mul_(scale).unflatten(0, (-1, heads))
        dk[images] += (ds.mT @ q).mul_(scale).unflatten(0, (-1, heads))
        if table is not None:
            _add_offsets(dtable, _sum_images(ds, heads), i.start // width, width)
    return dqkv.to(qkv.dtype), dtable.permute(1, 2, 0).contiguous() if table is not None else dtable


@torch.no_grad()
def _attention_mean_reference(
    qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    n, height, width, _, heads, _ = qkv.shape
    total = empty_small(qkv, n, heads, height * width).zero_()
    for images, _, p in _Products(qkv, table, key_mask, scale).blocks():
        total[images] += p.sum(1).unflatten(0, (-1, heads))
    if key_mask is not None:
        total.masked_fill_(~key_mask.flatten(1).any(1)[:, None, None], 0.0)
    return total.div_(height * width).unflatten(2, (height, width))


_QKV = {"qkv": "N H W 3 heads d : floating rows", "key_mask": "N H W : bool"}
_QKV |= {"table": "2*th-1 2*tw-1 heads : floating", "th": "H..", "tw": "W.."}


def _empty_dqkv(given: Arguments) -> Tensor:
    return empty_small(given["qkv"], *given["qkv"].shape, dtype=given["qkv"].dtype)


def _empty_dtable(given: Arguments) -> Tensor:
    table = given["table"]
    return empty_small(given["qkv"], *((0,) if table is None else table.shape))


def _attention_bwd_flops(
    grad: Tensor, qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> int:
    return flops.count_gradient(_mathematics, (qkv, table, key_mask, scale))


attention_fwd = define(
    "attention_fwd(Tensor qkv, Tensor? table, Tensor? key_mask, float scale) -> (Tensor out, Tensor lse)",
    "self_attention",
    _attention_fwd_reference,
    ("N H W heads d : qkv", "N heads H*W"),
    _QKV,
)
attention_bwd = define(
    "attention_bwd(Tensor grad, Tensor qkv, Tensor? table, Tensor? key_mask, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dqkv, Tensor dtable)",
    "self_attention",
    _attention_bwd_reference,
    (_empty_dqkv, _empty_dtable),
    {**_QKV, "grad": "N H W heads d : qkv strided", "out": "N H W heads d : qkv", "lse": "N heads H*W"},
    flops_of=_attention_bwd_flops,
)
attention_mean = define(
    "attention_mean(Tensor qkv, Tensor? table, Tensor? key_mask, Tensor lse, float scale) -> Tensor mean",
    "self_attention",
    _attention_mean_reference,
    ("N heads H W",),
    {**_QKV, "lse": "N heads H*W"},
)


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any) -> tuple[Tensor | None, ...]:
    qkv, table, key_mask = tensors
    dqkv, dtable = attention_bwd(grad.contiguous(), qkv, table, key_mask, *small, *options)
    return dqkv, None if table is None else dtable, None


def _mathematics(qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    return reference.attention2d(qkv, table, key_mask, scale)[0]


# On CPUs the op is made of PyTorch's fused attention and its products.
ATTENTION2D = composed_op(
    "attention2d",
    attention_fwd,
    _gradients,
    _mathematics,
    saves_result=True,
    widens=False,
    tiny=196,
    pixels=(1, 2),
    in_torch="cpu",
)
