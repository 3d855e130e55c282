"""Gates whose mathematics the caller brings: fused passes over x around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import decide
from ..ops.autograd import call_function
from ..ops.gates import GATE_CHANNELS, GATE_TWICE, ChannelScale, Mean, PoolChannels, PoolPixels, TwofoldScale
from ..ops.map_conv import MAP_CONV
from ..reference.checks import ACTIVATIONS, TIES, check_choice, check_feature_map, check_spatial_kernel
from ..reference.custom_gates import checked
from .serve import check_epilogue

__all__ = ["conv_maps", "gate_channels", "gate_twice"]


def gate_channels(
    x: Tensor,
    gate: Callable[[Tensor], Tensor],
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(x * gate(mean(x)) + residual)``, mean over H and W: any gate per channel, without its copies of x.

    What ``gate`` does is PyTorch's, forward and backward, with layers of any kind; the passes over x are fused.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        gate: ``[N, C, 1, 1]`` in x's dtype -> ``[N, C, 1, 1]``. It is called once.
        residual, activation: as in `se`.

    Returns, raises: as `se`; ValueError, too, where ``gate`` returns another shape.
    """
    check_feature_map(x)
    code = check_epilogue(x, residual, activation)
    if not decide(x, GATE_CHANNELS).fused:
        return reference.epilogue(reference.gate_channels(x, gate).to(x.dtype), residual, activation)
    mean, *carriers = call_function(Mean, x, 0)
    found = checked(gate(mean.to(x.dtype)[:, :, None, None]), (*x.shape[:2], 1, 1), "gate")
    return _scaled(ChannelScale, (x, found.flatten(1).to(mean.dtype)), residual, carriers, code)


def gate_twice(
    x: Tensor,
    channel: Callable[[Tensor, Tensor], Tensor] | None,
    spatial: Callable[[Tensor], Tensor],
    *,
    ties: str = "first",
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``u = x * channel(mean(x), max(x))``, then ``act(u * spatial([mean(u), max(u)]) + residual)``: any kind of CBAM.

    What ``channel`` and ``spatial`` do is PyTorch's, forward and backward, with layers of any kind, a batch norm for
    one; the passes over x are fused, and u is never stored.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        channel: mean and maximum over H and W, ``[N, C, 1, 1]`` in x's dtype -> ``[N, C, 1, 1]``. None: no such gate.
        spatial: mean and maximum over C, ``[N, 2, H, W]`` in x's dtype -> ``[N, 1, H, W]``. Each is called once.
        ties: which of equal maxima gets the gradient: the ``"first"``, as `torch.max` has it, or each an ``"even"``
            share, as `torch.amax` has it.
        residual, activation: as in `se`.

    Returns, raises: as `se`; ValueError, too, for another ``ties``, and where a gate returns another shape.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    check_feature_map(x)
    code, even = check_epilogue(x, residual, activation), check_choice("ties", ties, TIES)
    if not decide(x, GATE_TWICE).fused:
        return reference.epilogue(reference.gate_twice(x, channel, spatial, ties).to(x.dtype), residual, activation)
    (n, c, h, w), pooling = x.shape, -1 if channel is None else even
    pooled, _, of_y, of_channel, of_pixel, *of_maps = call_function(PoolPixels, x, pooling)
    if channel is None:
        gate = pooled.new_ones((n, c))
    else:
        mean, maximum = pooled.to(x.dtype)[..., None, None].unbind(1)
        gate = checked(channel(mean, maximum), (n, c, 1, 1), "channel").flatten(1).to(pooled.dtype)
    maps, _ = call_function(PoolChannels, x, gate, *of_maps, even)
    pixel = checked(spatial(maps.to(x.dtype)), (n, 1, h, w), "spatial").flatten(0, 1).to(pooled.dtype)
    return _scaled(TwofoldScale, (x, gate, pixel), residual, (of_y, of_channel, of_pixel), code)


def conv_maps(maps: Tensor, wconv: Tensor) -> Tensor:
    """The convolution of mean and maximum to a gate's logit, as ``spatial`` of `gate_twice` wants it.

    Args:
        maps: ``[N, 2, H, W]``, any floating dtype.
        wconv: ``[1, 2, k, k]`` with odd k; zero padding.

    Returns:
        ``[N, 1, H, W]`` in the dtype of ``maps``.

    Raises:
        ValueError: shapes or devices that do not fit, an even k.
        TypeError: a dtype that is not floating.
    """
    check_feature_map(maps, 2)
    check_spatial_kernel(wconv, None, maps)
    if not decide(maps, MAP_CONV).fused:
        return MAP_CONV.plain(maps, wconv)
    wide = maps.double() if maps.dtype == torch.float64 else maps.float()
    return MAP_CONV(wide, wconv)[0].to(maps.dtype)


def _scaled(
    function: type, tensors: tuple[Tensor, ...], residual: Tensor | None, carriers: Sequence[Tensor], code: int
) -> Tensor:
    """The last pass: in one op where the residual has x's dtype, else in steps, whose sum is wider."""
    if residual is not None and residual.dtype != tensors[0].dtype:
        y = call_function(function, *tensors, None, *carriers, 0)[0]
        return reference.epilogue(y, residual, ACTIVATIONS[code])
    return call_function(function, *tensors, residual, *carriers, code)[0]
