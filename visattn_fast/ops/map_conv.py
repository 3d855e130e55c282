"""Convolution of an image's two maps, ``[N, 2, H, W]``, to one.

It is an op of its own because PyTorch's convolution takes as long on a CPU as all passes over x together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cbam_halves import spatial_gate_backward
from .declare import composed_op
from .library import define


def _map_conv_reference(maps: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(maps, w.to(maps.dtype), padding=w.shape[3] // 2).contiguous()


def _map_conv_bwd_reference(grad: Tensor, maps: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    dmaps, dw = spatial_gate_backward(grad[:, 0].to(maps.dtype), maps, w)
    if not maps.numel():  # an empty tensor of any strides counts as contiguous
        dmaps = torch.zeros_like(maps, memory_format=torch.contiguous_format)
    return dmaps.contiguous(), dw


_MAPS = {"maps": "N 2 H W : sums", "w": "1 2 2*k+1 2*k+1 : floating strided"}
# Maps and results are in an accumulation dtype.
map_conv = define(
    "map_conv(Tensor maps, Tensor w) -> Tensor",
    None,
    _map_conv_reference,
    ("N 1 H W",),
    _MAPS,
)
map_conv_bwd = define(
    "map_conv_bwd(Tensor grad, Tensor maps, Tensor w) -> (Tensor dmaps, Tensor dw)",
    None,
    _map_conv_bwd_reference,
    ("shape of maps", "shape of w"),
    {**_MAPS, "grad": "N 1 H W"},
)


MAP_CONV = composed_op(
    "map_conv",
    lambda maps, w: (map_conv(maps, w),),
    lambda grad, tensors, small, options: map_conv_bwd(grad, *tensors),
    lambda maps, w: F.conv2d(maps, w, padding=w.shape[3] // 2),
)
