"""The passes over x of any gate per channel and gate per pixel whose mathematics stands elsewhere."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.gate import gate_grads, map_grads, map_grads_reduction, scale
from ..passes.input_grad import input_grad
from ..passes.pool import combine, mean_max_c, mean_max_hw


def pool_pixels(x: torch.Tensor, even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and maximum over the pixels [N, 2, C], and where the maxima came from [N, C]. Reads x once."""
    with device_guard(x):
        x, layout = canonical(x)
        return mean_max_hw(x, layout, even)


def pool_channels(x: torch.Tensor, gate: torch.Tensor, even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and maximum of x * gate [N, C] over the channels [N, 2, H, W], and where the maxima came from [N, H, W].

    Reads x once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        return mean_max_c(x, gate.contiguous(), layout, even)


def pool_channels_bwd(
    x: torch.Tensor, gate: torch.Tensor, maps: torch.Tensor, dmaps: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """dgate [N, C] = sum over the pixels of x (dmean_map / C + dmax_map at the maxima). Reads x once."""
    with device_guard(x):
        x, layout = canonical(x)
        gate, dmaps = gate.contiguous(), dmaps.contiguous()
        parts = gate.new_empty((layout.N, map_grads_reduction(layout).parts, layout.C))
        map_grads(x, layout, dmaps, at.contiguous(), parts, gate, maps.contiguous())
        return combine(parts, None, torch.empty_like(gate))


def twofold_scale(
    x: torch.Tensor, channel: torch.Tensor, spatial: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> torch.Tensor:
    """y = act(x * channel [N, C] * spatial [N, H, W] + residual). Moves 2 times the bytes of x."""
    with device_guard(x):
        x, layout = canonical(x)
        return scale(x, layout, channel.contiguous(), spatial.contiguous(), residual, activation)


def twofold_scale_bwd(
    grad: torch.Tensor, x: torch.Tensor, channel: torch.Tensor, spatial: torch.Tensor, residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dchannel [N, C], dspatial [N, H, W], dresidual) from g' = grad * act'(x * channel * spatial + residual).

    Reads x and grad once; with an activation g' is written, too, as dresidual (else empty: it is grad).
    """
    with device_guard(x):
        x, layout = canonical(x)
        channel, spatial = channel.contiguous(), spatial.contiguous()
        _, dresidual, of_channel, of_pixel = gate_grads(grad, x, layout, channel, spatial, residual, activation)
        assert of_pixel is not None
        dchannel = combine(of_channel, None, torch.empty_like(channel))
        return dchannel, combine(of_pixel, None, torch.empty_like(spatial)), dresidual


def twofold_input_grad(
    grad: torch.Tensor, x: torch.Tensor, channel: torch.Tensor, spatial: torch.Tensor, maps: torch.Tensor,
    dmaps: torch.Tensor, at_c: torch.Tensor, pooled: torch.Tensor, dpooled: torch.Tensor, at_hw: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """dx = (grad spatial + dmean_map / C + dmax_map at the maxima) channel + dmean / HW + dmax at the maxima.

    Reads grad, writes dx, and reads the tiles of x that have a maximum with equals.
    """
    with device_guard(x):
        x, layout = canonical(x)
        return input_grad(
            x, layout, grad=layout.dense(grad), channel_gate=channel.contiguous(), spatial_gate=spatial.contiguous(),
            dpooled=dpooled.contiguous(), argmax_hw=at_hw.contiguous(), dmaps=dmaps.contiguous(),
            argmax_c=at_c.contiguous(), pooled=pooled.contiguous(), maps=maps.contiguous(),
        )  # fmt: skip
