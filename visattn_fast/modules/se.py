"""Fused squeeze-and-excitation."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastSE(reference.SE):
    """`reference.SE`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(se(x) + residual)``; see `functional.se`."""
        return functional.se(x, *self.weights(), residual=residual, activation=activation)
