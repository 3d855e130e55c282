"""Gates whose mathematics the caller brings, between fused passes over x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import reference
from ..backends import decide
from ..ops.autograd import call_function
from ..ops.gates import GATE_CHANNELS, GATE_TWICE, ChannelScale, ChannelSpatialScale, Mean, PoolChannels, PoolPixels
from ..ops.map_conv import MAP_CONV
from ..reference.checks import ACTIVATIONS, TIES, check_choice, check_feature_map, check_spatial_kernel
from ..reference.custom_gates import checked
from ..reference.positions import as_before, as_map, is_signal_or_volume
from .calls import finish_trace
from .serve import check_epilogue

__all__ = ["conv_maps", "gate_channels", "gate_twice"]


def gate_channels(
    x: Tensor,
    gate: Callable[[Tensor], Tensor],
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Applies any gate per channel: ``act(x * gate(mean(x)) + residual)``, the mean over H and W.

    ``gate`` may contain layers of any kind; PyTorch runs it and differentiates it. The passes over x are fused, and no
    copy of x is made.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last; also ``[N, C, L]`` and ``[N, C, D, H, W]``, in
            either layout.
        gate: ``[N, C, 1, 1]`` in x's dtype -> ``[N, C, 1, 1]``. It is called once.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation, another shape returned by ``gate``.
        RuntimeError: the backend asked for cannot serve this call.
    """
    if isinstance(x, Proxy):
        return finish_trace(reference.gate_channels(x, gate), residual, activation)
    if is_signal_or_volume(x):
        check_epilogue(x, residual, activation)
        added = None if residual is None else as_map(residual)
        return as_before(gate_channels(as_map(x), gate, residual=added, activation=activation), x)
    check_feature_map(x)
    code = check_epilogue(x, residual, activation)
    if not decide(x, GATE_CHANNELS).fused:
        return reference.epilogue(reference.gate_channels(x, gate).to(x.dtype), residual, activation)
    mean, *carriers = call_function(Mean, x, 0)
    found = checked(gate(mean.to(x.dtype)[:, :, None, None]), (*x.shape[:2], 1, 1), "gate", x)
    return last_pass(ChannelScale, (x, found.flatten(1).to(mean.dtype)), residual, carriers, code)


def gate_twice(
    x: Tensor,
    channel: Callable[[Tensor, Tensor], Tensor] | None,
    spatial: Callable[[Tensor], Tensor],
    *,
    ties: str = "first",
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Applies any kind of CBAM: a gate per channel, then a gate per pixel.

    ``u = x * channel(mean(x), max(x))`` over H and W, then ``act(u * spatial([mean(u), max(u)]) + residual)`` over C.
    ``channel`` and ``spatial`` may contain layers of any kind, such as a batch norm; PyTorch runs and differentiates
    them. The passes over x are fused, and u is never stored.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        channel: mean and maximum of x over H and W, two ``[N, C, 1, 1]`` in x's dtype -> ``[N, C, 1, 1]``. It is called
            once. None: no channel gate, u is x.
        spatial: mean and maximum of u over C, ``[N, 2, H, W]`` in x's dtype -> ``[N, 1, H, W]``. It is called once.
        ties: the gradient of equal maxima: ``"first"``: all of it to the first, as `torch.max`; ``"even"``: an even
            share to each, as `torch.amax`.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation or ``ties``, another shape returned by a
            gate.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    if isinstance(x, Proxy):
        return finish_trace(reference.gate_twice(x, channel, spatial, ties), residual, activation)
    check_feature_map(x)
    code, share_ties = check_epilogue(x, residual, activation), check_choice("ties", ties, TIES)
    if not decide(x, GATE_TWICE).fused:
        return reference.epilogue(reference.gate_twice(x, channel, spatial, ties).to(x.dtype), residual, activation)
    (n, c, h, w), pooling = x.shape, -1 if channel is None else share_ties
    pooled, _, for_grad, for_channel, for_pixel, *for_maps = call_function(PoolPixels, x, pooling)
    if channel is None:
        gate = pooled.new_ones((n, c))
    else:
        mean, maximum = pooled.to(x.dtype)[..., None, None].unbind(1)
        gate = checked(channel(mean, maximum), (n, c, 1, 1), "channel", x).flatten(1).to(pooled.dtype)
    maps, _ = call_function(PoolChannels, x, gate, *for_maps, share_ties)
    pixel = checked(spatial(maps.to(x.dtype)), (n, 1, h, w), "spatial", x).flatten(0, 1).to(pooled.dtype)
    return last_pass(ChannelSpatialScale, (x, gate, pixel), residual, (for_grad, for_channel, for_pixel), code)


def conv_maps(maps: Tensor, wconv: Tensor) -> Tensor:
    """Convolves the two maps of mean and maximum to one: for ``spatial`` of `gate_twice`, before its sigmoid.

    Args:
        maps: ``[N, 2, H, W]``, any floating dtype.
        wconv: ``[1, 2, k, k]`` with odd k; zero padding.

    Returns:
        ``[N, 1, H, W]`` in the dtype of ``maps``.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an even k.
        RuntimeError: the backend asked for cannot serve this call.
    """
    check_feature_map(maps, 2)
    check_spatial_kernel(maps, wconv, None)
    if not decide(maps, MAP_CONV).fused:
        return MAP_CONV.plain(maps, wconv)
    wide = maps.double() if maps.dtype == torch.float64 else maps.float()
    return MAP_CONV(wide, wconv)[0].to(maps.dtype)


def last_pass(
    function: type,
    tensors: tuple[Tensor, ...],
    residual: Tensor | None,
    carriers: Sequence[Tensor],
    code: int,
    *options: Any,
) -> Tensor:
    """Scales x and applies the epilogue: one op, unless the residual has another dtype.

    The op would round the sum to x's dtype.
    """
    if residual is not None and residual.dtype != tensors[0].dtype:
        y = call_function(function, *tensors, None, *carriers, 0, *options)[0]
        return reference.epilogue(y, residual, ACTIVATIONS[code])
    return call_function(function, *tensors, residual, *carriers, code, *options)[0]
