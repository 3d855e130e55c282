"""timm's residual blocks that end in a gate. Source: timm 1.0 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from timm.models import resnet
from torch import Tensor, nn

from ..reference.as_built import AFFINE_BATCH_NORM, Layer, Layers, are_plain, layer
from . import timm_cbam, timm_gates
from .normed import normed_gate
from .recipe import ACTIVATIONS, Recipe, Repeated, swapped_gate
from .tiers import lacks, may_fuse

_GATE = swapped_gate([*timm_gates.WITH_EPILOGUE, *timm_cbam.RECIPES])
_LAST = layer(*ACTIVATIONS)


def _drops_nothing(layers: dict[str, Layer]) -> Layers:
    """Returns ``layers``, of a block without ``drop_path``."""
    return Layers(layers, fits=lacks("drop_path"), words="drop_path: it may drop the branch")


class FastBasicBlock(resnet.BasicBlock):
    """timm's BasicBlock; its gate also adds the shortcut and activates, and includes the last norm if it can."""

    LAYERS = _drops_nothing({"se": _GATE, "act2": _LAST})
    NORM = Layers({"bn2": AFFINE_BATCH_NORM})

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        out = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        return _finish(block, block.conv2(out), block.bn2, x, block.act2)


class FastBottleneck(resnet.Bottleneck):
    """timm's Bottleneck, fused as `FastBasicBlock` is."""

    LAYERS = _drops_nothing({"se": _GATE, "act3": _LAST})
    NORM = Layers({"bn3": AFFINE_BATCH_NORM})

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        out = block.act1(block.bn1(block.conv1(x)))
        out = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(out)))))
        return _finish(block, block.conv3(out), block.bn3, x, block.act3)


def _finish(block: Any, out: Tensor, norm: nn.Module, shortcut: Tensor, activation: nn.Module) -> Tensor:
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    name = ACTIVATIONS[type(activation)]
    if are_plain(block._modules, block.NORM):
        return normed_gate(out, norm, block.se, shortcut, name)
    return block.se(norm(out), residual=shortcut, activation=name)


RECIPES = [
    Recipe(kind, fast, "epilogue", block=True, repeats=(Repeated(kind, known),))
    for kind, fast, known in (
        (resnet.BasicBlock, FastBasicBlock, "459b888dd004c304"),
        (resnet.Bottleneck, FastBottleneck, "58c1c81d9c8b129b"),
    )
]
