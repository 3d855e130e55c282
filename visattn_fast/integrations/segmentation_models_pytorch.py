"""The scSE of segmentation-models-pytorch's decoders. Source: segmentation-models-pytorch 0.6 (MIT)."""

from __future__ import annotations

from typing import Any

from segmentation_models_pytorch.base.modules import SCSEModule
from torch import Tensor, nn

from .. import functional
from .recipe import Recipe, require_layers


class FastSCSEModule(SCSEModule):
    """segmentation-models-pytorch's SCSEModule, fused."""

    def forward(self, x: Tensor) -> Tensor:
        squeeze: Any = self.cSE
        pixel: Any = self.sSE[0]
        reduce, expand = squeeze[1], squeeze[3]
        weights = (reduce.weight, reduce.bias, expand.weight, expand.bias, pixel.weight, pixel.bias)
        return functional.scse(x, *weights)


_LAYERS = {
    "cSE.0": (nn.AdaptiveAvgPool2d,),
    "cSE.1": (nn.Conv2d,),
    "cSE.2": (nn.ReLU,),
    "cSE.3": (nn.Conv2d,),
    "cSE.4": (nn.Sigmoid,),
    "sSE.0": (nn.Conv2d,),
    "sSE.1": (nn.Sigmoid,),
}

RECIPES = [Recipe(SCSEModule, FastSCSEModule, "scse", require_layers(_LAYERS))]
