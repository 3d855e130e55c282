"""Fused CBAM and its two halves."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastChannelAttention(reference.ChannelAttention):
    """`reference.ChannelAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> gate ``[N, C, 1, 1]``; see `functional.channel_attention`."""
        return functional.channel_attention(x, *self.weights())


class FastSpatialAttention(reference.SpatialAttention):
    """`reference.SpatialAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layer do not run: the fused op reads its parameter alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> gate ``[N, 1, H, W]``; see `functional.spatial_attention`."""
        return functional.spatial_attention(x, *self.weights())


class FastCBAM(reference.CBAM):
    """`reference.CBAM`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner modules do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(cbam(x) + residual)``; see `functional.cbam`."""
        return functional.cbam(x, *self.weights(), residual=residual, activation=activation)
