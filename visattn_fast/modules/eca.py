"""Fused efficient channel attention."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference
from ..reference.checks import check_feature_map


class FastECA(reference.ECA):
    """`reference.ECA`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layer do not run: the fused op reads its parameter alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(eca(x) + residual)``; see `functional.eca`."""
        check_feature_map(x, self.channels)
        return functional.eca(x, *self.weights(), residual=residual, activation=activation)
