"""Gates whose mathematics the caller brings: autograd nodes for the passes over x before and after the caller's code.

dx is written once, by the first node (last to run backward). Later nodes send it their data as the "gradient" of extra
zero-memory outputs, the carriers::

    forward    x -> [first node] --means--> caller's gate --gate--> [last node] -> y
                          |                                              ^
                          +----------- carriers (no memory) -------------+
    backward  dx <- [first node] <--dmeans-- autograd <----dgate--- [last node] <- dy
                          ^------------ dy and gate, by the carriers ----+

A recorded backward pass (``create_graph=True``) sends nothing: every node then differentiates its own mathematics.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import reference
from ..reference import epilogue
from ..reference.checks import ACTIVATIONS
from .autograd import FusedOp, differentiate, is_recorded_backward
from .cbam_halves import pool_channels as first_of_channels
from .channel_scale import channel_input_grad, channel_mean, channel_scale_bwd, channel_scale_fwd
from .layout import accumulation_dtype, empty_small, zeros_small
from .twofold import (
    pool_channels,
    pool_channels_bwd,
    pool_pixels,
    twofold_input_grad,
    twofold_scale,
    twofold_scale_bwd,
)


def carriers(x: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Makes a carrier like x, and one of each shape in the accumulation dtype. They take no memory."""
    small = empty_small(x)
    return empty_small(x, dtype=x.dtype).expand(x.shape), *(small.expand(shape) for shape in shapes)


def save(ctx: Any, inputs: tuple[Any, ...], tensors: int, small: tuple[Tensor, ...] = (), numbers: int = 1) -> None:
    """Saves the first ``tensors`` inputs, the small results, and the last ``numbers`` inputs, which are no tensors."""
    ctx.options = inputs[-numbers:]
    ctx.mark_non_differentiable(*(t for t in small if not t.is_floating_point()))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:tensors], *small)


def save_scaled(ctx: Any, inputs: tuple[Any, ...], tensors: int, numbers: int = 1) -> None:
    """Does what `save` does, of tensors that end in a residual. Without an activation backward does not need it."""
    residual = inputs[tensors - 1] if inputs[-numbers] else None
    save(ctx, (*inputs[: tensors - 1], residual, *inputs[tensors:]), tensors, numbers=numbers)


def differentiate_scaled(ctx: Any, mathematics: Any, tensors: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    """Does what `differentiate` does, of the tensors that `save_scaled` saved."""
    *found, dresidual = differentiate(ctx, mathematics, tensors, grad)
    bare = ctx.needs_input_grad[len(tensors) - 1] and not ctx.options[0]
    return *found, grad if bare else dresidual


class Mean(torch.autograd.Function):
    """Mean over the pixels ``[N, C]``, and carriers for the gradient of y and the gate, sent by `ChannelScale`."""

    @staticmethod
    def forward(x: Tensor, _: int) -> tuple[Tensor, ...]:
        return channel_mean(x), *carriers(x, x.shape[:2])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, inputs, 1)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, grad: Tensor | None, gate: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        if grad is None or gate is None:
            return None if dmean is None else differentiate(ctx, mean, (x,), dmean)[0], None
        return channel_input_grad(grad, x, gate, dmean), None


class ChannelScale(torch.autograd.Function):
    """``act(x * gate + residual)``. Backward sends the gradient of y and the gate to `Mean`."""

    @staticmethod
    def forward(x: Tensor, gate: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return (channel_scale_fwd(x, gate, residual, rest[-1]),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_scaled(ctx, inputs, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        x, gate, residual = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        if is_recorded_backward():
            return *differentiate_scaled(ctx, _scaled_once, (x, gate, residual), grad), None, None, None
        dgate, dresidual = channel_scale_bwd(grad, x, gate, residual, *ctx.options)
        upstream = dresidual if ctx.options[0] else grad
        return None, dgate, upstream if ctx.needs_input_grad[2] else None, upstream, gate, None


class PoolPixels(torch.autograd.Function):
    """Mean and maximum over the pixels ``[N, 2, C]``, their argmax ``[N, C]``, and carriers.

    `ChannelSpatialScale` sends the gradient of y and both gates; `PoolChannels` sends the gate per channel, the maps,
    their gradient and their argmax. A negative ``share_ties`` pools nothing: there is no gate per channel.
    """

    @staticmethod
    def forward(x: Tensor, share_ties: int) -> tuple[Tensor, ...]:
        n, c, h, w = x.shape
        unused = carriers(x, (n, c), (n, h, w), (n, c), (n, 2, h, w), (n, 2, h, w), (n, h, w))
        if share_ties < 0:
            return zeros_small(x, n, 2, c), zeros_small(x, n, c, dtype=torch.int32), *unused
        return *pool_pixels(x, bool(share_ties)), *unused

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, inputs, 1, output[:2])

    @staticmethod
    def backward(ctx: Any, dpooled: Tensor | None, _: None, *messages: Tensor | None) -> Any:
        x, pooled, argmax_hw = ctx.saved_tensors
        grad, channel, spatial, gate, maps, dmaps, argmax_c = cast("tuple[Any, ...]", messages)
        if grad is None and gate is None:
            return None if dpooled is None else differentiate(ctx, _pooled_pixels, (x,), dpooled)[0], None
        if grad is None:  # y itself gets no gradient: the second of two derivatives
            grad, channel, spatial = torch.zeros_like(x), gate, maps[:, 0]
        if gate is None:  # the gate per pixel does not depend on the maps
            maps = dmaps = zeros_small(pooled, x.shape[0], 2, *x.shape[2:])
            argmax_c = maps[:, 0]
        dpooled = torch.zeros_like(pooled) if dpooled is None else dpooled
        small = (channel, spatial, maps, dmaps, argmax_c.to(argmax_hw.dtype), pooled, dpooled, argmax_hw)
        return twofold_input_grad(grad, x, *small), None


class PoolChannels(torch.autograd.Function):
    """Mean and maximum of ``u = x * gate`` over the channels ``[N, 2, H, W]``, and their argmax ``[N, H, W]``."""

    @staticmethod
    def forward(x: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return pool_channels(x, gate, bool(rest[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, inputs, 2, output)

    @staticmethod
    def backward(ctx: Any, dmaps: Tensor | None, _: None) -> Any:
        x, gate, maps, argmax = ctx.saved_tensors
        if dmaps is None:
            return (None,) * 7
        if is_recorded_backward():
            return *differentiate(ctx, _pooled_channels, (x, gate), dmaps), None, None, None, None, None
        dgate = pool_channels_bwd(x, gate, maps, dmaps, argmax)
        return None, dgate, gate, maps, dmaps, argmax.to(maps.dtype), None  # a float holds these whole numbers exactly


class ChannelSpatialScale(torch.autograd.Function):
    """``act(x * channel * spatial + residual)``. Backward sends the gradient of y and both gates to `PoolPixels`."""

    @staticmethod
    def forward(x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return (twofold_scale(x, channel, spatial, residual, rest[-1]),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_scaled(ctx, inputs, 4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        x, channel, spatial, residual = tensors = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        if is_recorded_backward():
            return *differentiate_scaled(ctx, _scaled_twice, tensors, grad), None, None, None, None
        dchannel, dspatial, dresidual = twofold_scale_bwd(grad, x, channel, spatial, residual, *ctx.options)
        upstream = dresidual if ctx.options[0] else grad
        dresidual = upstream if ctx.needs_input_grad[3] else None
        return None, dchannel, dspatial, dresidual, upstream, channel, spatial, None


def _scaled(x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return epilogue((x * gate).to(x.dtype), residual, ACTIVATIONS[activation])


def _scaled_once(x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return _scaled(x, gate[:, :, None, None], residual, activation)


def _scaled_twice(x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return _scaled(x * channel[:, :, None, None], spatial[:, None], residual, activation).to(x.dtype)


def mean(x: Tensor, _: int) -> Tensor:
    return x.mean((2, 3), dtype=accumulation_dtype(x))


def _pooled_pixels(x: Tensor, share_ties: int) -> Tensor:
    x = x.to(accumulation_dtype(x))
    maximum = x.amax((2, 3)) if share_ties else x.flatten(2).max(dim=2).values
    return torch.stack([x.mean((2, 3)), maximum], 1)


def _pooled_channels(x: Tensor, gate: Tensor, share_ties: int) -> Tensor:
    u = x * gate[:, :, None, None]
    return torch.stack([u.mean(1), u.amax(1)], 1) if share_ties else first_of_channels(u, u.dtype)[0]


# `visattn_fast.fused.gates` connects the nodes and the caller's functions between them.
GATE_CHANNELS = FusedOp("gate_channels", Mean, reference.gate_channels)
GATE_TWICE = FusedOp("gate_twice", PoolPixels, reference.gate_twice)
