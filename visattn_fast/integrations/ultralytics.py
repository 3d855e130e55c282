"""Ultralytics' CBAM and its halves, whose own layers run on pooled values and maps. Source: ultralytics 8."""

from __future__ import annotations

from torch import Tensor
from ultralytics.nn.modules.conv import CBAM, ChannelAttention, SpatialAttention

from .. import functional
from .pooled import map_logit, pointwise
from .recipe import Recipe


class FastChannelAttention(ChannelAttention):
    """Ultralytics' ChannelAttention: scales x by one layer of its mean."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gate_channels(x, lambda mean: self.act(pointwise(self.fc, mean)))


class FastSpatialAttention(SpatialAttention):
    """Ultralytics' SpatialAttention: scales x by a convolution of its mean and maximum over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gate_twice(x, None, lambda maps: self.act(map_logit(self.cv1, maps)))


class FastCBAM(CBAM):
    """Ultralytics' CBAM: channel attention, then spatial attention."""

    def forward(self, x: Tensor) -> Tensor:
        c, s = self.channel_attention, self.spatial_attention
        return functional.gate_twice(
            x, lambda mean, _: c.act(pointwise(c.fc, mean)), lambda maps: s.act(map_logit(s.cv1, maps))
        )


RECIPES = [
    Recipe(ChannelAttention, FastChannelAttention, "gate_channels"),
    Recipe(SpatialAttention, FastSpatialAttention, "gate_twice"),
    Recipe(CBAM, FastCBAM, "gate_twice"),
]
