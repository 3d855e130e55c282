"""Attention pooling of scalars by a Gaussian kernel, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .masking import masked_softmax
from .sequence_checks import check_mask, check_pooling

__all__ = ["AttentionPooling"]


class AttentionPooling(nn.Module):
    """Nadaraya-Watson kernel regression with a learned width (Zhang et al., "Dive into Deep Learning", 11.2).

    ``f(q) = sum_i softmax_i(-((q - k_i) w)^2 / 2) v_i`` of scalar queries, keys and values.

    ``state_dict``: ``w`` ``[1]``, the inverse width of the kernel; it starts uniform in [0, 1).
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(1))

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The regression at every query.

        Args:
            queries: ``[..., Q]``.
            keys, values: ``[..., K]``, the same for every query, or ``[..., Q, K]``, each query's own.
            mask: bool, broadcastable to ``[..., Q, K]``; True: the pair takes part. NaN in keys and values that it
                leaves out reaches neither results nor gradients; a query without any pair gets zero.
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
        """Checked arguments, keys and values as ``[..., 1 or Q, K]``; zeros where the mask shuts them out."""
        keys, values = check_pooling(queries, keys, values)
        mask = check_mask(mask, (*queries.shape, keys.shape[-1]), queries)
        if mask is None:
            return queries, keys, values, None
        by_any = mask.any(-2, keepdim=True)
        keys, values = (t.masked_fill(~(by_any if t.shape[-2] == 1 else mask), 0.0) for t in (keys, values))
        return queries.masked_fill(~mask.any(-1), 0.0), keys, values, mask

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """``{"position": weights}``, ``[..., Q, K]``; arguments as those of forward."""
        weights = AttentionPooling.forward(self, queries, keys, values, mask)[1]
        assert weights is not None
        return {"position": weights}
