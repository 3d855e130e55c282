"""Attention over sequences, without maps of weights or hidden layers in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import reference_asked
from ..ops.additive_score import ADDITIVE_SCORE, fits_a_block
from ..ops.autograd import in_autocast
from ..reference.as_built import as_built
from .serve import serve

__all__ = ["FastAttentionLayer", "FastAttentionPooling", "FastSequenceAttention", "additive_score", "masked_attention"]

_SMALL = 1 << 16  # weights; below, PyTorch's fused attention trains more slowly on a CPU than matrix products


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` without its map of weights, by `torch.nn.functional.scaled_dot_product_attention`.

    Matrix products serve training on a CPU if there are few weights.

    Args:
        q: ``[N, Q, d]``.
        k: ``[N, K, d]``.
        v: ``[N, K, e]``.
        mask: bool, two or three dimensions, broadcastable to ``[N, Q, K]``; True: the query attends to the key. A query
            without any key gives zeros.
        scale: factor of the logits.

    Returns:
        ``[N, Q, e]``. The double backward is PyTorch's, which not every device has.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if training and q.device.type == "cpu" and q.shape[0] * q.shape[1] * k.shape[1] <= _SMALL:
        weights = reference.masked_softmax((q * scale) @ k.transpose(1, 2), mask)
        return weights.to(v.dtype) @ v
    size = v.shape[2]
    width = max(q.shape[2], size)  # kernels without a map of weights need d == e
    q, k, v = (F.pad(t, (0, width - t.shape[2]))[:, None] if t.shape[2] < width else t[:, None] for t in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)[:, 0, :, :size]
    seeing = mask.any(-1, keepdim=True)
    kept = mask | ~seeing  # kernels need a key in every row: rows without one keep all, and become 0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None] if kept.dim() == 3 else kept, scale=scale)
    return out[:, 0, :, :size].masked_fill(~seeing, 0.0)


def additive_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bahdanau's additive score, ``v^T tanh(q_i + k_j)``, in blocks.

    The hidden layer ``[N, Q, K, h]`` is not stored; the backward pass computes it again. Exception: a hidden layer of a
    single block is computed in plain PyTorch.

    Args:
        q: ``[N, Q, h]``.
        k: ``[N, K, h]``.
        v: ``[h]``.

    Returns:
        The scores, ``[N, Q, K]``.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", ICLR 2015.
    """
    if fits_a_block(q, k):
        return ADDITIVE_SCORE.plain(q, k, v)
    return serve(ADDITIVE_SCORE, (q, k, v))


class FastAttentionLayer(reference.AttentionLayer):
    """Fast `reference.AttentionLayer`: same constructor, same ``state_dict``, same result.

    If no weights are asked for, PyTorch's ``scaled_dot_product_attention`` serves, and no ``[N, Q, K]`` map is stored.
    Otherwise the reference serves: nothing is faster than its matrix products. The linear layers are PyTorch's, and
    hooks on them run.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what `reference.AttentionLayer` does, with the same arguments."""
        if need_weights or reference_asked():
            return super().forward(query, key, value, mask, need_weights)
        q, k, v, mask = self.project(query, key, value, mask)
        return masked_attention(q, k, v, mask, self.d_k**-0.5), None


class FastAttentionPooling(reference.AttentionPooling):
    """Fast `reference.AttentionPooling`: same ``state_dict``, same result, fewer passes over the ``[..., Q, K]`` map.

    Queries and shared keys are multiplied by the width before they are subtracted, and a matrix product sums shared
    values.
    """

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what `reference.AttentionPooling` does, with the same arguments."""
        if reference_asked():
            return super().forward(queries, keys, values, mask, need_weights)
        queries, keys, values, mask = self.pairs(queries, keys, values, mask)
        width = self.w * 0.5**0.5
        if keys.shape[-2] == 1:
            distance = (queries * width)[..., None] - keys * width
        else:
            distance = (queries[..., None] - keys) * width
        weights = reference.masked_softmax(-distance.square(), mask)
        shared = values.shape[-2] == 1 and not in_autocast(values)  # autocast rounds products
        out = (weights @ values.to(weights.dtype).mT)[..., 0] if shared else (weights * values).sum(-1)
        return out, weights if need_weights else None


class FastSequenceAttention(reference.SequenceAttention):
    """Fast `reference.SequenceAttention`: same constructor, same ``state_dict``, same result.

    `additive_score` computes the additive score in blocks, and again in the backward pass: its hidden layer
    ``[N, Q, K, h]`` is never in memory. For the other scores, PyTorch's ``scaled_dot_product_attention`` serves if no
    weights are asked for and no position is predicted; otherwise the reference serves. The linear layers are PyTorch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        position: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what `reference.SequenceAttention` does, with the same arguments."""
        if need_weights or self.predictive or self.score == "concat" or reference_asked():
            return super().forward(query, key, value, mask, key_lengths, position, need_weights)
        query, key, value, mask, _ = self.prepare(query, key, value, mask, key_lengths, position)
        query = self.W(query) if self.score == "general" else query
        if in_autocast(query):
            query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
        return masked_attention(query, key, value, mask, 1.0), None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the logits ``[N, Q, K]``, as `reference.SequenceAttention` does."""
        if self.score != "concat" or reference_asked() or not as_built(self, query, self.SCORE):
            return super().scores(query, key)
        return additive_score(self.W_q(query), self.W_k(key), self.v.weight[0])
