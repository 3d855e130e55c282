"""Residual blocks of timm and MONAI with random batch norms, as built and accelerated; all that has a gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import visattn_fast as vf
from known_modules import MODULES
from outside import library
from visattn_fast.catalogue import ENTRIES, feature_map
from visattn_fast.models.resnet import AttentionBlock

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


def swin(name: str) -> nn.Module:
    if name == "timm":
        return library("timm.models.swin_transformer").SwinTransformerBlock(C, (7, 6), 2, window_size=4, shift_size=2)
    return library("torchvision.models.swin_transformer").ShiftedWindowAttention(C, [4, 4], [2, 2], 2)


# Gates of other libraries, and blocks around gates. The package's own modules: tests/modules.
GATED: dict[str, Callable[[], nn.Module]] = {
    **{name: build for name, build in MODULES.items() if name not in ENTRIES},
    **{f"{name} Swin": functools.partial(swin, name) for name in ("timm", "torchvision")},
    **{f"timm {kind}, {gate}": functools.partial(block, gate, kind) for kind, gate in (
        ("Bottleneck", "se"), ("BasicBlock", "eca"), ("BasicBlock", "cbam"), ("BasicBlock", "ese")
    )},
    "monai SEBlock": functools.partial(block, None, "SEBlock"),
    "AttentionBlock": functools.partial(AttentionBlock, C, C, 1, "se", fused=False),
    "AttentionBlock, fused": functools.partial(AttentionBlock, C, C, 1, "se", fused=True),
}  # fmt: skip


def inputs(name: str) -> torch.Tensor:
    return feature_map((2, 7, 6, C) if "Swin" in name else (2, C, 7, 6), dtype=torch.float64)
