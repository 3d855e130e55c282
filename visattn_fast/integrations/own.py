"""Recipes for the reference modules of this package, and for the residual block of its models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..catalogue import ENTRIES
from ..models.resnet import AttentionBlock
from .recipe import Recipe, is_fused


class FastAttentionBlock(AttentionBlock):
    """AttentionBlock; its gate also adds the shortcut and activates."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.gate(out, residual=self.shortcut(x), activation="relu")


_GATES = [Recipe(entry.reference, entry.fast, entry.name) for entry in ENTRIES.values() if entry.training]
_WITH_EPILOGUE = tuple(entry.fast for entry in ENTRIES.values() if entry.epilogue)


def _why_not_block(block: nn.Module) -> str:
    gate = block.get_submodule("gate")
    if block.epilogue:
        return "its gate has the epilogue already"
    return "" if is_fused(gate) and isinstance(gate, _WITH_EPILOGUE) else "its gate was not swapped, or has no epilogue"


RECIPES = [*_GATES, Recipe(AttentionBlock, FastAttentionBlock, "epilogue", _why_not_block, block=True)]
