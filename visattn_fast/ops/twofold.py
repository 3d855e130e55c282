"""Passes over x for a gate per channel and a gate per pixel: pool to mean and maximum, scale, and their gradients.

Small tensors are in the accumulation dtype: pooled values ``[N, 2, C]`` and maps ``[N, 2, H, W]``, the mean first;
gates ``[N, C]`` and ``[N, H, W]``. An argmax (``at`` in the schemas) is the index of the first maximum. With
``share_ties`` (``even`` in the schemas) equal maxima share the gradient evenly, as in ``amax``: the argmax is then the
index of a maximum without equals, or minus the number of equal maxima.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cbam_halves import pool_channels as _first_of_channels
from .cbam_halves import pool_pixels as _first_of_pixels
from .epilogue import finish, residual_gradient, residual_gradient_shape, start_backward
from .layout import accumulation_dtype, to_map
from .library import define
from .signature import MAP


def _joint_gate(channel: Tensor, spatial: Tensor) -> Tensor:
    return channel[:, :, None, None] * spatial[:, None]


def _count_ties(argmax: Tensor, equal: Tensor, dim: int) -> Tensor:
    count = equal.sum(dim).to(argmax.dtype)
    return torch.where(count > 1, -count, argmax)


def _pool_pixels_reference(x: Tensor, share_ties: int) -> tuple[Tensor, ...]:
    pooled, argmax = _first_of_pixels(x, accumulation_dtype(x))
    return pooled, _count_ties(argmax, x.flatten(2) == pooled[:, 1, :, None], 2) if share_ties else argmax


def _pool_channels_reference(x: Tensor, gate: Tensor, share_ties: int) -> tuple[Tensor, ...]:
    u = x * gate[:, :, None, None]
    maps, argmax = _first_of_channels(u, u.dtype)
    return maps, _count_ties(argmax, u == maps[:, 1:], 1) if share_ties else argmax


def _maximum_gradient(value: Tensor, maximum: Tensor, grad: Tensor, argmax: Tensor, dim: int) -> Tensor:
    """Gradient of the maxima for every element of ``value``. The other arguments have size 1 along ``dim``."""
    index = torch.arange(value.shape[dim], dtype=argmax.dtype, device=argmax.device)
    index = index.view(-1, *[1] * (value.dim() - 1 - dim))
    hits = torch.where(argmax < 0, value == maximum, index == argmax)
    return torch.where(hits, grad / torch.where(argmax < 0, -argmax, 1), 0.0)


def _map_gradient(x: Tensor, gate: Tensor, maps: Tensor, dmaps: Tensor, argmax: Tensor) -> Tensor:
    """Gradient of ``u = x * gate`` through its maps."""
    u = x * gate[:, :, None, None]
    return dmaps[:, :1] / x.shape[1] + _maximum_gradient(u, maps[:, 1:], dmaps[:, 1:], argmax[:, None], 1)


def _pool_channels_bwd_reference(x: Tensor, gate: Tensor, maps: Tensor, dmaps: Tensor, argmax: Tensor) -> Tensor:
    return (x * _map_gradient(x, gate, maps, dmaps, argmax)).sum((2, 3))


def _twofold_scale_reference(
    x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int
) -> Tensor:
    return finish(x, _joint_gate(channel, spatial), residual, activation)


def _twofold_scale_bwd_reference(
    grad: Tensor, x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int
) -> tuple[Tensor, ...]:
    grad = start_backward(grad, x, _joint_gate(channel, spatial), residual, activation)
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
    argmax_c: Tensor,
    pooled: Tensor,
    dpooled: Tensor,
    argmax_hw: Tensor,
) -> Tensor:
    du = grad * spatial[:, None] + _map_gradient(x, channel, maps, dmaps, argmax_c)
    dmean, dmax = dpooled[:, 0, :, None] / (x.shape[2] * x.shape[3]), dpooled[:, 1, :, None]
    shared = _maximum_gradient(x.flatten(2).to(dmax.dtype), pooled[:, 1, :, None], dmax, argmax_hw[:, :, None], 2)
    return to_map(du * channel[:, :, None, None] + (dmean + shared).view(x.shape), x)


_GATES = {"channel": "N C", "spatial": "N H W"}
_AT_CHANNEL = "N H W : int32 in -C..C-1"
pool_pixels = define(
    "pool_pixels(Tensor x, bool even) -> (Tensor pooled, Tensor at)",
    "twofold",
    _pool_pixels_reference,
    ("N 2 C", "N C : int32"),
    {"x": MAP},
)
# The maps of u = x * gate; u is never stored.
pool_channels = define(
    "pool_channels(Tensor x, Tensor gate, bool even) -> (Tensor maps, Tensor at)",
    "twofold",
    _pool_channels_reference,
    ("N 2 H W", "N H W : int32"),
    {"x": MAP, "gate": "N C"},
)
pool_channels_bwd = define(
    "pool_channels_bwd(Tensor x, Tensor gate, Tensor maps, Tensor dmaps, Tensor at) -> Tensor dgate",
    "twofold",
    _pool_channels_bwd_reference,
    ("N C",),
    {"x": MAP, "gate": "N C", "maps": "N 2 H W", "dmaps": "N 2 H W", "at": _AT_CHANNEL},
)
# y = act(x * channel * spatial + residual)
twofold_scale = define(
    "twofold_scale(Tensor x, Tensor channel, Tensor spatial, Tensor? residual, int activation) -> Tensor y",
    "twofold",
    _twofold_scale_reference,
    ("like x",),
    {"x": MAP, **_GATES, "residual": "like x"},
)
twofold_scale_bwd = define(
    "twofold_scale_bwd(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor? residual, int activation)"
    " -> (Tensor dchannel, Tensor dspatial, Tensor dresidual)",
    "twofold",
    _twofold_scale_bwd_reference,
    ("N C", "N H W", residual_gradient_shape),
    {"x": MAP, **_GATES, "residual": "like x", "grad": "like x"},
)
# dx = (grad spatial + dmean_map / C + dmax_map at its maxima) channel + dmean / HW + dmax at its maxima. Reads x only
# where maxima are equal.
twofold_input_grad = define(
    "twofold_input_grad(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor maps, Tensor dmaps, Tensor at_c,"
    " Tensor pooled, Tensor dpooled, Tensor at_hw) -> Tensor dx",
    "twofold",
    _twofold_input_grad_reference,
    ("like x",),
    {
        "x": MAP,
        "grad": "like x",
        **_GATES,
        **dict.fromkeys(("maps", "dmaps"), "N 2 H W"),
        "at_c": _AT_CHANNEL,
        **dict.fromkeys(("pooled", "dpooled"), "N 2 C"),
        "at_hw": "N C : int32 in -H*W..H*W-1",
    },
)
