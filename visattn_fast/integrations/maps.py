"""The layer that CBAM's maps meet first."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional


def map_logit(conv: nn.Module, maps: Tensor) -> Tensor:
    """``conv(maps)``, by our kernels where it is a plain convolution that keeps the maps' size."""
    if type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros":
        size = conv.weight.shape[3]
        plain = conv.stride == conv.dilation == (1, 1) and conv.padding == (size // 2, size // 2)
        if plain and conv.weight.shape == (1, 2, size, size) and size % 2:
            return functional.conv_maps(maps, conv.weight)
    return conv(maps)
