"""Pooling, gates and their gradients, shared by CBAM and its two halves. All results are in the accumulation dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .layout import empty_small


def pool_pixels(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pools over the pixels: mean and maximum ``[N, 2, C]``, and the index of the first maximum ``[N, C]``."""
    maximum, index = x.flatten(2).max(dim=2)
    return torch.stack([x.mean((2, 3), dtype=dtype), maximum.to(dtype)], 1), index.to(torch.int32)


def pool_channels(u: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pools over the channels: mean and maximum ``[N, 2, H, W]``, and the index of the first maximum ``[N, H, W]``."""
    maximum, index = u.max(dim=1)
    return torch.stack([u.mean(1, dtype=dtype), maximum.to(dtype)], 1), index.to(torch.int32)


def channel_gate(pooled: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the hidden layer ``[N, 2, R]`` and the gate ``[N, C]`` from pooled values ``[N, 2, C]``."""
    hidden = F.relu(F.linear(pooled, w1.flatten(1).to(pooled.dtype)))
    return hidden, torch.sigmoid(F.linear(hidden, w2.flatten(1).to(pooled.dtype)).sum(1))


def channel_gate_backward(
    dz: Tensor, pooled: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pooled ``[N, 2, C]``, w1 and w2, from the gradient before the sigmoid ``[N, C]``."""
    a = dz.dtype
    dhidden = torch.where(hidden <= 0, 0.0, (dz @ w2.flatten(1).to(a))[:, None])
    dw1 = torch.einsum("nbr,nbc->rc", dhidden, pooled).view(w1.shape)
    dw2 = torch.einsum("nc,nbr->cr", dz, hidden).view(w2.shape)
    return dhidden @ w1.flatten(1).to(a), dw1, dw2


def spatial_gate(maps: Tensor, wconv: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the gate ``[N, H, W]`` from maps ``[N, 2, H, W]``."""
    bias = None if bias is None else bias.to(maps.dtype)
    return torch.sigmoid(F.conv2d(maps, wconv.to(maps.dtype), bias, padding=wconv.shape[3] // 2)[:, 0])


def spatial_gate_backward(dz: Tensor, maps: Tensor, wconv: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of maps ``[N, 2, H, W]`` and wconv, from the gradient before the sigmoid ``[N, H, W]``."""
    wconv, dz, half = wconv.to(maps.dtype), dz[:, None], wconv.shape[3] // 2
    dmaps = conv2d_input(maps.shape, wconv, dz, padding=half)
    return dmaps, conv2d_weight(maps, wconv.shape, dz, padding=half).contiguous()


def spatial_bias_gradient(dz: Tensor, bias: Tensor | None) -> Tensor:
    """Gradient of the bias ``[1]``, from the gradient before the sigmoid ``[N, H, W]``; empty without a bias."""
    return empty_small(dz, 0) if bias is None else dz.sum().view(1)


def unpool_pixels(dpooled: Tensor, argmax_hw: Tensor, x: Tensor) -> Tensor:
    """Backward of `pool_pixels`: ``[N, 2, C]`` -> ``[N, C, H, W]``."""
    area = x.shape[2] * x.shape[3]
    dx = (dpooled[:, 0, :, None] / area).repeat(1, 1, area)
    return dx.scatter_add_(2, argmax_hw[:, :, None].long(), dpooled[:, 1, :, None]).view(x.shape)


def unpool_channels(dmaps: Tensor, argmax_c: Tensor, x: Tensor) -> Tensor:
    """Backward of `pool_channels`: ``[N, 2, H, W]`` -> ``[N, C, H, W]``."""
    du = (dmaps[:, :1] / x.shape[1]).repeat(1, x.shape[1], 1, 1)
    return du.scatter_add_(1, argmax_c[:, None].long(), dmaps[:, 1:])
