"""torchvision's squeeze-and-excitation. Source: torchvision 0.28 (BSD-3-Clause)."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import SqueezeExcitation

from .recipe import Recipe
from .se_like import se_layers, se_like


class FastSqueezeExcitation(SqueezeExcitation):
    """torchvision's SqueezeExcitation, fused."""

    def forward(self, input: Tensor) -> Tensor:
        return se_like(input, self.fc1, self.activation, self.fc2, self.scale_activation)


RECIPES = [
    Recipe(SqueezeExcitation, FastSqueezeExcitation, "se", se_layers("fc1", "activation", "fc2", "scale_activation"))
]
