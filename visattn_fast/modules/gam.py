"""Fused global attention mechanism."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastGAM(reference.GAM):
    """`reference.GAM`, fused: same constructor, same ``state_dict``, same result, same running statistics.

    The convolutions and the first batch norm are PyTorch's, and hooks on them run; hooks on the other inner layers do
    not: the fused ops read their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(gam(x) + residual)``; see `functional.channel_mlp` and `functional.norm_gate`."""
        self.check(x, residual, activation)
        x = functional.channel_mlp(x, *self.channel_weights())
        m = self.convolved(x.to(self.conv1.weight.dtype))
        step = self.norm_step()
        return functional.norm_gate(x, m, *self.norm_weights(), **step, residual=residual, activation=activation)
