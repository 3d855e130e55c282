"""Bahdanau's additive score, ``v^T tanh(q_i + k_j)``, in blocks of its hidden layer.

Only q, k and v are saved for backward, which computes the blocks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import flops
from .declare import composed_op
from .layout import accumulation_dtype, empty_small
from .library import define

# Elements of a block of the hidden layer: on a CPU what stays in cache, elsewhere what is worth a launch.
_LIMITS = {"cpu": 1 << 18}
_LIMIT = 1 << 26


def fits_a_block(q: Tensor, k: Tensor) -> bool:
    """True if the hidden layer is a single block, so that blocks would save no memory."""
    return q.numel() * k.shape[1] <= _LIMITS.get(q.device.type, _LIMIT)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields slices of the batch and of the queries: the blocks of the hidden layer. They depend on the sizes alone."""
    (batch, queries, hidden), keys = q.shape, k.shape[1]
    limit = _LIMITS.get(q.device.type, _LIMIT)
    rows = min(max(limit // (keys * hidden), 1), queries)
    images = max(limit // (rows * keys * hidden), 1) if rows == queries else 1
    for n in range(0, batch, images):
        for i in range(0, queries, rows):
            yield slice(n, n + images), slice(i, i + rows)


def _additive_score_fwd_reference(q: Tensor, k: Any, v: Tensor) -> Tensor:
    a = accumulation_dtype(q)
    scores = empty_small(q, *q.shape[:2], k.shape[1], dtype=q.dtype)
    q, k, v = q.to(a), k.to(a), v.to(a)
    for n, i in _blocks(q, k):
        scores[n, i] = (q[n, i, None] + k[n, None]).tanh_() @ v
    return scores


def _additive_score_bwd_reference(grad: Tensor, q: Tensor, k: Any, v: Tensor) -> tuple[Tensor, ...]:
    a = accumulation_dtype(q)
    grad, q, k = grad.to(a), q.to(a), k.to(a)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros(v.shape, dtype=a, device=v.device)
    for n, i in _blocks(q, k):
        t = (q[n, i, None] + k[n, None]).tanh_()  # [N, Q, K, h]
        g = grad[n, i].contiguous()
        dv += g.view(-1) @ t.reshape(-1, t.shape[3])
        slope = t.square_().neg_().add_(1).mul_(g[..., None])
        dq[n, i] = slope.sum(2)
        dk[n] += slope.sum(1)
    v = v.to(a)
    return dq.mul_(v), dk.mul_(v), dv


_SCORED = {"q": "N Q h : floating strided", "k": "N K h : floating strided", "v": "h : floating"}
additive_score_fwd = define(
    "additive_score_fwd(Tensor q, Tensor k, Tensor v) -> Tensor scores",
    None,
    _additive_score_fwd_reference,
    ("N Q K : q",),
    _SCORED,
)
additive_score_bwd = define(
    "additive_score_bwd(Tensor grad, Tensor q, Tensor k, Tensor v) -> (Tensor dq, Tensor dk, Tensor dv)",
    None,
    _additive_score_bwd_reference,
    ("shape of q", "shape of k", "shape of v"),
    {**_SCORED, "grad": "N Q K : q strided"},
    flops_of=lambda grad, *args: flops.count_gradient(reference.additive_score, args),
)


def _forward(q: Tensor, k: Any, v: Tensor) -> tuple[Tensor, ...]:
    return (additive_score_fwd(q, k, v),)


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any) -> tuple[Tensor | None, ...]:
    return additive_score_bwd(grad, *tensors)


ADDITIVE_SCORE = composed_op("additive_score", _forward, _gradients, reference.additive_score, in_torch="all")
