"""Convolutions of pooled values and maps, in the form in which they take the least time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional


def pointwise(conv: nn.Module, pooled: Tensor) -> Tensor:
    """``conv(pooled)``, for ``[N, C, 1, 1]``; a plain 1x1 convolution as the product that it is."""
    if type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding == (0, 0):
        return F.linear(pooled.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]
    return conv(pooled)


def map_logit(conv: nn.Module, maps: Tensor) -> Tensor:
    """``conv(maps)``, by our kernels where it is a plain convolution that keeps the maps' size."""
    if type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros":
        size = conv.weight.shape[3]
        plain = conv.stride == conv.dilation == (1, 1) and conv.padding == (size // 2, size // 2)
        if plain and conv.weight.shape == (1, 2, size, size) and size % 2:
            return functional.conv_maps(maps, conv.weight)
    return conv(maps)
