"""timm's attention modules. Source: timm 1.0 (Apache-2.0).

A module that equals one of our gates becomes that gate's function. The others keep their own layers, between fused
passes over x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, GatherExcite, GlobalContext, SEModule
from timm.layers.activations import HardSwish, Sigmoid
from timm.layers.coord_attn import CoordAttn
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from .. import functional
from ..reference.batch_norm import Norm, batch_norm_step
from . import timm_blocks, timm_cbam, timm_swin
from .pooled import pointwise
from .recipe import Recipe, all_of, require_layers
from .se_like import GATES, se_layers, se_like

_GATES = {**GATES, Sigmoid: "sigmoid"}  # timm has a sigmoid of its own
_SIGMOIDS = (nn.Sigmoid, Sigmoid)


class FastAnySEModule(SEModule):
    """timm's SEModule with any layers, which run as they are; takes the epilogue of the block around it."""

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.gate(pointwise(self.fc2, self.act(self.bn(pointwise(self.fc1, mean)))))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return functional.gate_channels(x, self.channel_gate, residual=residual, activation=activation)


class FastSEModule(FastAnySEModule):
    """timm's SEModule, fused; takes the epilogue of the block around it, and the norm before it."""

    takes_norm = True

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None, norm: Norm | None = None
    ) -> Tensor:
        return se_like(x, self.fc1, self.act, self.fc2, self.gate, residual, activation, norm, _GATES)


class FastSqueezeExcite(SqueezeExcite):
    """The SqueezeExcite of timm's EfficientNets and MobileNets, fused."""

    def forward(self, x: Tensor) -> Tensor:
        return se_like(x, self.conv_reduce, self.act1, self.conv_expand, self.gate, gates=_GATES)


class FastAnySqueezeExcite(SqueezeExcite):
    """SqueezeExcite with any activations, which run as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gate_channels(
            x, lambda mean: self.gate(pointwise(self.conv_expand, self.act1(pointwise(self.conv_reduce, mean))))
        )


class FastEffectiveSEModule(EffectiveSEModule):
    """timm's EffectiveSEModule; its layers run as they are. Takes the epilogue of the block around it."""

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.gate(pointwise(self.fc, mean))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return functional.gate_channels(x, self.channel_gate, residual=residual, activation=activation)


class FastAnyEcaModule(EcaModule):
    """timm's EcaModule with an MLP or any gate, which run as they are; takes the epilogue of the block around it."""

    def channel_gate(self, mean: Tensor) -> Tensor:
        y = self.conv(mean.view(mean.shape[0], 1, -1))
        if self.conv2 is not None:
            y = self.conv2(self.act(y))
        return self.gate(y).view(mean.shape)

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return functional.gate_channels(x, self.channel_gate, residual=residual, activation=activation)


class FastEcaModule(FastAnyEcaModule):
    """timm's EcaModule, fused; takes the epilogue of the block around it, and the norm before it."""

    takes_norm = True

    def channel_gate(self, mean: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().channel_gate(mean)
        # Shifted sums, which Inductor fuses. A convolution and its backward would be calls of their own.
        weights, channels = self.conv.weight.flatten().unbind(), mean.shape[1]
        padded = F.pad(mean.flatten(1), (len(weights) // 2, len(weights) // 2))
        logits = sum(w * padded[:, i : i + channels] for i, w in enumerate(weights))
        return self.gate(logits)[:, :, None, None]

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None, norm: Norm | None = None
    ) -> Tensor:
        return functional.eca(x, self.conv.weight, residual=residual, activation=activation, norm=norm)


class FastCecaModule(CecaModule):
    """timm's CecaModule; its layers run as they are. Takes the epilogue of the block around it."""

    def channel_gate(self, mean: Tensor) -> Tensor:
        y = F.pad(mean.view(mean.shape[0], 1, -1), (self.padding, self.padding), mode="circular")
        return self.gate(self.conv(y)).view(mean.shape)

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return functional.gate_channels(x, self.channel_gate, residual=residual, activation=activation)


class FastGatherExcite(GatherExcite):
    """timm's GatherExcite over whole maps; its layers run as they are. Takes the epilogue of the block around it."""

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.gate(self.mlp(mean))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return functional.gate_channels(x, self.channel_gate, residual=residual, activation=activation)


class FastGlobalContext(GlobalContext):
    """timm's GlobalContext of the mean; its layers run as they are. Takes the epilogue of the block around it."""

    def channel_gate(self, mean: Tensor) -> Tensor:
        mlp: Any = self.mlp_scale
        return self.gate(mlp(mean))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return functional.gate_channels(x, self.channel_gate, residual=residual, activation=activation)


class FastCoordAttn(CoordAttn):
    """timm's CoordAttn, fused."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        conv1, bn, height, width = module.conv1, module.bn1, module.conv_h, module.conv_w
        training, momentum = batch_norm_step(bn)
        return functional.coord_att(
            x, conv1.weight, conv1.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var,
            height.weight, height.bias, width.weight, width.bias,
            training=training, momentum=momentum, eps=bn.eps, residual=x if module.has_skip else None,
        )  # fmt: skip


def _why_not_maximum(module: Any) -> str:
    return "add_maxpool: it pools the maximum, too" if module.add_maxpool else ""


def _why_not_se(module: Any) -> str:
    return _why_not_maximum(module) or ("" if type(module.bn) is nn.Identity else "it has a norm layer inside")


def _why_not_eca(module: Any) -> str:
    if module.conv2 is not None:
        return "use_mlp: it has two convolutions"
    return require_layers({"gate": _SIGMOIDS})(module)


def _why_not_gather(module: Any) -> str:
    if module.gather is not None or module.extent != 0:
        return "it gathers by windows or convolutions, not by the mean of the map"
    return _why_not_maximum(module)


def _why_not_context(module: Any) -> str:
    if module.conv_attn is not None:
        return "use_attn: it pools by attention, not by the mean"
    return "" if module.mlp_add is None and module.mlp_scale is not None else "fuse_add: it adds, instead of scaling"


_COORDINATES = require_layers({"bn1": (nn.BatchNorm2d,), "act": (nn.Hardswish, HardSwish), "gate": _SIGMOIDS})
_SE = all_of(se_layers("fc1", "act", "fc2", "gate", _GATES), _why_not_se)
_EXCITE = se_layers("conv_reduce", "act1", "conv_expand", "gate", _GATES)

_WITH_EPILOGUE = [
    Recipe(SEModule, FastSEModule, "se", _SE),
    Recipe(SEModule, FastAnySEModule, "gate_channels", _why_not_maximum),
    Recipe(EffectiveSEModule, FastEffectiveSEModule, "gate_channels", _why_not_maximum),
    Recipe(EcaModule, FastEcaModule, "eca", _why_not_eca),
    Recipe(EcaModule, FastAnyEcaModule, "gate_channels"),
    Recipe(CecaModule, FastCecaModule, "gate_channels"),
    Recipe(GatherExcite, FastGatherExcite, "gate_channels", _why_not_gather),
    Recipe(GlobalContext, FastGlobalContext, "gate_channels", _why_not_context),
    *timm_cbam.RECIPES,
]
RECIPES = [
    *_WITH_EPILOGUE,
    Recipe(SqueezeExcite, FastSqueezeExcite, "se", _EXCITE),
    Recipe(SqueezeExcite, FastAnySqueezeExcite, "gate_channels"),
    Recipe(CoordAttn, FastCoordAttn, "coord_att", _COORDINATES),
    *timm_swin.RECIPES,
    *timm_blocks.recipes(tuple(recipe.fused for recipe in _WITH_EPILOGUE)),
]
