"""MONAI's channel squeeze-and-excitation, in two dimensions, and the blocks of its SE nets. Source: MONAI 1.6

(Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.networks.blocks import (
    ChannelSELayer,
    ResidualSELayer,
    SEBlock,
    SEBottleneck,
    SEResNetBottleneck,
    SEResNeXtBottleneck,
)
from torch import Tensor, nn

from .. import functional
from .recipe import ACTIVATIONS, Recipe, is_swapped, layers
from .se_like import se_layers, se_like


class FastChannelSELayer(ChannelSELayer):
    """MONAI's ChannelSELayer, fused; with the epilogue of the block around it, if asked."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        reduce, hidden, expand, gate = self.fc
        residual = x if self.add_residual else residual
        return se_like(x, reduce, hidden, expand, gate, residual, activation)


class FastResidualSELayer(ResidualSELayer):
    """MONAI's ResidualSELayer, fused."""

    def forward(self, x: Tensor) -> Tensor:
        reduce, hidden, expand, gate = self.fc
        return se_like(x, reduce, hidden, expand, gate, x)


class FastAnyChannelSELayer(ChannelSELayer):
    """MONAI's ChannelSELayer with any activations, which run as they are; with the block's epilogue, if asked."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        residual = x if self.add_residual else residual
        return functional.gate_channels(x, _gate(self), residual=residual, activation=activation)


class FastAnyResidualSELayer(ResidualSELayer):
    """MONAI's ResidualSELayer with any activations, which run as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gate_channels(x, _gate(self), residual=x)


class _FastBlock(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        residual = self.project(x)
        return self.se_layer(self.conv3(self.conv2(self.conv1(x))), residual, _EPILOGUES[type(self.act)])


class FastSEBlock(_FastBlock):
    """MONAI's SEBlock, whose gate adds the projection and activates."""


class FastSEBottleneck(_FastBlock, SEBottleneck):
    """MONAI's SEBottleneck, likewise."""


class FastSEResNetBottleneck(_FastBlock, SEResNetBottleneck):
    """MONAI's SEResNetBottleneck, likewise."""


class FastSEResNeXtBottleneck(_FastBlock, SEResNeXtBottleneck):
    """MONAI's SEResNeXtBottleneck, likewise."""


_EPILOGUES = {**ACTIVATIONS, nn.Identity: None}


def _gate(module: ChannelSELayer) -> Callable[[Tensor], Tensor]:
    return lambda mean: module.fc(mean.flatten(1)).view(mean.shape)


def _against_block(block: Any) -> str:
    gate = block.se_layer
    if not (is_swapped(gate) and isinstance(gate, (FastChannelSELayer, FastAnyChannelSELayer))):
        return "its gate was not swapped"
    return "its gate adds its own input" if gate.add_residual else layers({"act": tuple(_EPILOGUES)})(block)


_TWO_DIMENSIONS = layers({"avg_pool": (nn.AdaptiveAvgPool2d,)})
_LAYERS = se_layers("fc.0", "fc.1", "fc.2", "fc.3", more=_TWO_DIMENSIONS)
_BLOCKS = {
    SEBlock: FastSEBlock,
    SEBottleneck: FastSEBottleneck,
    SEResNetBottleneck: FastSEResNetBottleneck,
    SEResNeXtBottleneck: FastSEResNeXtBottleneck,
}

RECIPES = [
    Recipe(ChannelSELayer, FastChannelSELayer, "se", _LAYERS),
    Recipe(ChannelSELayer, FastAnyChannelSELayer, "gate_channels", _TWO_DIMENSIONS),
    Recipe(ResidualSELayer, FastResidualSELayer, "se", _LAYERS),
    Recipe(ResidualSELayer, FastAnyResidualSELayer, "gate_channels", _TWO_DIMENSIONS),
    *(Recipe(block, fast, "epilogue", _against_block, pattern=True) for block, fast in _BLOCKS.items()),
]
