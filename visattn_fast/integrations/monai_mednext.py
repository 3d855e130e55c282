"""MONAI's MedNeXt blocks, whose own forward computes a response normalization. Source: MONAI 1.6 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from monai.networks.blocks.mednext_block import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from torch import Tensor

from .. import functional
from ..reference.as_built import Layers
from ..reference.grn import response
from ..reference.positions import over_positions
from .recipe import Recipe, Repeated
from .tiers import may_fuse
from .traceless import buffers_kept

_EPS = 1e-6  # of the library's forward
_DIMENSIONS = {"2d": 4, "3d": 5}


class FastMedNeXtBlock(MedNeXtBlock):
    """MONAI's MedNeXtBlock with a fused global response normalization; its layers are called."""

    LAYERS = Layers({})

    def forward(self, x: Tensor) -> Tensor:
        fits = isinstance(x, Tensor) and x.dim() == _DIMENSIONS.get(self.dim)
        if not self.global_resp_norm or not fits or not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        hidden = functional.grn(
            _hidden(self, x), self.global_resp_gamma.flatten(), self.global_resp_beta.flatten(), _EPS
        )
        y: Tensor = self.conv3(hidden)
        return x + y if self.do_res else y


class FastMedNeXtDownBlock(MedNeXtDownBlock, FastMedNeXtBlock):
    """MONAI's MedNeXtDownBlock, fused as `FastMedNeXtBlock` is: it calls that forward."""


class FastMedNeXtUpBlock(MedNeXtUpBlock, FastMedNeXtBlock):
    """MONAI's MedNeXtUpBlock, fused as `FastMedNeXtBlock` is: it calls that forward."""


def _hidden(block: Any, x: Tensor) -> Tensor:
    """Computes the map that is normalised."""
    found: Tensor = block.act(block.conv2(block.norm(block.conv1(x))))
    return found


def _look(block: Any, x: Tensor) -> dict[str, Tensor]:
    with buffers_kept(block):
        found = _factor(_hidden(block, x), block.global_resp_gamma.flatten())
    return {"channel": found}


@over_positions
def _factor(x: Tensor, weight: Tensor) -> Tensor:
    return 1 + weight[:, None, None] * response(x, _EPS)


_BODY = Repeated(MedNeXtBlock, "1368562ccc1000a2")
RECIPES = [
    Recipe(block, fast, "grn", inline=lambda block: block.global_resp_norm, look=_look, repeats=repeats)
    for block, fast, repeats in (
        (MedNeXtBlock, FastMedNeXtBlock, (_BODY,)),
        (MedNeXtDownBlock, FastMedNeXtDownBlock, (_BODY, Repeated(MedNeXtDownBlock, "a8cc91a506c2db39"))),
        (MedNeXtUpBlock, FastMedNeXtUpBlock, (_BODY, Repeated(MedNeXtUpBlock, "9e3f852feb11648e"))),
    )
]
