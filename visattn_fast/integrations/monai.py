"""MONAI's channel squeeze-and-excitation, in two dimensions. Source: MONAI 1.6 (Apache-2.0)."""

from __future__ import annotations

from monai.networks.blocks import ChannelSELayer, ResidualSELayer
from torch import Tensor, nn

from .recipe import Recipe, layers
from .se_like import se_layers, se_like


class FastChannelSELayer(ChannelSELayer):
    """MONAI's ChannelSELayer, fused."""

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)


class FastResidualSELayer(ResidualSELayer):
    """MONAI's ResidualSELayer, fused."""

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)


def _forward(module: ChannelSELayer, x: Tensor) -> Tensor:
    reduce, hidden, expand, gate = module.fc
    return se_like(x, reduce, hidden, expand, gate, residual=x if module.add_residual else None)


_TWO_DIMENSIONS = layers({"avg_pool": (nn.AdaptiveAvgPool2d,)})
_LAYERS = se_layers("fc.0", "fc.1", "fc.2", "fc.3", more=_TWO_DIMENSIONS)

RECIPES = [
    Recipe(ChannelSELayer, FastChannelSELayer, "se", _LAYERS),
    Recipe(ResidualSELayer, FastResidualSELayer, "se", _LAYERS),
]
