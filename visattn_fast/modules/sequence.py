"""Attention over sequences: PyTorch's fused attention where no weights are asked for, blocks for additive scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional, reference
from ..backends import reference_asked


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
        return functional.masked_attention(q, k, v, mask, self.d_k**-0.5), None


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
        return functional.masked_attention(query, key, value, mask, 1.0), None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """See `reference.SequenceAttention.scores`."""
        if self.score != "concat" or reference_asked():
            return super().scores(query, key)
        return functional.additive_score(self.W_q(query), self.W_k(key), self.v.weight[0])
