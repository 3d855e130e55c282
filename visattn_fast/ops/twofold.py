"""Passes over x for a gate per channel and a gate per pixel together, and the means and maxima that both are made of.

Small tensors are in the accumulation dtype: pooled values ``[N, 2, C]`` and maps ``[N, 2, H, W]``, the mean first;
gates ``[N, C]`` and ``[N, H, W]``. `at` notes where a maximum came from: the first index; with ``even``, where the
gradient is shared evenly as ``amax`` does, the index of a maximum without equals, else minus their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cbam_halves import pool_channels as _first_of_channels
from .cbam_halves import pool_pixels as _first_of_pixels
from .epilogue import finish, residual_gradient, residual_gradient_shape, start_backward
from .layout import accumulation_dtype, to_map
from .library import define


def _both(channel: Tensor, spatial: Tensor) -> Tensor:
    return channel[:, :, None, None] * spatial[:, None]


def _count_ties(at: Tensor, equal: Tensor, dim: int) -> Tensor:
    count = equal.sum(dim).to(at.dtype)
    return torch.where(count > 1, -count, at)


def _pool_pixels_reference(x: Tensor, even: int) -> tuple[Tensor, ...]:
    pooled, at = _first_of_pixels(x, accumulation_dtype(x))
    return pooled, _count_ties(at, x.flatten(2) == pooled[:, 1, :, None], 2) if even else at


def _pool_channels_reference(x: Tensor, gate: Tensor, even: int) -> tuple[Tensor, ...]:
    u = x * gate[:, :, None, None]
    maps, at = _first_of_channels(u, u.dtype)
    return maps, _count_ties(at, u == maps[:, 1:], 1) if even else at


def _share(value: Tensor, maximum: Tensor, grad: Tensor, at: Tensor, dim: int) -> Tensor:
    """The maxima's gradient for every element of ``value``; the others have the size 1 along ``dim``."""
    index = torch.arange(value.shape[dim], dtype=at.dtype, device=at.device).view(-1, *[1] * (value.dim() - 1 - dim))
    hits = torch.where(at < 0, value == maximum, index == at)
    return torch.where(hits, grad / torch.where(at < 0, -at, 1), 0.0)


def _map_gradient(x: Tensor, gate: Tensor, maps: Tensor, dmaps: Tensor, at: Tensor) -> Tensor:
    """Of ``u = x * gate`` by way of its maps."""
    u = x * gate[:, :, None, None]
    return dmaps[:, :1] / x.shape[1] + _share(u, maps[:, 1:], dmaps[:, 1:], at[:, None], 1)


def _pool_channels_bwd_reference(x: Tensor, gate: Tensor, maps: Tensor, dmaps: Tensor, at: Tensor) -> Tensor:
    return (x * _map_gradient(x, gate, maps, dmaps, at)).sum((2, 3))


def _twofold_scale_reference(
    x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int
) -> Tensor:
    return finish(x, _both(channel, spatial), residual, activation)


def _twofold_scale_bwd_reference(
    grad: Tensor, x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int
) -> tuple[Tensor, ...]:
    grad = start_backward(grad, x, _both(channel, spatial), residual, activation)
    product = grad * x
    dchannel, dspatial = (product * spatial[:, None]).sum((2, 3)), (product * channel[:, :, None, None]).sum(1)
    return dchannel, dspatial, residual_gradient(grad, x, activation)


def _twofold_input_grad_reference(
    grad: Tensor,
    x: Tensor,
    channel: Tensor,
    spatial: Tensor,
    maps: Tensor,
    dmaps: Tensor,
    at_c: Tensor,
    pooled: Tensor,
    dpooled: Tensor,
    at_hw: Tensor,
) -> Tensor:
    du = grad * spatial[:, None] + _map_gradient(x, channel, maps, dmaps, at_c)
    dmean, dmax = dpooled[:, 0, :, None] / (x.shape[2] * x.shape[3]), dpooled[:, 1, :, None]
    shared = _share(x.flatten(2).to(dmax.dtype), pooled[:, 1, :, None], dmax, at_hw[:, :, None], 2)
    return to_map(du * channel[:, :, None, None] + (dmean + shared).view(x.shape), x)


pool_pixels = define(
    "pool_pixels(Tensor x, bool even) -> (Tensor pooled, Tensor at)",
    "twofold",
    _pool_pixels_reference,
    ("N 2 C", "N C : int32"),
)
# Maps of u = x * gate, which is never stored.
pool_channels = define(
    "pool_channels(Tensor x, Tensor gate, bool even) -> (Tensor maps, Tensor at)",
    "twofold",
    _pool_channels_reference,
    ("N 2 H W", "N H W : int32"),
)
pool_channels_bwd = define(
    "pool_channels_bwd(Tensor x, Tensor gate, Tensor maps, Tensor dmaps, Tensor at) -> Tensor dgate",
    "twofold",
    _pool_channels_bwd_reference,
    ("N C",),
)
# y = act(x * channel * spatial + residual)
twofold_scale = define(
    "twofold_scale(Tensor x, Tensor channel, Tensor spatial, Tensor? residual, int activation) -> Tensor y",
    "twofold",
    _twofold_scale_reference,
    ("like x",),
)
twofold_scale_bwd = define(
    "twofold_scale_bwd(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor? residual, int activation)"
    " -> (Tensor dchannel, Tensor dspatial, Tensor dresidual)",
    "twofold",
    _twofold_scale_bwd_reference,
    ("N C", "N H W", residual_gradient_shape),
)
# dx = (grad spatial + dmean map / C + dmax map at the maxima) channel + dmean / HW + dmax at the maxima. Values of
# x are read only where several maxima are equal.
twofold_input_grad = define(
    "twofold_input_grad(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor maps, Tensor dmaps, Tensor at_c,"
    " Tensor pooled, Tensor dpooled, Tensor at_hw) -> Tensor dx",
    "twofold",
    _twofold_input_grad_reference,
    ("like x",),
)
