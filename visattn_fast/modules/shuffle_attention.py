"""Fused shuffle attention."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference
from ..reference.checks import check_feature_map


class FastShuffleAttention(reference.ShuffleAttention):
    """`reference.ShuffleAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layer do not run: the fused op reads its parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(shuffle_attention(x) + residual)``; see `functional.shuffle_attention`."""
        check_feature_map(x, self.channels)
        return functional.shuffle_attention(x, *self.weights(), self.gn.eps, residual=residual, activation=activation)
