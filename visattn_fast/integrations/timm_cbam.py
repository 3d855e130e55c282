"""timm's two CBAMs. Source: timm 1.0 (Apache-2.0).

Their own layers run as they are, on pooled values and maps; in inference a CbamModule may be a single op.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from timm.layers.activations import Sigmoid
from timm.layers.cbam import CbamModule, LightCbamModule
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from .. import functional
from ..backends import decide
from ..ops.autograd import recorded
from ..ops.cbam import CBAM
from .normed import is_evaluated
from .pooled import is_map_conv, is_pointwise, map_logit, pointwise
from .recipe import Recipe, has_hooks


class FastCbamModule(CbamModule):
    """timm's CbamModule: mean and maximum each pass the layers, the spatial gate has a batch norm, ties are shared.

    In inference it is one op, if its layers are the paper's.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        c, s = self.channel, self.spatial
        if _is_one_op(self, x, residual):
            wconv, bias = _normed_kernel(s.conv)
            return functional.cbam(
                x, c.fc1.weight, c.fc2.weight, wconv, bias=bias, residual=residual, activation=activation
            )

        def channel(mean: Tensor, maximum: Tensor) -> Tensor:
            both = pointwise(c.fc2, c.act(pointwise(c.fc1, torch.cat([mean, maximum]))))
            return c.gate(both[: len(mean)] + both[len(mean) :])

        def spatial(maps: Tensor) -> Tensor:
            return s.gate(_norm(s.conv, map_logit(s.conv.conv, maps)))

        return functional.gate_twice(x, channel, spatial, ties="even", residual=residual, activation=activation)


class FastLightCbamModule(LightCbamModule):
    """timm's LightCbamModule: half the mean plus half the maximum; the channel gate is always a sigmoid."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        c, s = self.channel, self.spatial

        def channel(mean: Tensor, maximum: Tensor) -> Tensor:
            return pointwise(c.fc2, c.act(pointwise(c.fc1, 0.5 * mean + 0.5 * maximum))).sigmoid()

        def spatial(maps: Tensor) -> Tensor:
            return s.gate(s.conv(0.5 * maps[:, :1] + 0.5 * maps[:, 1:]))

        return functional.gate_twice(x, channel, spatial, ties="even", residual=residual, activation=activation)


def _norm(block: ConvNormAct, logit: Tensor) -> Tensor:
    """Applies the layers that follow the convolution in timm's ``ConvNormAct``."""
    logit = block.bn(logit)
    return logit if block.aa is None else block.aa(logit)


def _is_one_op(module: Any, x: Tensor, residual: Tensor | None) -> bool:
    """True if `functional.cbam` equals the whole module: the norm is evaluated, the other layers are the paper's.

    False if a gradient is wanted: the op sends it to the first of equal maxima, where timm shares it.
    """
    channel, spatial = module.channel, module.spatial
    conv, norm = spatial.conv.conv, spatial.conv.bn
    if not is_evaluated(norm) or recorded(chain((x, residual), module.parameters())) or not decide(x, CBAM).fused:
        return False
    known = _exactly(norm, nn.BatchNorm2d) or (
        _exactly(norm, BatchNormAct2d) and _exactly(norm.drop, nn.Identity) and _exactly(norm.act, nn.Identity)
    )
    return (
        known
        and spatial.conv.aa is None
        and is_map_conv(conv)
        and all(is_pointwise(layer) and layer.bias is None for layer in (channel.fc1, channel.fc2))
        and _exactly(channel.act, nn.ReLU)
        and all(_exactly(gate, nn.Sigmoid, Sigmoid) for gate in (channel.gate, spatial.gate))
    )


def _exactly(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    return type(layer) in kinds and not has_hooks(layer)


def _normed_kernel(block: Any) -> tuple[Tensor, Tensor]:
    """Folds the evaluated norm into the convolution before it: returns weights ``[1, 2, k, k]`` and bias ``[1]``."""
    conv, norm = block.conv, block.bn
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias.to(wide) - norm.running_mean
    return conv.weight * scale, bias * scale if norm.bias is None else bias * scale + norm.bias


def _why_not(module: Any) -> str:
    conv = module.spatial.conv
    return "" if type(conv) is ConvNormAct else f"spatial.conv is {type(conv).__name__}, not ConvNormAct"


RECIPES = [
    Recipe(CbamModule, FastCbamModule, "gate_twice", _why_not),
    Recipe(LightCbamModule, FastLightCbamModule, "gate_twice"),
]
