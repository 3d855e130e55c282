"""Recipes for the reference modules of this package, and for the residual block of its models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..catalogue import ENTRIES
from ..models.resnet import AttentionBlock
from ..reference.as_built import Layers
from .recipe import Recipe, swapped_gate
from .tiers import may_fuse

# A fused module calls its layers itself if it must, so it serves any module of its class.
# Among entries of one class, the first names it.
_GATES = {e.reference: Recipe(e.reference, e.fast, e.name, e.name) for e in reversed(ENTRIES.values())}


class FastAttentionBlock(AttentionBlock):
    """AttentionBlock; its gate also adds the shortcut and activates."""

    LAYERS = Layers(
        {"gate": swapped_gate([_GATES[e.reference] for e in ENTRIES.values() if e.epilogue])},
        fits=lambda d: not d["epilogue"],
        words="its gate has the epilogue already",
    )

    def forward(self, x: Tensor) -> Tensor:
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.gate(out, residual=self.shortcut(x), activation="relu")


RECIPES = [*_GATES.values(), Recipe(AttentionBlock, FastAttentionBlock, "epilogue", block=True)]
