"""Attention of sequence-to-sequence models, Bahdanau's and Luong's, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_positive
from .masking import masked_softmax, without_padding
from .sequence_checks import check_key_value, check_lengths, check_mask, check_position, check_sequence

__all__ = ["SequenceAttention", "additive_score"]

SCORES = ("dot", "general", "concat")


def additive_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``v^T tanh(q_i + k_j)``: ``[N, Q, h]``, ``[N, K, h]`` and ``[h]`` -> ``[N, Q, K]``. Makes ``[N, Q, K, h]``."""
    return torch.tanh(q[:, :, None] + k[:, None]) @ v


class SequenceAttention(nn.Module):
    """Global and local attention over a sequence.

    ``context = sum_j softmax_j(score(q, k_j)) value_j`` with one of three scores, without a scale:

    - ``"dot"``: ``q^T k`` (Luong et al., "Effective approaches to attention-based neural machine translation", 2015);
    - ``"general"``: ``q^T W k`` (Luong);
    - ``"concat"``: ``v^T tanh(W_q q + W_k k)``, the additive score (Bahdanau et al., "Neural machine translation by
      jointly learning to align and translate", 2015). Its hidden layer is ``[N, Q, K, hidden_size]``.

    With a ``window`` D the softmax takes only keys within +-D of a position p, which is given, or the query's own
    index (Luong's local-m), or predicted (local-p): ``p = K sigmoid(v_p^T tanh(W_p q))``, and the weights are then
    multiplied by ``exp(-(j - p)^2 / (2 (D/2)^2))``, as published without another normalisation.

    Args:
        score: ``"dot"``, ``"general"`` or ``"concat"``.
        query_size: size of a query.
        key_size: size of a key; None: as a query's.
        hidden_size: units of the additive score and of the position's prediction; None: as a query's size.
        window: D of local attention, or None.
        predictive: whether the position is predicted (local-p).

    Raises:
        ValueError: an unknown score, sizes that do not fit, ``predictive`` without a window.

    ``state_dict``: ``W.weight`` ``[key_size, query_size]`` (general); ``W_q.weight``, ``W_k.weight`` and ``v.weight``
    (concat); ``W_p.weight`` and ``v_p.weight`` (predictive).
    """

    def __init__(
        self,
        score: str,
        query_size: int,
        key_size: int | None = None,
        hidden_size: int | None = None,
        window: int | None = None,
        predictive: bool = False,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {score!r}")
        key_size = query_size if key_size is None else key_size
        hidden_size = query_size if hidden_size is None else hidden_size
        for name, size in {"query_size": query_size, "key_size": key_size, "hidden_size": hidden_size}.items():
            check_positive(name, size)
        if window is not None:
            check_positive("window", window)
        if predictive and window is None:
            raise ValueError("a predicted position needs a window")
        if score == "dot" and key_size != query_size:
            raise ValueError(f"key_size must be query_size={query_size} for the dot score, got {key_size}")
        self.score, self.window, self.predictive = score, window, predictive
        self.query_size, self.key_size = query_size, key_size
        if score == "general":
            self.W = nn.Linear(query_size, key_size, bias=False)
        elif score == "concat":
            self.W_q = nn.Linear(query_size, hidden_size, bias=False)
            self.W_k = nn.Linear(key_size, hidden_size, bias=False)
            self.v = nn.Linear(hidden_size, 1, bias=False)
        if predictive:
            self.W_p = nn.Linear(query_size, hidden_size, bias=False)
            self.v_p = nn.Linear(hidden_size, 1, bias=False)

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
        """Attention of every query over the keys.

        Args:
            query: ``[N, Q, query_size]``.
            key: ``[N, K, key_size]``.
            value: ``[N, K, d]`` with any d; None: the key.
            mask: bool, broadcastable to ``[N, Q, K]``; True: the query attends to the key.
            key_lengths: ``[N]``, integers; keys from there on are padding. They bound the predicted positions, too.
            position: the centre of the window, broadcastable to ``[N, Q]``, in keys from 0; None: the query's index.
            need_weights: whether to return the weights.

        What lies at positions shut out of all attention, NaN included, reaches neither results nor gradients; a query
        that may attend to nothing gets zeros.

        Returns:
            The context ``[N, Q, d]``, and the weights ``[N, Q, K]`` or None.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape or device that does not fit; a position without a window, or beside a predicted one.
        """
        query, key, value, mask, gaussian = self.prepare(query, key, value, mask, key_lengths, position)
        weights = masked_softmax(self.scores(query, key), mask)
        if gaussian is not None:
            weights = weights * gaussian.to(weights.dtype)
        return weights.to(value.dtype) @ value, weights if need_weights else None

    def prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        position: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Checked arguments of forward -> query, key and value without padding, the whole mask, the Gaussian."""
        check_sequence("query", query, self.query_size)
        check_key_value(query, key, value, self.key_size, None)
        (N, Q), K = query.shape[:2], key.shape[1]
        mask = check_mask(mask, (N, Q, K), query)
        check_lengths(key_lengths, N, query)
        check_position(position, (N, Q), query, self.window is not None and not self.predictive)
        index = torch.arange(K, device=query.device)
        if key_lengths is not None:
            mask = _both(mask, (index < key_lengths[:, None])[:, None])
        if self.window is None:
            return *without_padding(query, key, value, mask), mask, None
        if self.predictive:
            shut_out = None if mask is None else ~mask.any(-1, keepdim=True)
            source = query if shut_out is None else query.masked_fill(shut_out, 0.0)
            share = self.v_p(torch.tanh(self.W_p(source)))[..., 0]
            share = torch.sigmoid(share.to(torch.promote_types(share.dtype, torch.float32)))
            position = share * (K if key_lengths is None else key_lengths[:, None])
        elif position is None:
            position = torch.arange(Q, device=query.device)
        distance = index - torch.atleast_2d(position)[..., None]
        mask = _both(mask, distance.detach().abs() <= self.window)
        gaussian = torch.exp(-2 * (distance / self.window) ** 2) if self.predictive else None
        return *without_padding(query, key, value, mask), mask, gaussian

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """``[N, Q, query_size]`` and ``[N, K, key_size]`` -> ``[N, Q, K]``."""
        if self.score == "concat":
            return additive_score(self.W_q(query), self.W_k(key), self.v.weight[0])
        return (self.W(query) if self.score == "general" else query) @ key.transpose(1, 2)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        position: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``{"position": weights}``, ``[N, Q, K]``; arguments as those of forward."""
        weights = SequenceAttention.forward(self, query, key, value, mask, key_lengths, position)[1]
        assert weights is not None
        return {"position": weights}

    def extra_repr(self) -> str:
        return f"score={self.score!r}, window={self.window}, predictive={self.predictive}"


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other
