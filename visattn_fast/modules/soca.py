"""Fused second-order channel attention."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastSOCA(reference.SOCA):
    """`reference.SOCA`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused ops read their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(soca(x) + residual)``; see `functional.soca`."""
        return functional.soca(x, *self.weights(), residual=residual, activation=activation)
