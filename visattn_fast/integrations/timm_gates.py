"""timm's gates, except its CBAMs. Source: timm 1.0 (Apache-2.0).

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

from .. import functional, reference
from ..reference.as_built import BATCH_NORM, POINTWISE, Layer, Layers, Settings, layer
from ..reference.batch_norm import Norm, batch_norm_step
from .looking import layers_as_gates
from .pooled import pointwise
from .recipe import Recipe, Repeated
from .se_like import GATES, se_layers, se_like, why_no_units
from .tiers import gate_by_passes, lacks, may_fuse

_GATES = {**GATES, Sigmoid: "sigmoid"}  # timm has a sigmoid of its own
_SIGMOID = layer(nn.Sigmoid, Sigmoid)


def _pools_the_mean(layers: dict[str, Layer]) -> Layers:
    """Returns ``layers``, of a module without ``add_maxpool``."""
    words = "add_maxpool: it pools the maximum, too"
    return Layers(layers, fits=lambda d: not d["add_maxpool"], words=words)


class FastSEModule(SEModule):
    """timm's SEModule, fused; takes the epilogue of the block around it, and the norm before it."""

    takes_norm = True
    PARTS = _pools_the_mean({})
    LAYERS = _pools_the_mean({"bn": layer(nn.Identity), **se_layers("fc1", "act", "fc2", "gate", _GATES)})

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.gate(pointwise(self.fc2, self.act(self.bn(pointwise(self.fc1, mean)))))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None, norm: Norm | None = None
    ) -> Tensor:
        if may_fuse(self, x, self.LAYERS):
            return se_like(x, self.fc1, self.act, self.fc2, self.gate, residual, activation, norm, _GATES)
        return gate_by_passes(self, x, super().forward, residual, activation)


class FastSqueezeExcite(SqueezeExcite):
    """The SqueezeExcite of timm's EfficientNets and MobileNets, fused."""

    PARTS = Layers({})
    LAYERS = Layers(se_layers("conv_reduce", "act1", "conv_expand", "gate", _GATES))

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.gate(pointwise(self.conv_expand, self.act1(pointwise(self.conv_reduce, mean))))

    def forward(self, x: Tensor) -> Tensor:
        if may_fuse(self, x, self.LAYERS):
            return se_like(x, self.conv_reduce, self.act1, self.conv_expand, self.gate, gates=_GATES)
        return gate_by_passes(self, x, super().forward)


class FastEffectiveSEModule(EffectiveSEModule):
    """timm's EffectiveSEModule; its layers run as they are. Takes the epilogue of the block around it."""

    PARTS = LAYERS = _pools_the_mean({})

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.gate(pointwise(self.fc, mean))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return gate_by_passes(self, x, super().forward, residual, activation)


class FastEcaModule(EcaModule):
    """timm's EcaModule, fused; takes the epilogue of the block around it, and the norm before it."""

    takes_norm = True
    PARTS = Layers({})
    LAYERS = Layers(
        {**reference.ECA.LAYERS.expected, "gate": _SIGMOID}, fits=lacks("conv2"), words="conv2: it has a second layer"
    )

    def channel_gate(self, mean: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and may_fuse(self, mean, self.LAYERS):
            # Shifted sums, which Inductor fuses. A convolution and its backward would be calls of their own.
            weights, channels = self.conv.weight.flatten().unbind(), mean.shape[1]
            padded = F.pad(mean.flatten(1), (len(weights) // 2, len(weights) // 2))
            logits = sum(w * padded[:, i : i + channels] for i, w in enumerate(weights))
            return self.gate(logits)[:, :, None, None]
        y = self.conv(mean.view(mean.shape[0], 1, -1))
        if self.conv2 is not None:
            y = self.conv2(self.act(y))
        return self.gate(y).view(mean.shape)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None, norm: Norm | None = None
    ) -> Tensor:
        if may_fuse(self, x, self.LAYERS):
            return functional.eca(x, self.conv.weight, residual=residual, activation=activation, norm=norm)
        return gate_by_passes(self, x, super().forward, residual, activation)


class FastCecaModule(CecaModule):
    """timm's CecaModule; its layers run as they are. Takes the epilogue of the block around it."""

    PARTS = LAYERS = Layers({})

    def channel_gate(self, mean: Tensor) -> Tensor:
        y = F.pad(mean.view(mean.shape[0], 1, -1), (self.padding, self.padding), mode="circular")
        return self.gate(self.conv(y)).view(mean.shape)

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return gate_by_passes(self, x, super().forward, residual, activation)


_GATHERS_NOT = lacks("gather")


class FastGatherExcite(GatherExcite):
    """timm's GatherExcite over whole maps; its layers run as they are. Takes the epilogue of the block around it."""

    PARTS = LAYERS = Layers(
        {},
        fits=lambda d: _GATHERS_NOT(d) and d["extent"] == 0 and not d["add_maxpool"],
        words="it gathers by windows, convolutions or maxima, not by the mean of the map",
    )

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.gate(self.mlp(mean))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return gate_by_passes(self, x, super().forward, residual, activation)


_NEITHER_ATTENDS_NOR_ADDS = lacks("conv_attn", "mlp_add")


def _scales_by_the_mean(d: Settings) -> bool:
    return _NEITHER_ATTENDS_NOR_ADDS(d) and d["_modules"].get("mlp_scale") is not None


class FastGlobalContext(GlobalContext):
    """timm's GlobalContext of the mean; its layers run as they are. Takes the epilogue of the block around it."""

    PARTS = LAYERS = Layers(
        {},
        fits=_scales_by_the_mean,
        words="use_attn or fuse_add: it pools by attention, or adds instead of scaling",
    )

    def channel_gate(self, mean: Tensor) -> Tensor:
        mlp: Any = self.mlp_scale
        return self.gate(mlp(mean))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return gate_by_passes(self, x, super().forward, residual, activation)


class FastCoordAttn(CoordAttn):
    """timm's CoordAttn, fused."""

    LAYERS = Layers(
        {
            "conv1": POINTWISE,
            "bn1": BATCH_NORM,
            "act": layer(nn.Hardswish, HardSwish),
            "conv_h": POINTWISE,
            "conv_w": POINTWISE,
            "gate": _SIGMOID,
        }
    )

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        conv1, bn, height, width = module.conv1, module.bn1, module.conv_h, module.conv_w
        training, momentum = batch_norm_step(bn)
        return functional.coord_att(
            x, conv1.weight, conv1.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var,
            height.weight, height.bias, width.weight, width.bias,
            training=training, momentum=momentum, eps=bn.eps, residual=x if module.has_skip else None,
        )  # fmt: skip


_look = layers_as_gates(channel="gate")


def _look_at_gather(module: Any, x: Tensor) -> dict[str, Tensor]:
    """Windows and convolutions give every pixel a gate of its own."""
    whole = module.gather is None and module.extent == 0
    return _look(module, x) if whole else layers_as_gates(element="gate")(module, x)


# Their forward takes a residual and an activation.
WITH_EPILOGUE = [
    Recipe(
        SEModule,
        FastSEModule,
        "se",
        "gate_channels",
        why_no_units("fc1"),
        look=_look,
        repeats=(Repeated(SEModule, "d90ef3781784cf7c"),),
    ),
    Recipe(
        EffectiveSEModule,
        FastEffectiveSEModule,
        "gate_channels",
        look=_look,
        repeats=(Repeated(EffectiveSEModule, "fc092ba04cb8e076"),),
    ),
    Recipe(
        EcaModule, FastEcaModule, "eca", "gate_channels", look=_look, repeats=(Repeated(EcaModule, "0446b72eb21e4c07"),)
    ),
    Recipe(
        CecaModule, FastCecaModule, "gate_channels", look=_look, repeats=(Repeated(CecaModule, "a2923365e6ec58aa"),)
    ),
    Recipe(
        GatherExcite,
        FastGatherExcite,
        "gate_channels",
        look=_look_at_gather,
        repeats=(Repeated(GatherExcite, "65457f489ff0742e"),),
    ),
    Recipe(
        GlobalContext,
        FastGlobalContext,
        "gate_channels",
        look=_look,
        repeats=(Repeated(GlobalContext, "8c6d56fc583dcd10"),),
    ),
]
RECIPES = [
    *WITH_EPILOGUE,
    Recipe(
        SqueezeExcite,
        FastSqueezeExcite,
        "se",
        "gate_channels",
        why_no_units("conv_reduce"),
        look=_look,
        repeats=(Repeated(SqueezeExcite, "561386d7de2d3b74"),),
    ),
    Recipe(
        CoordAttn,
        FastCoordAttn,
        "coord_att",
        look=layers_as_gates(height="gate", width="gate"),
        repeats=(Repeated(CoordAttn, "be254024cbf28410"),),
    ),
]
