"""The scSE of segmentation-models-pytorch's decoders. Source: segmentation-models-pytorch 0.6 (MIT)."""

from __future__ import annotations

from segmentation_models_pytorch.base.modules import SCSEModule
from torch import Tensor

from .. import functional, reference
from ..reference.parameter_access import weight_and_bias
from .looking import layers_as_gates
from .recipe import Recipe, Repeated
from .se_like import why_no_units
from .tiers import may_fuse


class FastSCSEModule(SCSEModule):
    """segmentation-models-pytorch's SCSEModule, fused."""

    LAYERS = reference.scSE.LAYERS  # its layers have the same names

    def forward(self, x: Tensor) -> Tensor:
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        _, reduce, _, expand, _ = self.cSE
        weights = (*weight_and_bias(reduce), *weight_and_bias(expand), *weight_and_bias(self.sSE[0]))
        return functional.scse(x, *weights)


_look = layers_as_gates(channel="cSE", spatial="sSE")

RECIPES = [
    Recipe(
        SCSEModule,
        FastSCSEModule,
        "scse",
        why_not=why_no_units("cSE.1"),
        look=_look,
        repeats=(Repeated(SCSEModule, "4ba4154a4600b26d"),),
    )
]
