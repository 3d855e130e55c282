"""Gates whose mathematics the caller brings: PyTorch's autograd goes through it, and meets our passes on either side.

A gate is made of pooled values by the caller's functions, and the passes over x stand before and after them as nodes of
the graph. So that the gradient of x is written once, by the first node's backward pass, which is the last to run, the
later nodes' backward passes send it what it needs: the gradient that they would give a *carrier*, an output of the
first node that has no values and goes nowhere else. What a carrier gets is no derivative, but a message.

A recorded backward pass (``create_graph=True``) sends none: every node then differentiates its own mathematics.
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
from .layout import accumulation_dtype
from .twofold import (
    pool_channels,
    pool_channels_bwd,
    pool_pixels,
    twofold_input_grad,
    twofold_scale,
    twofold_scale_bwd,
)


def _carriers(x: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """One like x, and one of each shape in the accumulation dtype; none takes memory."""
    small = x.new_empty((), dtype=accumulation_dtype(x))
    return x.new_empty(()).expand(x.shape), *(small.expand(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], tensors: int, small: tuple[Tensor, ...] = ()) -> None:
    """Keeps the first of the inputs, the small results, and the last input, a number."""
    ctx.options = inputs[-1:]
    ctx.mark_non_differentiable(*(t for t in small if not t.is_floating_point()))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:tensors], *small)


class Mean(torch.autograd.Function):
    """x -> mean over the pixels ``[N, C]``, and carriers of the gradient of y and of the gate."""

    @staticmethod
    def forward(x: Tensor, _: int) -> tuple[Tensor, ...]:
        return channel_mean(x), *_carriers(x, x.shape[:2])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, 1)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, grad: Tensor | None, gate: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        if grad is None or gate is None:
            return None if dmean is None else differentiate(ctx, _mean, (x,), dmean)[0], None
        return channel_input_grad(grad, x, gate, dmean), None


class ChannelScale(torch.autograd.Function):
    """``act(x * gate + residual)``."""

    @staticmethod
    def forward(x: Tensor, gate: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return (channel_scale_fwd(x, gate, residual, rest[-1]),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        x, gate, residual = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        if is_recorded_backward():
            return *differentiate(ctx, _scaled_once, (x, gate, residual), grad), None, None, None
        dgate, dresidual = channel_scale_bwd(grad, x, gate, residual, *ctx.options)
        upstream = dresidual if ctx.options[0] else grad
        return None, dgate, None if residual is None else upstream, upstream, gate, None


class PoolPixels(torch.autograd.Function):
    """x -> mean and maximum over the pixels ``[N, 2, C]``, where the maxima came from, and carriers of

    - the gradient of y, and both gates, which `TwofoldScale` sends;
    - the gate per channel, the maps, their gradient and `at`, which `PoolChannels` sends.

    With a negative number, nothing is pooled.
    """

    @staticmethod
    def forward(x: Tensor, even: int) -> tuple[Tensor, ...]:
        n, c, h, w = x.shape
        carriers = _carriers(x, (n, c), (n, h, w), (n, c), (n, 2, h, w), (n, 2, h, w), (n, h, w))
        if even < 0:
            return x.new_zeros((n, 2, c), dtype=carriers[1].dtype), x.new_zeros((n, c), dtype=torch.int32), *carriers
        return *pool_pixels(x, bool(even)), *carriers

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, 1, output[:2])

    @staticmethod
    def backward(ctx: Any, dpooled: Tensor | None, _: None, *messages: Tensor | None) -> Any:
        x, pooled, at = ctx.saved_tensors
        grad, channel, spatial, gate, maps, dmaps, at_c = cast("tuple[Any, ...]", messages)
        if grad is None and gate is None:
            return None if dpooled is None else differentiate(ctx, _pooled_pixels, (x,), dpooled)[0], None
        if grad is None:  # y's own part is zero: the second of two derivatives
            grad, channel, spatial = torch.zeros_like(x), gate, maps[:, 0]
        if gate is None:  # the gate per pixel does not depend on the maps
            maps = dmaps = pooled.new_zeros((x.shape[0], 2, *x.shape[2:]))
            at_c = maps[:, 0]
        dpooled = torch.zeros_like(pooled) if dpooled is None else dpooled
        small = (channel, spatial, maps, dmaps, at_c.to(at.dtype), pooled, dpooled, at)
        return twofold_input_grad(grad, x, *small), None


class PoolChannels(torch.autograd.Function):
    """Of ``u = x * gate``, mean and maximum over the channels ``[N, 2, H, W]``, and where the maxima came from."""

    @staticmethod
    def forward(x: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return pool_channels(x, gate, bool(rest[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, 2, output)

    @staticmethod
    def backward(ctx: Any, dmaps: Tensor | None, _: None) -> Any:
        x, gate, maps, at = ctx.saved_tensors
        if dmaps is None:
            return (None,) * 7
        if is_recorded_backward():
            return *differentiate(ctx, _pooled_channels, (x, gate), dmaps), None, None, None, None, None
        dgate = pool_channels_bwd(x, gate, maps, dmaps, at)
        return None, dgate, gate, maps, dmaps, at.to(maps.dtype), None  # whole numbers that a float holds


class TwofoldScale(torch.autograd.Function):
    """``act(x * channel * spatial + residual)``."""

    @staticmethod
    def forward(x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return (twofold_scale(x, channel, spatial, residual, rest[-1]),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, 4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        x, channel, spatial, residual = tensors = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        if is_recorded_backward():
            return *differentiate(ctx, _scaled_twice, tensors, grad), None, None, None, None
        dchannel, dspatial, dresidual = twofold_scale_bwd(grad, x, channel, spatial, residual, *ctx.options)
        upstream = dresidual if ctx.options[0] else grad
        return None, dchannel, dspatial, None if residual is None else upstream, upstream, channel, spatial, None


def _scaled(x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return epilogue((x * gate).to(x.dtype), residual, ACTIVATIONS[activation])


def _scaled_once(x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return _scaled(x, gate[:, :, None, None], residual, activation)


def _scaled_twice(x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return _scaled(x * channel[:, :, None, None], spatial[:, None], residual, activation).to(x.dtype)


def _mean(x: Tensor, _: int) -> Tensor:
    return x.mean((2, 3), dtype=accumulation_dtype(x))


def _pooled_pixels(x: Tensor, even: int) -> Tensor:
    x = x.to(accumulation_dtype(x))
    maximum = x.amax((2, 3)) if even else x.flatten(2).max(dim=2).values
    return torch.stack([x.mean((2, 3)), maximum], 1)


def _pooled_channels(x: Tensor, gate: Tensor, even: int) -> Tensor:
    u = x * gate[:, :, None, None]
    return torch.stack([u.mean(1), u.amax(1)], 1) if even else first_of_channels(u, u.dtype)[0]


# The callers' functions stand between these nodes; `visattn_fast.fused.gates` joins them.
GATE_CHANNELS = FusedOp("gate_channels", Mean, reference.gate_channels)
GATE_TWICE = FusedOp("gate_twice", PoolPixels, reference.gate_twice)
