"""Attention over sequences and sets, in plain PyTorch: Vaswani's, Bahdanau's, Luong's, and a kernel regression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .as_built import LINEAR_WITHOUT_BIAS, Layers
from .checks import check_positive
from .masking import masked_softmax, without_padding
from .sequence_checks import check_key_value, check_lengths, check_mask, check_pooling, check_position, check_sequence

__all__ = ["AttentionLayer", "AttentionPooling", "SequenceAttention", "additive_score"]

SCORES = ("dot", "general", "concat")


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
        """Every query attends to all keys.

        Args:
            query: ``[N, Q, d_model]``.
            key, value: ``[N, K, d_model]``. Without a key, the query takes its place (self-attention). Without a value,
                the key takes its place.
            mask: bool, broadcastable to ``[N, Q, K]``; True: the query attends to the key. Pass a padding mask
                ``[N, K]`` as ``padding[:, None]``. Positions that get no attention may hold anything, even NaN,
                without effect on results or gradients. A query without any key gives zeros.
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
        """Checks the arguments of forward. Returns Q ``[N, Q, d_k]``, K ``[N, K, d_k]``, V ``[N, K, d_v]`` and mask."""
        check_sequence("query", query, self.d_model)
        check_key_value(query, key, value, self.d_model, self.d_model)
        mask = check_mask(mask, (*query.shape[:2], query.shape[1] if key is None else key.shape[1]), query)
        query, key, value = without_padding(query, key, value, mask)
        return self.W_q(query), self.W_k(key), self.W_v(value), mask

    def attention(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``{"position": weights}``, ``[N, Q, K]``; arguments as for forward."""
        weights = AttentionLayer.forward(self, query, key, value, mask)[1]
        assert weights is not None
        return {"position": weights}

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_k={self.d_k}, d_v={self.d_v}"


class AttentionPooling(nn.Module):
    """Nadaraya-Watson kernel regression with a learned width (Zhang et al., "Dive into Deep Learning", 11.2).

    ``f(q) = sum_i softmax_i(-((q - k_i) w)^2 / 2) v_i`` for scalar queries, keys and values.

    ``state_dict``: ``w`` ``[1]``, the inverse width of the Gaussian kernel, initialised uniformly in [0, 1).
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(1))

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluates the regression at every query.

        Args:
            queries: ``[..., Q]``.
            keys, values: ``[..., K]``, shared by all queries, or ``[..., Q, K]``, one set for each query.
            mask: bool, broadcastable to ``[..., Q, K]``; True: the pair counts. Masked keys and values may hold
                anything, even NaN, without effect on results or gradients. A query without any pair gives zero.
            need_weights: whether to return the weights.

        Returns:
            The output ``[..., Q]``, and the weights ``[..., Q, K]`` or None.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape or device that does not fit.
        """
        queries, keys, values, mask = self.pairs(queries, keys, values, mask)
        distance = (queries[..., None] - keys) * self.w
        weights = masked_softmax(-(distance**2) / 2, mask)
        return (weights * values).sum(-1), weights if need_weights else None

    def pairs(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Checks the arguments. Returns them with keys and values as ``[..., 1 or Q, K]``, zeros where masked."""
        keys, values = check_pooling(queries, keys, values)
        mask = check_mask(mask, (*queries.shape, keys.shape[-1]), queries)
        if mask is None:
            return queries, keys, values, None
        by_any = mask.any(-2, keepdim=True)
        keys, values = (t.masked_fill(~(by_any if t.shape[-2] == 1 else mask), 0.0) for t in (keys, values))
        return queries.masked_fill(~mask.any(-1), 0.0), keys, values, mask

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """``{"position": weights}``, ``[..., Q, K]``; arguments as for forward."""
        weights = AttentionPooling.forward(self, queries, keys, values, mask)[1]
        assert weights is not None
        return {"position": weights}


def additive_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``v^T tanh(q_i + k_j)``: ``[N, Q, h]``, ``[N, K, h]``, ``[h]`` -> ``[N, Q, K]``. Allocates ``[N, Q, K, h]``."""
    return torch.tanh(q[:, :, None] + k[:, None]) @ v


class SequenceAttention(nn.Module):
    """Global and local attention over a sequence.

    ``context = sum_j softmax_j(score(q, k_j)) value_j`` with one of three scores, none of them scaled:

    - ``"dot"``: ``q^T k`` (Luong et al., "Effective approaches to attention-based neural machine translation", 2015);
    - ``"general"``: ``q^T W k`` (Luong);
    - ``"concat"``: ``v^T tanh(W_q q + W_k k)``, the additive score (Bahdanau et al., "Neural machine translation by
      jointly learning to align and translate", 2015). Its hidden layer is ``[N, Q, K, hidden_size]``.

    With a ``window`` D the softmax covers only keys within +-D of a position p. The caller passes p, or p is the
    query's own index (Luong's local-m), or the module predicts it (local-p): ``p = K sigmoid(v_p^T tanh(W_p q))``.
    Local-p then multiplies the weights by ``exp(-(j - p)^2 / (2 (D/2)^2))`` and, as published, does not normalise them
    again.

    Args:
        score: ``"dot"``, ``"general"`` or ``"concat"``.
        query_size: size of a query.
        key_size: size of a key; None: ``query_size``.
        hidden_size: units of the additive score and of the position's prediction; None: ``query_size``.
        window: D for local attention, None for global attention.
        predictive: whether the module predicts the position (local-p).

    Raises:
        ValueError: an unknown score, sizes that do not fit, ``predictive`` without a window.

    ``state_dict``: ``W.weight`` ``[key_size, query_size]`` (general); ``W_q.weight``, ``W_k.weight`` and ``v.weight``
    (concat); ``W_p.weight`` and ``v_p.weight`` (predictive).
    """

    SCORE = Layers({"v": LINEAR_WITHOUT_BIAS})

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
        """Every query attends to the keys.

        Positions that get no attention may hold anything, even NaN, without effect on results or gradients. A query
        without any key gives zeros.

        Args:
            query: ``[N, Q, query_size]``.
            key: ``[N, K, key_size]``.
            value: ``[N, K, d]`` with any d; None: the key.
            mask: bool, broadcastable to ``[N, Q, K]``; True: the query attends to the key.
            key_lengths: ``[N]``, integers; keys from this index on are padding. A predicted position lies below it.
            position: the centre of the window as an index of keys, broadcastable to ``[N, Q]``; None: the query's
                index.
            need_weights: whether to return the weights.

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
        """Checks the arguments of forward. Returns query, key and value without padding, the full mask, the Gaussian.

        The mask includes ``key_lengths`` and the window. The Gaussian is None unless the position is predicted.
        """
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
        """Scores of all pairs: ``[N, Q, query_size]`` and ``[N, K, key_size]`` -> ``[N, Q, K]``."""
        if self.score == "concat":
            hidden = torch.tanh(self.W_q(query)[:, :, None] + self.W_k(key)[:, None])
            scores: Tensor = self.v(hidden)
            return scores[..., 0]
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
        """``{"position": weights}``, ``[N, Q, K]``; arguments as for forward."""
        weights = SequenceAttention.forward(self, query, key, value, mask, key_lengths, position)[1]
        assert weights is not None
        return {"position": weights}

    def extra_repr(self) -> str:
        return f"score={self.score!r}, window={self.window}, predictive={self.predictive}"


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    """The conjunction of both masks; None masks nothing."""
    return other if mask is None else mask & other
