"""Modules of every library that `accelerate` knows, and of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from outside import library
from visattn_fast.catalogue import ENTRIES

C = 32  # channels


def timm(name: str, *arguments: Any, module: str = "timm.layers", **options: Any) -> nn.Module:
    return getattr(library(module), name)(*arguments, **options)


def squeeze_excitation(*activations: type[nn.Module]) -> nn.Module:
    return library("torchvision.ops").SqueezeExcitation(C, 8, *activations)


def monai(name: str, *arguments: Any, dimensions: int = 2) -> nn.Module:
    return getattr(library("monai.networks.blocks"), name)(dimensions, C, *arguments)


def ultralytics(name: str, *arguments: Any, file: str = "conv") -> nn.Module:
    return getattr(library(f"ultralytics.nn.modules.{file}"), name)(*arguments)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "timm SEModule": lambda: timm("SEModule", C),
    "timm SEModule, no bias": lambda: timm("SEModule", C, bias=False),
    "timm SEModule, SiLU": lambda: timm("SEModule", C, act_layer=nn.SiLU),
    "timm SEModule, hard sigmoid": lambda: timm("SEModule", C, gate_layer=nn.Hardsigmoid),
    "timm SqueezeExcite": lambda: timm("SqueezeExcite", C, module="timm.models._efficientnet_blocks"),
    "timm EcaModule": lambda: timm("EcaModule", C),
    "timm SEModule, GELU and batch norm": lambda: timm("SEModule", C, act_layer=nn.GELU, norm_layer=nn.BatchNorm2d),
    "timm SqueezeExcite, tanh": lambda: timm(
        "SqueezeExcite", C, gate_layer=nn.Tanh, module="timm.models._efficientnet_blocks"
    ),
    "timm EcaModule, MLP": lambda: timm("EcaModule", C, use_mlp=True),
    "timm EcaModule, hard sigmoid": lambda: timm("EcaModule", C, gate_layer="hard_sigmoid"),
    "timm CecaModule": lambda: timm("CecaModule", C),
    "timm EffectiveSEModule": lambda: timm("EffectiveSEModule", C),
    "timm GatherExcite": lambda: timm("GatherExcite", C, use_mlp=False),
    "timm GlobalContext": lambda: timm("GlobalContext", C, use_attn=False),
    "timm CbamModule": lambda: timm("CbamModule", C, module="timm.layers.cbam"),
    "timm CbamModule, SiLU, bias, hard sigmoid, 3 x 3": lambda: timm(
        "CbamModule",
        C,
        1 / 4,
        spatial_kernel_size=3,
        act_layer=nn.SiLU,
        gate_layer="hard_sigmoid",
        mlp_bias=True,
        module="timm.layers.cbam",
    ),
    "timm LightCbamModule": lambda: timm("LightCbamModule", C, module="timm.layers.cbam"),
    "timm CoordAttn": lambda: timm("CoordAttn", C, module="timm.layers.coord_attn"),
    "timm CoordAttn, skip": lambda: timm("CoordAttn", C, has_skip=True, bias=True, module="timm.layers.coord_attn"),
    "torchvision SqueezeExcitation": squeeze_excitation,
    "torchvision SqueezeExcitation of MobileNetV3": lambda: squeeze_excitation(nn.ReLU, nn.Hardsigmoid),
    "torchvision SqueezeExcitation of EfficientNet": lambda: squeeze_excitation(nn.SiLU, nn.Sigmoid),
    "torchvision SqueezeExcitation, GELU": lambda: squeeze_excitation(nn.GELU),
    "monai ChannelSELayer": lambda: monai("ChannelSELayer"),
    "monai ResidualSELayer": lambda: monai("ResidualSELayer", 4, "relu", "sigmoid"),
    "monai ResidualSELayer as it comes": lambda: monai("ResidualSELayer"),
    "ultralytics CBAM": lambda: ultralytics("CBAM", C),
    "ultralytics ChannelAttention": lambda: ultralytics("ChannelAttention", C),
    "ultralytics SpatialAttention": lambda: ultralytics("SpatialAttention", 3),
    "ultralytics Attention": lambda: ultralytics("Attention", C, 2, file="block"),
    "ultralytics AAttn": lambda: ultralytics("AAttn", C, 2, 2, file="block"),
    "smp SCSEModule": lambda: library("segmentation_models_pytorch.base.modules").SCSEModule(C),
    **{name: lambda e=e: e.reference(**e.arguments(C)) for name, e in ENTRIES.items() if e.main},
}


def spread_statistics(module: nn.Module) -> None:
    """Moves running statistics away from zero and one."""
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer += 0.5 * torch.rand_like(buffer)
