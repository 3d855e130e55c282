"""timm's two CBAMs. Source: timm 1.0 (Apache-2.0).

Their own layers run as they are, on pooled values and maps; in inference a CbamModule may be a single op.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from timm.layers.activations import Sigmoid
from timm.layers.cbam import (
    CbamModule,
    ChannelAttn,
    LightCbamModule,
    LightChannelAttn,
    LightSpatialAttn,
    SpatialAttn,
)
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from .. import functional
from ..backends import decide
from ..fused.calls import call_layers
from ..ops.autograd import recorded
from ..ops.cbam import CBAM
from ..reference.as_built import (
    POINTWISE,
    RELU,
    SAME_SIZE,
    Layer,
    Layers,
    are_plain,
    container,
    layer,
)
from ..reference.cbam import CALLED_TWICE
from .looking import layers_as_gates
from .normed import is_evaluated
from .pooled import map_logit, pointwise
from .recipe import ACTIVATIONS, Recipe, Repeated
from .tiers import lacks, may_fuse

_SIGMOID = layer(nn.Sigmoid, Sigmoid)


class FastCbamModule(CbamModule):
    """timm's CbamModule: mean and maximum each pass the layers, the spatial gate has a batch norm, ties are shared.

    In inference it is one op, if its layers are the paper's.
    """

    LAYERS = Layers({"channel": container(ChannelAttn, 4), "spatial": container(SpatialAttn, 2)})

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        if not may_fuse(self, x, self.LAYERS):
            return call_layers(super().forward, x, residual, activation)
        c, s = self.channel, self.spatial
        if _is_one_op(self, x, residual):
            wconv, bias = _normed_kernel(s.conv)
            return functional.cbam(
                x, c.fc1.weight, c.fc2.weight, wconv, bias=bias, residual=residual, activation=activation
            )
        return functional.gate_twice(
            x,
            lambda mean, maximum: _channel_gate(c, mean, maximum),
            lambda maps: _spatial_gate(s, maps),
            ties="even",
            residual=residual,
            activation=activation,
        )


class FastLightCbamModule(LightCbamModule):
    """timm's LightCbamModule: half the mean plus half the maximum; the channel gate is always a sigmoid."""

    LAYERS = Layers({"channel": container(LightChannelAttn, 4), "spatial": container(LightSpatialAttn, 2)})

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        if not may_fuse(self, x, self.LAYERS):
            return call_layers(super().forward, x, residual, activation)
        c, s = self.channel, self.spatial
        return functional.gate_twice(
            x,
            lambda mean, maximum: _light_channel_gate(c, mean, maximum),
            lambda maps: _light_spatial_gate(s, maps),
            ties="even",
            residual=residual,
            activation=activation,
        )


_CALLED_TWICE = POINTWISE._replace(twice=True)  # for the mean and for the maximum
_PERCEPTRON = Layers({"fc1": _CALLED_TWICE, "act": layer(*ACTIVATIONS), "fc2": _CALLED_TWICE})
_CONV = Layers({"conv": container(ConvNormAct, None)})


def _channel_gate(c: Any, mean: Tensor, maximum: Tensor) -> Tensor:
    if are_plain(c._modules, _PERCEPTRON):  # then both may pass the layers as one batch
        both = pointwise(c.fc2, c.act(pointwise(c.fc1, torch.cat([mean, maximum]))))
        n = mean.shape[0]  # len(mean) would fix the batch of an exported program
        return c.gate(both[:n] + both[n:])
    return c.gate(c.fc2(c.act(c.fc1(mean))) + c.fc2(c.act(c.fc1(maximum))))


def _spatial_gate(s: Any, maps: Tensor) -> Tensor:
    if not are_plain(s._modules, _CONV):
        return s.gate(s.conv(maps))
    block = s.conv
    logit = block.bn(map_logit(block.conv, maps))
    return s.gate(logit if block.aa is None else block.aa(logit))


def _light_channel_gate(c: Any, mean: Tensor, maximum: Tensor) -> Tensor:
    return pointwise(c.fc2, c.act(pointwise(c.fc1, 0.5 * mean + 0.5 * maximum))).sigmoid()


def _light_spatial_gate(s: Any, maps: Tensor) -> Tensor:
    return s.gate(s.conv(0.5 * maps[:, :1] + 0.5 * maps[:, 1:]))


def _the_papers(norm: dict[str, Layer]) -> Layers:
    """Returns what `functional.cbam` assumes of a CbamModule whose spatial gate has this norm."""
    return Layers(
        {
            "channel": container(ChannelAttn, 4),
            "channel.fc1": CALLED_TWICE,
            "channel.act": RELU,
            "channel.fc2": CALLED_TWICE,
            "channel.gate": _SIGMOID,
            "spatial": container(SpatialAttn, 2),
            "spatial.conv": container(ConvNormAct, 2)._replace(
                fits=lacks("aa"), words="without an anti-aliasing layer"
            ),
            "spatial.conv.conv": SAME_SIZE,
            **norm,
            "spatial.gate": _SIGMOID,
        }
    )


_WITH_TIMMS_NORM = _the_papers(
    {
        "spatial.conv.bn": container(BatchNormAct2d, 2),
        "spatial.conv.bn.drop": layer(nn.Identity),
        "spatial.conv.bn.act": layer(nn.Identity),
    }
)
_WITH_PLAIN_NORM = _the_papers({"spatial.conv.bn": layer(nn.BatchNorm2d)})


def _is_one_op(module: Any, x: Tensor, residual: Tensor | None) -> bool:
    """True if `functional.cbam` equals the whole module: the norm is evaluated, the other layers are the paper's.

    False if a gradient is wanted: the op sends it to the first of equal maxima, where timm shares it.
    """
    if recorded(chain((x, residual), module.parameters())) or not decide(x, CBAM).fused:
        return False
    papers = any(are_plain(module._modules, layers) for layers in (_WITH_TIMMS_NORM, _WITH_PLAIN_NORM))
    return papers and is_evaluated(module.spatial.conv.bn)


def _normed_kernel(block: Any) -> tuple[Tensor, Tensor]:
    """Folds the evaluated norm into the convolution before it: returns weights ``[1, 2, k, k]`` and bias ``[1]``."""
    conv, norm = block.conv, block.bn
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias.to(wide) - norm.running_mean
    return conv.weight * scale, bias * scale if norm.bias is None else bias * scale + norm.bias


_look = layers_as_gates(channel="channel.gate", spatial="spatial.gate")
_logits = layers_as_gates(channel="channel.fc2", spatial="spatial.gate")


def _look_at_light(module: Any, x: Tensor) -> dict[str, Tensor]:
    """The sigmoid of its channel gate is no layer."""
    found = _logits(module, x)
    return {**found, "channel": found["channel"].sigmoid()} if "channel" in found else found


RECIPES = [
    Recipe(
        CbamModule,
        FastCbamModule,
        "gate_twice",
        look=_look,
        repeats=(
            Repeated(CbamModule, "3f050589d1a5f353"),
            Repeated(ChannelAttn, "f76f53033c23d825"),
            Repeated(SpatialAttn, "c3bd7bee605793d2"),
            Repeated(ConvNormAct, "db6ac5abd927fa71"),
            Repeated(BatchNormAct2d, "aab01662c2e6c5ba"),
        ),
    ),
    Recipe(
        LightCbamModule,
        FastLightCbamModule,
        "gate_twice",
        look=_look_at_light,
        repeats=(
            Repeated(LightCbamModule, "3f050589d1a5f353"),
            Repeated(LightChannelAttn, "d83b858852ac8a6b"),
            Repeated(LightSpatialAttn, "a862fcd5b34ab59c"),
        ),
    ),
]
