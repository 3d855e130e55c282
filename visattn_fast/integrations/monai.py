"""MONAI's channel squeeze-and-excitation in one to three dimensions, and the blocks of its SENets.

Source: MONAI 1.6 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable
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
from ..fused.calls import call_layers
from ..reference.as_built import (
    AFFINE_BATCH_NORM,
    LINEAR,
    MEAN_DIMENSIONS,
    MEAN_OF_POSITIONS,
    Layers,
    are_plain,
    container,
    layer,
)
from ..reference.batch_norm import Norm
from .looking import layers_as_gates
from .normed import normed_gate
from .recipe import ACTIVATIONS, Recipe, Repeated, swapped_gate
from .se_like import se_layers, se_like
from .tiers import may_fuse

_PARTS = Layers({"avg_pool": MEAN_OF_POSITIONS})
_LAYERS = Layers(
    {
        "avg_pool": MEAN_OF_POSITIONS,
        "fc": container(nn.Sequential, 4),
        **se_layers("fc.0", "fc.1", "fc.2", "fc.3", linear=LINEAR),
    }
)


class FastChannelSELayer(ChannelSELayer):
    """MONAI's ChannelSELayer, fused; takes the epilogue of the block around it, and the norm before it."""

    takes_norm = True  # in blocks, whose layers do not add their input
    PARTS, LAYERS = _PARTS, _LAYERS

    def channel_gate(self, mean: Tensor) -> Tensor:
        return _channel_gate(self, mean)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None, norm: Norm | None = None
    ) -> Tensor:
        return _gate(self, x, super().forward, residual, activation, norm)


class FastResidualSELayer(ResidualSELayer):
    """MONAI's ResidualSELayer, fused."""

    PARTS, LAYERS = _PARTS, _LAYERS

    def channel_gate(self, mean: Tensor) -> Tensor:
        return _channel_gate(self, mean)

    def forward(self, x: Tensor) -> Tensor:
        return _gate(self, x, super().forward)


def _channel_gate(module: ChannelSELayer, mean: Tensor) -> Tensor:
    return module.fc(mean.flatten(1)).view(mean.shape)


def _gate(
    module: Any,
    x: Tensor,
    own: Callable[[Tensor], Tensor],
    residual: Tensor | None = None,
    activation: str | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Computes what ``module`` does, which may add its input instead of a residual."""
    added = x if module.add_residual else residual
    # Of other dimensions, the pooling may take the batch for channels.
    fits = isinstance(x, Tensor) and MEAN_DIMENSIONS.get(type(module.avg_pool), x.dim()) == x.dim()
    if fits and may_fuse(module, x, module.LAYERS):
        reduce, hidden, expand, gate = module.fc
        return se_like(x, reduce, hidden, expand, gate, added, activation, norm)
    if fits and may_fuse(module, x, module.PARTS):
        return functional.gate_channels(x, module.channel_gate, residual=added, activation=activation)
    return call_layers(own, x, None if module.add_residual else residual, activation)


_look = layers_as_gates(channel="fc")
_FORWARD = (Repeated(ChannelSELayer, "e2614f2408571f70"),)
_CHANNEL_GATE = Recipe(ChannelSELayer, FastChannelSELayer, "se", "gate_channels", look=_look, repeats=_FORWARD)
_EPILOGUES = {**ACTIVATIONS, nn.Identity: None}
_SWAPPED_GATE = swapped_gate([_CHANNEL_GATE], lambda d: not d["add_residual"], "without its own input added")


class _FastBlock(SEBlock):
    LAYERS = Layers({"se_layer": _SWAPPED_GATE, "act": layer(*_EPILOGUES)})
    NORM = Layers(
        {"conv3": container(Convolution, 2), "conv3.adn": container(ADN, 1), "conv3.adn.N": AFFINE_BATCH_NORM}
    )

    def forward(self, x: Tensor) -> Tensor:
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        residual, out, activation = self.project(x), self.conv2(self.conv1(x)), _EPILOGUES[type(self.act)]
        last: Any = self.conv3
        if are_plain(self._modules, self.NORM):
            return normed_gate(last.conv(out), last.adn.N, self.se_layer, residual, activation)
        return self.se_layer(last(out), residual, activation)


class FastSEBlock(_FastBlock):
    """MONAI's SEBlock; its gate also adds the projection and activates, and includes the last norm if it can."""


class FastSEBottleneck(_FastBlock, SEBottleneck):
    """MONAI's SEBottleneck, fused as `FastSEBlock` is."""


class FastSEResNetBottleneck(_FastBlock, SEResNetBottleneck):
    """MONAI's SEResNetBottleneck, fused as `FastSEBlock` is."""


class FastSEResNeXtBottleneck(_FastBlock, SEResNeXtBottleneck):
    """MONAI's SEResNeXtBottleneck, fused as `FastSEBlock` is."""


_BLOCKS = {
    SEBlock: FastSEBlock,
    SEBottleneck: FastSEBottleneck,
    SEResNetBottleneck: FastSEResNetBottleneck,
    SEResNeXtBottleneck: FastSEResNeXtBottleneck,
}

RECIPES = [
    _CHANNEL_GATE,
    Recipe(
        ResidualSELayer,
        FastResidualSELayer,
        "se",
        "gate_channels",
        look=_look,
        repeats=(_FORWARD[0]._replace(owner=ResidualSELayer),),
    ),
    *(
        Recipe(
            block,
            fast,
            "epilogue",
            block=True,
            # Convolution and ADN call their layers in turn.
            repeats=(
                Repeated(block, "233af1b4e38cd5e9"),
                Repeated(Convolution, "95e8a9b3e99cd567"),
                Repeated(ADN, "95e8a9b3e99cd567"),
            ),
        )
        for block, fast in _BLOCKS.items()
    ),
]
