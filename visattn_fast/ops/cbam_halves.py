"""What CBAM shares with its two halves, in accumulation precision: pooling, gates, and their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .layout import empty_small


def pool_pixels(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[N, C, H, W]`` -> (mean, max) over the pixels ``[N, 2, C]`` and the first maximum's index ``[N, C]``."""
    maximum, index = x.flatten(2).max(dim=2)
    return torch.stack([x.mean((2, 3), dtype=dtype), maximum.to(dtype)], 1), index.to(torch.int32)


def pool_channels(u: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[N, C, H, W]`` -> (mean, max) over channels ``[N, 2, H, W]`` and the first maximum's index ``[N, H, W]``."""
    maximum, index = u.max(dim=1)
    return torch.stack([u.mean(1, dtype=dtype), maximum.to(dtype)], 1), index.to(torch.int32)


def channel_gate(pooled: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled ``[N, 2, C]`` -> hidden ``[N, 2, R]`` and gate ``[N, C]``."""
    hidden = F.relu(F.linear(pooled, w1.flatten(1).to(pooled.dtype)))
    return hidden, torch.sigmoid(F.linear(hidden, w2.flatten(1).to(pooled.dtype)).sum(1))


def channel_gate_backward(
    dz: Tensor, pooled: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ``[N, C]`` before the sigmoid -> those of pooled ``[N, 2, C]``, w1 and w2."""
    a = dz.dtype
    dhidden = torch.where(hidden <= 0, 0.0, (dz @ w2.flatten(1).to(a))[:, None])
    dw1 = torch.einsum("nbr,nbc->rc", dhidden, pooled).view(w1.shape)
    dw2 = torch.einsum("nc,nbr->cr", dz, hidden).view(w2.shape)
    return dhidden @ w1.flatten(1).to(a), dw1, dw2


def spatial_gate(maps: Tensor, wconv: Tensor, bias: Tensor | None) -> Tensor:
    """Maps ``[N, 2, H, W]`` -> gate ``[N, H, W]``."""
    bias = None if bias is None else bias.to(maps.dtype)
    return torch.sigmoid(F.conv2d(maps, wconv.to(maps.dtype), bias, padding=wconv.shape[3] // 2)[:, 0])


def spatial_gate_backward(dz: Tensor, maps: Tensor, wconv: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient ``[N, H, W]`` before the sigmoid -> those of maps ``[N, 2, H, W]`` and wconv."""
    wconv, dz, half = wconv.to(maps.dtype), dz[:, None], wconv.shape[3] // 2
    dmaps = conv2d_input(maps.shape, wconv, dz, padding=half)
    return dmaps, conv2d_weight(maps, wconv.shape, dz, padding=half).contiguous()


def spatial_bias_gradient(dz: Tensor, bias: Tensor | None) -> Tensor:
    """Gradient ``[N, H, W]`` before the sigmoid -> that of the bias ``[1]``; empty where there is none."""
    return dz.new_empty(0) if bias is None else dz.sum().view(1)


def empty_bias_gradient(x: Tensor, bias: Tensor | None) -> Tensor:
    """The fake of `spatial_bias_gradient`."""
    return empty_small(x, 0 if bias is None else 1)


def unpool_pixels(dpooled: Tensor, argmax_hw: Tensor, x: Tensor) -> Tensor:
    """Gradient of `pool_pixels`: ``[N, 2, C]`` -> ``[N, C, H, W]``."""
    area = x.shape[2] * x.shape[3]
    dx = (dpooled[:, 0, :, None] / area).repeat(1, 1, area)
    return dx.scatter_add_(2, argmax_hw[:, :, None].long(), dpooled[:, 1, :, None]).view(x.shape)


def unpool_channels(dmaps: Tensor, argmax_c: Tensor, x: Tensor) -> Tensor:
    """Gradient of `pool_channels`: ``[N, 2, H, W]`` -> ``[N, C, H, W]``."""
    du = (dmaps[:, :1] / x.shape[1]).repeat(1, x.shape[1], 1, 1)
    return du.scatter_add_(1, argmax_c[:, None].long(), dmaps[:, 1:])
