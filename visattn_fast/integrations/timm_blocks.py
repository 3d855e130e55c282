"""timm's residual blocks that end in a gate. Source: timm 1.0 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from timm.models import resnet
from torch import Tensor, nn

from ..reference.as_built import ABSENT, AFFINE_BATCH_NORM, Layers, are_plain, layer
from . import timm_cbam, timm_gates
from .normed import normed_gate
from .recipe import ACTIVATIONS, Recipe, fingerprint, own_class, swapped_gate
from .tiers import may_fuse

_GATE = swapped_gate([*timm_gates.WITH_EPILOGUE, *timm_cbam.RECIPES])
_LAST = layer(*ACTIVATIONS)


class FastBasicBlock(resnet.BasicBlock):
    """timm's BasicBlock; its gate also adds the shortcut and activates, and includes the last norm if it can."""

    LAYERS = Layers({"se": _GATE, "drop_path": ABSENT, "act2": _LAST})
    NORM = Layers({"bn2": AFFINE_BATCH_NORM})

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        out = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        return _finish(block, block.conv2(out), block.bn2, x, block.act2)


class FastBottleneck(resnet.Bottleneck):
    """timm's Bottleneck, fused as `FastBasicBlock` is."""

    LAYERS = Layers({"se": _GATE, "drop_path": ABSENT, "act3": _LAST})
    NORM = Layers({"bn3": AFFINE_BATCH_NORM})

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        out = block.act1(block.bn1(block.conv1(x)))
        out = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(out)))))
        return _finish(block, block.conv3(out), block.bn3, x, block.act3)


# Hashes of the forward passes that the two classes above repeat; other versions are left alone.
_KNOWN_FORWARDS = {resnet.BasicBlock: "71ec36ab9b7237a2", resnet.Bottleneck: "6d62f9e26235e2c6"}


def _finish(block: Any, out: Tensor, norm: nn.Module, shortcut: Tensor, activation: nn.Module) -> Tensor:
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    name = ACTIVATIONS[type(activation)]
    if are_plain(block._modules, block.NORM):
        return normed_gate(out, norm, block.se, shortcut, name)
    return block.se(norm(out), residual=shortcut, activation=name)


def _why_not(block: nn.Module) -> str:
    kind = own_class(block)
    known = fingerprint(kind.forward) == _KNOWN_FORWARDS[kind]
    return "" if known else f"unknown version of {kind.__name__}.forward"


RECIPES = [
    Recipe(resnet.BasicBlock, FastBasicBlock, "epilogue", why_not=_why_not, block=True),
    Recipe(resnet.Bottleneck, FastBottleneck, "epilogue", why_not=_why_not, block=True),
]
