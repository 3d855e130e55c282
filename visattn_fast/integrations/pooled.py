"""Convolutions of pooled values and maps, each in its fastest form."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional


def pointwise(conv: Any, pooled: Tensor) -> Tensor:
    """Computes ``conv(pooled)`` for ``[N, C, 1, 1]``; a plain 1x1 convolution as a matrix product."""
    if is_pointwise(conv):
        return F.linear(pooled.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]
    return conv(pooled)


def is_pointwise(conv: Any) -> bool:
    """True if the layer is a plain 1x1 convolution."""
    return type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)


def map_logit(conv: Any, maps: Tensor) -> Tensor:
    """Computes ``conv(maps)``; by our kernels if it is a plain convolution that keeps the size of the maps."""
    if is_map_conv(conv) and conv.bias is None:
        return functional.conv_maps(maps, conv.weight)
    return conv(maps)


def is_map_conv(conv: Any) -> bool:
    """True if the layer is a plain convolution of two maps to one map of the same size."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
        return False
    size = conv.weight.shape[3]
    plain = conv.stride == conv.dilation == (1, 1) and conv.padding == (size // 2, size // 2)
    return plain and conv.weight.shape == (1, 2, size, size) and size % 2 == 1
