"""timm's two CBAMs. Source: timm 1.0 (Apache-2.0). Their own layers run on pooled values and maps, as they are."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.cbam import CbamModule, LightCbamModule
from timm.layers.conv_bn_act import ConvNormAct
from torch import Tensor

from .. import functional
from .pooled import map_logit, pointwise
from .recipe import Recipe


class FastCbamModule(CbamModule):
    """timm's CbamModule: mean and maximum each through the layers, a batch norm in the spatial gate, ties shared."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        c, s = self.channel, self.spatial

        def channel(mean: Tensor, maximum: Tensor) -> Tensor:
            both = pointwise(c.fc2, c.act(pointwise(c.fc1, torch.cat([mean, maximum]))))
            return c.gate(both[: len(mean)] + both[len(mean) :])

        def spatial(maps: Tensor) -> Tensor:
            return s.gate(_norm(s.conv, map_logit(s.conv.conv, maps)))

        return functional.gate_twice(x, channel, spatial, ties="even", residual=residual, activation=activation)


class FastLightCbamModule(LightCbamModule):
    """timm's LightCbamModule: half the mean plus half the maximum, channels' gate a sigmoid always."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        c, s = self.channel, self.spatial

        def channel(mean: Tensor, maximum: Tensor) -> Tensor:
            return pointwise(c.fc2, c.act(pointwise(c.fc1, 0.5 * mean + 0.5 * maximum))).sigmoid()

        def spatial(maps: Tensor) -> Tensor:
            return s.gate(s.conv(0.5 * maps[:, :1] + 0.5 * maps[:, 1:]))

        return functional.gate_twice(x, channel, spatial, ties="even", residual=residual, activation=activation)


def _norm(block: ConvNormAct, logit: Tensor) -> Tensor:
    """What follows the convolution in timm's ``ConvNormAct``."""
    logit = block.bn(logit)
    return logit if block.aa is None else block.aa(logit)


def _against(module: Any) -> str:
    conv = module.spatial.conv
    return "" if type(conv) is ConvNormAct else f"spatial.conv is {type(conv).__name__}, not ConvNormAct"


RECIPES = [
    Recipe(CbamModule, FastCbamModule, "gate_twice", _against),
    Recipe(LightCbamModule, FastLightCbamModule, "gate_twice"),
]
