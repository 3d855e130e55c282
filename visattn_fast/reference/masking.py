"""Softmax and padding under a mask, for every kind of attention."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["masked_softmax"]


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension, over the entries that ``mask`` keeps. A row without any is all zeros.

    Float16 scores are clamped to their dtype's finite range: an overflow would give inf - inf.

    Args:
        scores: ``[..., Q, K]``.
        mask: bool, broadcastable to ``scores``; True: keep.
    """
    if scores.dtype == torch.float16:
        largest = torch.finfo(scores.dtype).max
        scores = scores.clamp(-largest, largest)
    if mask is None:
        return scores.softmax(-1)
    kept = mask | ~mask.any(-1, keepdim=True)  # an empty row keeps all entries, so that its softmax is defined
    return scores.masked_fill(~kept, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)


def without_padding(
    query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros every query, key and value that ``mask`` excludes from all attention, so that NaN there cannot spread.

    Zero weights do not stop NaN: zero times NaN is NaN, in results and in gradients.

    Args:
        query, key, value: ``[N, L, d]``. Without a key, the query takes its place; without a value, the key.
        mask: ``[..., Q, K]``. Zeroed are keys and values that no query attends to, and queries that attend to nothing.
            Without a key, a mask shared by all queries (Q = 1) also zeros its positions as queries.
    """
    if mask is None:
        key = query if key is None else key
        return query, key, key if value is None else value
    seen = mask.any(-2)[..., None]
    if key is None and mask.shape[-2] == 1:
        query = key = query.masked_fill(~seen, 0.0)
        return query, key, key if value is None else value.masked_fill(~seen, 0.0)
    key = query if key is None else key
    value = key if value is None else value
    blank = key.masked_fill(~seen, 0.0)
    query = query.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return query, blank, blank if value is key else value.masked_fill(~seen, 0.0)
