"""transformers' global response normalization, of ConvNeXt V2. Source: transformers 5 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

from .. import functional
from ..reference.as_built import Layers
from ..reference.grn import response
from .recipe import Recipe, Repeated
from .tiers import may_fuse

_EPS = 1e-6  # of the library's forward


class FastConvNextV2GRN(ConvNextV2GRN):
    """transformers' ConvNextV2GRN on token grids, fused."""

    LAYERS = Layers({})

    def forward(self, hidden_states: Tensor) -> Tensor:
        x: Tensor = hidden_states
        if x.dim() != 4 or not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        y = functional.grn(x.permute(0, 3, 1, 2), self.weight.flatten(), self.bias.flatten(), _EPS)
        return y.permute(0, 2, 3, 1)


def _look(module: Any, x: Tensor) -> dict[str, Tensor]:
    return {"channel": 1 + module.weight.view(-1, 1, 1) * response(x.permute(0, 3, 1, 2), _EPS)}


RECIPES = [
    Recipe(
        ConvNextV2GRN,
        FastConvNextV2GRN,
        "grn",
        look=_look,
        repeats=(Repeated(ConvNextV2GRN, "32257355dd2c3f48"),),
    )
]
