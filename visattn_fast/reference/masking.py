"""Masked softmax and padding, as every attention over sequences needs them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["masked_softmax"]


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension of the entries that ``mask`` leaves; a row that it leaves none is all zeros.

    Float16 scores saturate at the largest number of their dtype, so that overflow does not end in inf - inf.

    Args:
        scores: ``[..., Q, K]``.
        mask: bool, broadcastable to ``scores``; True: takes part.
    """
    if scores.dtype == torch.float16:
        largest = torch.finfo(scores.dtype).max
        scores = scores.clamp(-largest, largest)
    if mask is None:
        return scores.softmax(-1)
    kept = mask | ~mask.any(-1, keepdim=True)  # a row without any entry keeps all: its softmax is defined
    return scores.masked_fill(~kept, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)


def without_padding(
    query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with zeros wherever ``mask`` lets no attention through, so that NaN there cannot spread.

    Left alone, NaN would: a weight of zero times NaN is NaN, in results and in gradients.

    Args:
        query, key, value: ``[N, L, d]``. No key: the query is the key, too. No value: the key is the value, too.
        mask: ``[..., Q, K]``. Blank are keys and values that no query attends to, and queries that attend to nothing.
            Without a key, a mask that is the same for every query (Q = 1) blanks its positions as queries, too.
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
