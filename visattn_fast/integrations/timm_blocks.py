"""timm's residual blocks that end in a gate. Source: timm 1.0 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from timm.models import resnet
from torch import Tensor, nn

from .normed import normed_gate
from .recipe import ACTIVATIONS, Recipe, fingerprint, is_swapped, own_class


class FastBasicBlock(resnet.BasicBlock):
    """timm's BasicBlock; its gate also adds the shortcut and activates, and includes the last norm if it can."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        out = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        return _finish(block, block.conv2(out), block.bn2, x, block.act2)


class FastBottleneck(resnet.Bottleneck):
    """timm's Bottleneck, fused as `FastBasicBlock` is."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        out = block.act1(block.bn1(block.conv1(x)))
        out = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(out)))))
        return _finish(block, block.conv3(out), block.bn3, x, block.act3)


# Hashes of the forward passes that the two classes above repeat; other versions are left alone.
_KNOWN_FORWARDS = {"BasicBlock": "71ec36ab9b7237a2", "Bottleneck": "6d62f9e26235e2c6"}


def _finish(block: Any, out: Tensor, norm: nn.Module, shortcut: Tensor, activation: nn.Module) -> Tensor:
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    name = ACTIVATIONS[type(activation)]
    return normed_gate(out, norm, block.se, shortcut, name)


def recipes(gates: tuple[type[nn.Module], ...]) -> list[Recipe]:
    """Returns the recipes of blocks around one of these fused gates, all of which take an epilogue."""

    def why_not(block: Any) -> str:
        kind, last = own_class(block), block.act3 if isinstance(block, resnet.Bottleneck) else block.act2
        if not (block.se is not None and is_swapped(block.se) and isinstance(block.se, gates)):
            return "its gate was not swapped, or has no epilogue"
        if block.drop_path is not None:
            return "drop_path stands between the gate and the addition"
        if type(last) not in ACTIVATIONS:
            return f"its last activation is {type(last).__name__}, not ReLU or SiLU"
        known = fingerprint(kind.forward) == _KNOWN_FORWARDS[kind.__name__]
        return "" if known else f"unknown version of {kind.__name__}.forward"

    return [
        Recipe(resnet.BasicBlock, FastBasicBlock, "epilogue", why_not, block=True),
        Recipe(resnet.Bottleneck, FastBottleneck, "epilogue", why_not, block=True),
    ]
