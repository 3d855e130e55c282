"""Fused local attention."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastLocalAttention(reference.LocalAttention):
    """`reference.LocalAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(local_attention(x) + residual)``; see `functional.local_attention`."""
        return functional.local_attention(x, *self.weights(), residual=residual, activation=activation)
