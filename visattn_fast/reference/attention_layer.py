"""Scaled dot-product attention with its three projections, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor, nn

from .checks import check_positive
from .masking import masked_softmax, without_padding
from .sequence_checks import check_key_value, check_mask, check_sequence

__all__ = ["AttentionLayer"]


class AttentionLayer(nn.Module):
    """Scaled dot-product attention (Vaswani et al., "Attention is all you need", NeurIPS 2017), one head.

    ``softmax(Q K^T / sqrt(d_k)) V`` with ``Q = W_q query``, ``K = W_k key``, ``V = W_v value``.

    Args:
        d_model: size of query, key and value.
        d_k: size of Q and K.
        d_v: size of V.

    Raises:
        ValueError: a non-positive argument.

    ``state_dict``: ``W_q.weight`` and ``W_k.weight`` ``[d_k, d_model]``, ``W_v.weight`` ``[d_v, d_model]``.
    """

    def __init__(self, d_model: int, d_k: int, d_v: int) -> None:
        super().__init__()
        for name, size in {"d_model": d_model, "d_k": d_k, "d_v": d_v}.items():
            check_positive(name, size)
        self.d_model, self.d_k, self.d_v = d_model, d_k, d_v
        self.W_q = nn.Linear(d_model, d_k, bias=False)
        self.W_k = nn.Linear(d_model, d_k, bias=False)
        self.W_v = nn.Linear(d_model, d_v, bias=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of every query over all keys.

        Args:
            query: ``[N, Q, d_model]``.
            key, value: ``[N, K, d_model]``. No key: the query (self-attention). No value: the key.
            mask: bool, broadcastable to ``[N, Q, K]``; True: the query attends to the key. ``padding[:, None]`` for a
                padding mask ``[N, K]``. What lies at positions that it shuts out of all attention, NaN included,
                reaches neither results nor gradients; a query that may attend to nothing gets zeros.
            need_weights: whether to return the weights.

        Returns:
            The output ``[N, Q, d_v]``, and the weights ``[N, Q, K]`` or None.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape or device that does not fit.
        """
        q, k, v, mask = self.project(query, key, value, mask)
        weights = masked_softmax((q * self.d_k**-0.5) @ k.transpose(1, 2), mask)
        return weights.to(v.dtype) @ v, weights if need_weights else None

    def project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Checked arguments of forward -> Q ``[N, Q, d_k]``, K ``[N, K, d_k]``, V ``[N, K, d_v]``, mask."""
        check_sequence("query", query, self.d_model)
        check_key_value(query, key, value, self.d_model, self.d_model)
        mask = check_mask(mask, (*query.shape[:2], query.shape[1] if key is None else key.shape[1]), query)
        query, key, value = without_padding(query, key, value, mask)
        return self.W_q(query), self.W_k(key), self.W_v(value), mask

    def attention(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``{"position": weights}``, ``[N, Q, K]``; arguments as those of forward."""
        weights = AttentionLayer.forward(self, query, key, value, mask)[1]
        assert weights is not None
        return {"position": weights}

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_k={self.d_k}, d_v={self.d_v}"
