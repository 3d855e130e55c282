"""MONAI's channel squeeze-and-excitation in two dimensions, and the blocks of its SENets.

Source: MONAI 1.6 (Apache-2.0).
"""

from __future__ import annotations

from typing import Any

from monai.networks.blocks import (
    ADN,
    ChannelSELayer,
    Convolution,
    ResidualSELayer,
    SEBlock,
    SEBottleneck,
    SEResNetBottleneck,
    SEResNeXtBottleneck,
)
from torch import Tensor, nn

from .. import functional
from ..reference.batch_norm import Norm
from .normed import normed_gate
from .recipe import ACTIVATIONS, Recipe, all_of, has_hooks, is_swapped, require_layers
from .se_like import se_layers, se_like


class FastAnyChannelSELayer(ChannelSELayer):
    """MONAI's ChannelSELayer with any activations, which run as they are; takes the epilogue of the block around it."""

    def channel_gate(self, mean: Tensor) -> Tensor:
        return _gate(self, mean)

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        residual = x if self.add_residual else residual
        return functional.gate_channels(x, self.channel_gate, residual=residual, activation=activation)


class FastChannelSELayer(FastAnyChannelSELayer):
    """MONAI's ChannelSELayer, fused; takes the epilogue of the block around it, and the norm before it."""

    takes_norm = True  # in blocks, whose layers do not add their input

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None, norm: Norm | None = None
    ) -> Tensor:
        reduce, hidden, expand, gate = self.fc
        residual = x if self.add_residual else residual
        return se_like(x, reduce, hidden, expand, gate, residual, activation, norm)


class FastResidualSELayer(ResidualSELayer):
    """MONAI's ResidualSELayer, fused."""

    def forward(self, x: Tensor) -> Tensor:
        reduce, hidden, expand, gate = self.fc
        return se_like(x, reduce, hidden, expand, gate, x)


class FastAnyResidualSELayer(ResidualSELayer):
    """MONAI's ResidualSELayer with any activations, which run as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gate_channels(x, lambda mean: _gate(self, mean), residual=x)


class _FastBlock(SEBlock):
    def forward(self, x: Tensor) -> Tensor:
        residual, out, activation = self.project(x), self.conv2(self.conv1(x)), _EPILOGUES[type(self.act)]
        last: Any = self.conv3
        norm = _norm_alone(last)
        if norm is None:
            return self.se_layer(last(out), residual, activation)
        return normed_gate(last.conv(out), norm, self.se_layer, residual, activation)


class FastSEBlock(_FastBlock):
    """MONAI's SEBlock; its gate also adds the projection and activates, and includes the last norm if it can."""


class FastSEBottleneck(_FastBlock, SEBottleneck):
    """MONAI's SEBottleneck, fused as `FastSEBlock` is."""


class FastSEResNetBottleneck(_FastBlock, SEResNetBottleneck):
    """MONAI's SEResNetBottleneck, fused as `FastSEBlock` is."""


class FastSEResNeXtBottleneck(_FastBlock, SEResNeXtBottleneck):
    """MONAI's SEResNeXtBottleneck, fused as `FastSEBlock` is."""


_EPILOGUES = {**ACTIVATIONS, nn.Identity: None}


def _gate(module: ChannelSELayer, mean: Tensor) -> Tensor:
    return module.fc(mean.flatten(1)).view(mean.shape)


def _norm_alone(block: Any) -> nn.Module | None:
    """Returns the norm of MONAI's ``Convolution`` if it is the only layer after the convolution; else None."""
    adn = block._modules.get("adn")
    if type(block) is not Convolution or type(adn) is not ADN or has_hooks(block) or has_hooks(adn):
        return None
    return adn._modules["N"] if list(adn._modules) == ["N"] else None


def _why_not_block(block: Any) -> str:
    gate = block.se_layer
    if not (is_swapped(gate) and isinstance(gate, FastAnyChannelSELayer)):
        return "its gate was not swapped"
    return "its gate adds its own input" if gate.add_residual else require_layers({"act": tuple(_EPILOGUES)})(block)


_TWO_DIMENSIONS = require_layers({"avg_pool": (nn.AdaptiveAvgPool2d,)})
_LAYERS = all_of(se_layers("fc.0", "fc.1", "fc.2", "fc.3"), _TWO_DIMENSIONS)
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
    *(Recipe(block, fast, "epilogue", _why_not_block, block=True) for block, fast in _BLOCKS.items()),
]
