"""Fused coordinate attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional, reference
from ..reference.batch_norm import batch_norm_step
from ..reference.checks import check_feature_map


class FastCoordAtt(reference.CoordAtt):
    """`reference.CoordAtt`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(coord_att(x) + residual)``; see `functional.coord_att`."""
        check_feature_map(x, self.channels)
        training, momentum = batch_norm_step(self.bn1)
        mode: dict[str, Any] = {"training": training, "momentum": momentum, "eps": self.bn1.eps}
        return functional.coord_att(x, *self.weights(), **mode, residual=residual, activation=activation)
