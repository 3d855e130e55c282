"""The passes over x of a gate per channel and a gate per pixel whose mathematics is done elsewhere.

An argmax may be minus the number of equal maxima, which then share their gradient.
"""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.gate import apply_gates, gate_grads
from ..passes.input_grad import Terms, input_grad
from ..passes.map_grads import map_grads, map_grads_reduction
from ..passes.partials import combine
from ..passes.pool import mean_max_c, mean_max_hw


def pool_pixels(x: torch.Tensor, even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes mean and maximum over the pixels [N, 2, C], and argmax [N, C]. Reads x once."""
    with device_guard(x):
        x, layout = canonical(x)
        return mean_max_hw(x, layout, even)


def pool_channels(x: torch.Tensor, gate: torch.Tensor, even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes mean and maximum of x * gate [N, C] over the channels [N, 2, H, W], and argmax [N, H, W].

    Reads x once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        return mean_max_c(x, gate.contiguous(), layout, even)


def pool_channels_bwd(
    x: torch.Tensor, gate: torch.Tensor, maps: torch.Tensor, dmaps: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Computes dgate [N, C], the sum over the pixels of x (dmean_map / C + dmax_map at the maxima). Reads x once."""
    with device_guard(x):
        x, layout = canonical(x)
        gate, dmaps = gate.contiguous(), dmaps.contiguous()
        partials = gate.new_empty((layout.N, map_grads_reduction(layout).splits, layout.C))
        map_grads(x, layout, dmaps, at.contiguous(), partials, gate, maps.contiguous())
        return combine(partials, None, torch.empty_like(gate))


def twofold_scale(
    x: torch.Tensor, channel: torch.Tensor, spatial: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> torch.Tensor:
    """Computes y = act(x * channel [N, C] * spatial [N, H, W] + residual). Moves 2 times the bytes of x."""
    with device_guard(x):
        x, layout = canonical(x)
        return apply_gates(x, layout, channel.contiguous(), spatial.contiguous(), residual, activation)


def twofold_scale_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes dchannel [N, C] and dspatial [N, H, W] from g' = grad * act'(x * channel * spatial + residual).

    Returns dchannel, dspatial, dresidual. Reads x and grad once; with an activation g' is also written, as dresidual
    (else empty: it is grad).
    """
    with device_guard(x):
        x, layout = canonical(x)
        channel, spatial = channel.contiguous(), spatial.contiguous()
        _, dresidual, dchannel, dspatial = gate_grads(grad, x, layout, channel, spatial, residual, activation)
        assert dspatial is not None
        dchannel = combine(dchannel, None, torch.empty_like(channel))
        return dchannel, combine(dspatial, None, torch.empty_like(spatial)), dresidual


def twofold_input_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    maps: torch.Tensor,
    dmaps: torch.Tensor,
    at_c: torch.Tensor,
    pooled: torch.Tensor,
    dpooled: torch.Tensor,
    at_hw: torch.Tensor,
) -> torch.Tensor:
    """Computes dx = (grad spatial + dmean_map / C + dmax_map at at_c) channel + dmean / HW + dmax at at_hw.

    Reads grad, writes dx, and reads the tiles of x in which a maximum has ties.
    """
    with device_guard(x):
        x, layout = canonical(x)
        terms = Terms(
            grad=layout.dense(grad),
            channel_gate=channel.contiguous(),
            spatial_gate=spatial.contiguous(),
            dpooled=dpooled.contiguous(),
            argmax_hw=at_hw.contiguous(),
            dmaps=dmaps.contiguous(),
            argmax_c=at_c.contiguous(),
        )
        return input_grad(x, layout, terms, pooled.contiguous(), maps.contiguous())
