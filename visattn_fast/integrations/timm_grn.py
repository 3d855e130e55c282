"""timm's global response normalization. Source: timm 1.0 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from timm.layers.grn import GlobalResponseNorm
from torch import Tensor

from .. import functional
from ..reference.as_built import Layers
from ..reference.grn import response
from .recipe import Recipe, Repeated
from .tiers import may_fuse


class FastGlobalResponseNorm(GlobalResponseNorm):
    """timm's GlobalResponseNorm, fused, on maps and on token grids."""

    LAYERS = Layers({})

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        y = functional.grn(_as_map(self, x), self.weight, self.bias, self.eps)
        return y.permute(0, 2, 3, 1) if self.channel_dim == -1 else y


def _as_map(module: Any, x: Tensor) -> Tensor:
    """Returns x as ``[N, C, H, W]``."""
    return x.permute(0, 3, 1, 2) if module.channel_dim == -1 else x


def _look(module: Any, x: Tensor) -> dict[str, Tensor]:
    return {"channel": 1 + module.weight[:, None, None] * response(_as_map(module, x), module.eps)}


RECIPES = [
    Recipe(
        GlobalResponseNorm,
        FastGlobalResponseNorm,
        "grn",
        look=_look,
        repeats=(Repeated(GlobalResponseNorm, "315f50e834a6ec9b"),),
    )
]
