"""Fused scSE."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastscSE(reference.scSE):
    """`reference.scSE`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(scse(x) + residual)``; see `functional.scse`."""
        return functional.scse(x, *self.weights(), residual=residual, activation=activation)
