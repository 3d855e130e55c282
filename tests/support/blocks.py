"""Residual blocks of timm and MONAI with random batch norms, as built and accelerated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import visattn_fast as vf
from outside import library

C = 32  # channels


def block(attention: str | None, kind: str = "Bottleneck", **options: Any) -> nn.Module:
    """Builds a block in float64 with the timm attention of that name; an ``SEBlock`` is MONAI's."""
    torch.manual_seed(0)
    if kind == "SEBlock":
        return spread(library("monai.networks.blocks").SEBlock(2, C, 8, 8, C, **options))
    module = getattr(library("timm.models.resnet"), kind)
    gate = library("timm.layers").get_attn(attention)
    return spread(module(C, C // module.expansion, attn_layer=gate, **options))


def spread(module: nn.Module) -> nn.Module:
    """Draws weights and statistics of batch norms, of both signs; returns the module in float64."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.uniform_(tensor, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.double()


def accelerated(attention: str | None, *arguments: Any, **options: Any) -> nn.Module:
    """Builds a block and accelerates it and its gate."""
    built = block(attention, *arguments, **options)
    assert len(vf.accelerate(built).swapped) == 2
    return built
