"""Attention over sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import reference_asked
from ..ops.additive_score import ADDITIVE_SCORE, fits_a_block
from .serve import serve

__all__ = ["FastAttentionLayer", "FastAttentionPooling", "FastSequenceAttention", "additive_score", "masked_attention"]

_SMALL = 1 << 16  # weights; below, PyTorch's fused attention takes longer on a CPU than its products, forward and back


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` without its map of weights, by `torch.nn.functional.scaled_dot_product_attention`.

    Training on a CPU with few weights is left to matrix products.

    Args:
        q: ``[N, Q, d]``.
        k: ``[N, K, d]``.
        v: ``[N, K, e]``.
        mask: bool, two or three dimensions, broadcastable to ``[N, Q, K]``; True: attends. A row without any is zeros.

    Returns:
        ``[N, Q, e]``. Its double backward is PyTorch's: not every device has one.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if training and q.device.type == "cpu" and q.shape[0] * q.shape[1] * k.shape[1] <= _SMALL:
        weights = reference.masked_softmax((q * scale) @ k.transpose(1, 2), mask)
        return weights.to(v.dtype) @ v
    size = v.shape[2]
    width = max(q.shape[2], size)  # the kernels that make no map want one size
    q, k, v = (F.pad(t, (0, width - t.shape[2]))[:, None] if t.shape[2] < width else t[:, None] for t in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)[:, 0, :, :size]
    seeing = mask.any(-1, keepdim=True)
    kept = mask | ~seeing  # a softmax of nothing is left to no kernel
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None] if kept.dim() == 3 else kept, scale=scale)
    return out[:, 0, :, :size].masked_fill(~seeing, 0.0)


def additive_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``v^T tanh(q_i + k_j)``: ``[N, Q, h]``, ``[N, K, h]`` and ``[h]`` -> ``[N, Q, K]``, in blocks.

    The hidden layer ``[N, Q, K, h]`` is neither stored nor kept for the backward pass, which computes it again, unless
    it is one block anyway.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", ICLR 2015.
    """
    if fits_a_block(q, k):
        return ADDITIVE_SCORE.plain(q, k, v)
    return serve(ADDITIVE_SCORE, (q, k, v))


class FastAttentionLayer(reference.AttentionLayer):
    """`reference.AttentionLayer`: same constructor, same ``state_dict``, same result.

    Without weights it is PyTorch's ``scaled_dot_product_attention``, and no ``[N, Q, K]`` map is made; with weights, it
    is the reference, of matrix products that PyTorch does best.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """See `reference.AttentionLayer.forward`."""
        if need_weights or reference_asked():
            return super().forward(query, key, value, mask, need_weights)
        q, k, v, mask = self.project(query, key, value, mask)
        return masked_attention(q, k, v, mask, self.d_k**-0.5), None


class FastAttentionPooling(reference.AttentionPooling):
    """`reference.AttentionPooling`: same ``state_dict``, same result.

    The width is applied to queries and shared keys before they meet, and shared values are one matrix product: fewer
    passes over the ``[..., Q, K]`` map, each way.
    """

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """See `reference.AttentionPooling.forward`."""
        if reference_asked():
            return super().forward(queries, keys, values, mask, need_weights)
        queries, keys, values, mask = self.pairs(queries, keys, values, mask)
        width = self.w * 0.5**0.5
        if keys.shape[-2] == 1:
            distance = (queries * width)[..., None] - keys * width
        else:
            distance = (queries[..., None] - keys) * width
        weights = reference.masked_softmax(-distance.square(), mask)
        shared = values.shape[-2] == 1 and not torch.is_autocast_enabled(values.device.type)  # which rounds products
        out = (weights @ values.to(weights.dtype).mT)[..., 0] if shared else (weights * values).sum(-1)
        return out, weights if need_weights else None


class FastSequenceAttention(reference.SequenceAttention):
    """`reference.SequenceAttention`: same constructor, same ``state_dict``, same result.

    The additive score is computed in blocks, and again in the backward pass: its hidden layer ``[N, Q, K, h]`` is never
    in memory. The scores that are products are PyTorch's ``scaled_dot_product_attention`` where no weights are asked
    for and no position is predicted, and else the reference.
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
        """See `reference.SequenceAttention.forward`."""
        if need_weights or self.predictive or self.score == "concat" or reference_asked():
            return super().forward(query, key, value, mask, key_lengths, position, need_weights)
        query, key, value, mask, _ = self.prepare(query, key, value, mask, key_lengths, position)
        query = self.W(query) if self.score == "general" else query
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
        return masked_attention(query, key, value, mask, 1.0), None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """See `reference.SequenceAttention.scores`."""
        if self.score != "concat" or reference_asked():
            return super().scores(query, key)
        return additive_score(self.W_q(query), self.W_k(key), self.v.weight[0])
