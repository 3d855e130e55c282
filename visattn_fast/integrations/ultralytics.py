"""Ultralytics' CBAM and its halves, whose own layers run on pooled values and maps. Source: ultralytics 8."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from ultralytics.nn.modules.conv import CBAM, ChannelAttention, SpatialAttention

from .. import functional
from ..reference.as_built import MEAN, Layers, container
from .looking import layers_as_gates
from .pooled import map_logit, pointwise
from .recipe import Recipe, Repeated
from .tiers import gate_by_passes, may_fuse


class FastChannelAttention(ChannelAttention):
    """Ultralytics' ChannelAttention: scales x by one layer of its mean."""

    PARTS = LAYERS = Layers({"pool": MEAN})

    def channel_gate(self, mean: Tensor) -> Tensor:
        return _channel_gate(self, mean)

    def forward(self, x: Tensor) -> Tensor:
        return gate_by_passes(self, x, super().forward)


class FastSpatialAttention(SpatialAttention):
    """Ultralytics' SpatialAttention: scales x by a convolution of its mean and maximum over channels."""

    LAYERS = Layers({})

    def forward(self, x: Tensor) -> Tensor:
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        return functional.gate_twice(x, None, lambda maps: _spatial_gate(self, maps))


class FastCBAM(CBAM):
    """Ultralytics' CBAM: channel attention, then spatial attention."""

    LAYERS = Layers(
        {
            "channel_attention": container(ChannelAttention, 3),
            "channel_attention.pool": MEAN,
            "spatial_attention": container(SpatialAttention, 2),
        }
    )

    def forward(self, x: Tensor) -> Tensor:
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        c, s = self.channel_attention, self.spatial_attention
        return functional.gate_twice(x, lambda mean, _: _channel_gate(c, mean), lambda maps: _spatial_gate(s, maps))


def _channel_gate(module: Any, mean: Tensor) -> Tensor:
    return module.act(pointwise(module.fc, mean))


def _spatial_gate(module: Any, maps: Tensor) -> Tensor:
    return module.act(map_logit(module.cv1, maps))


_look = layers_as_gates(channel="channel_attention.act", spatial="spatial_attention.act")

_OF_CHANNELS, _OF_PIXELS = (
    Repeated(ChannelAttention, "203c494207319230"),
    Repeated(SpatialAttention, "4280e28de8080038"),
)

RECIPES = [
    Recipe(
        ChannelAttention,
        FastChannelAttention,
        "gate_channels",
        look=layers_as_gates(channel="act"),
        repeats=(_OF_CHANNELS,),
    ),
    Recipe(
        SpatialAttention,
        FastSpatialAttention,
        "gate_twice",
        look=layers_as_gates(spatial="act"),
        repeats=(_OF_PIXELS,),
    ),
    Recipe(
        CBAM, FastCBAM, "gate_twice", look=_look, repeats=(Repeated(CBAM, "1ebc9b0b6758af4a"), _OF_CHANNELS, _OF_PIXELS)
    ),
]
