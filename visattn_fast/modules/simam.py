"""Fused SimAM."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastSimAM(reference.SimAM):
    """`reference.SimAM`, fused: same constructor, same result."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(simam(x) + residual)``; see `functional.simam`."""
        return functional.simam(x, self.e_lambda, residual=residual, activation=activation)
