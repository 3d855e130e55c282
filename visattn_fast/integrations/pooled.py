"""Convolutions of pooled values and maps, each in its fastest form."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..reference.as_built import POINTWISE, SAME_SIZE_WITHOUT_BIAS, Layers, are_plain

_POINTWISE = Layers({"conv": POINTWISE})
_MAP_CONV = Layers({"conv": SAME_SIZE_WITHOUT_BIAS})


def pointwise(conv: Any, pooled: Tensor) -> Tensor:
    """Computes ``conv(pooled)`` for ``[N, C, 1, 1]``; a plain 1x1 convolution as a matrix product."""
    if are_plain({"conv": conv}, _POINTWISE):
        return F.linear(pooled.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]
    return conv(pooled)


def map_logit(conv: Any, maps: Tensor) -> Tensor:
    """Computes ``conv(maps)``; by our kernels if it is a plain convolution that keeps the size of the maps."""
    if are_plain({"conv": conv}, _MAP_CONV):
        return functional.conv_maps(maps, conv.weight)
    return conv(maps)
