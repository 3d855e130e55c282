"""BAM: passes over x before and after its two branches.

The branches are PyTorch's layers, which autograd differentiates. As in `gates`, the node after them sends what dx is
made of to the node before them, by carriers. That node also hands x on to the spatial branch, and adds the gradient
that comes back from it as it writes dx.

Forward reads x for the mean, reads it again and writes y; backward reads grad and x, then grad and the branch's
gradient, and writes dx.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import epilogue
from ..reference.bam import COMBINE, joint_gate
from ..reference.checks import ACTIVATIONS
from .autograd import FusedOp, differentiate, is_recorded_backward, same_view
from .channel_scale import channel_mean
from .epilogue import finish, residual_gradient, residual_gradient_shape, start_backward
from .gates import carriers, differentiate_scaled, mean, save, save_scaled
from .layout import accumulation_dtype, to_map
from .library import define
from .signature import MAP

_GATED = {"x": MAP, "channel": "N C", "spatial": "N H W"}


def _gate(channel: Tensor, spatial: Tensor, added: bool) -> Tensor:
    """Returns ``1 + sigmoid(channel * spatial)``, or with their sum, ``[N, C, H, W]``."""
    return joint_gate(channel[:, :, None, None], spatial[:, None], COMBINE[added])


def _bam_scale_reference(
    x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int, added: bool
) -> Tensor:
    return finish(x, _gate(channel, spatial, added), residual, activation)


def _bam_scale_bwd_reference(
    grad: Tensor, x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int, added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gate = _gate(channel, spatial, added)
    grad = start_backward(grad, x, gate, residual, activation)
    djoint = grad * x * (gate - 1) * (2 - gate)
    dchannel = (djoint if added else djoint * spatial[:, None]).sum((2, 3))
    dspatial = (djoint if added else djoint * channel[:, :, None, None]).sum(1)
    return dchannel, dspatial, residual_gradient(grad, x, activation)


def _bam_input_grad_reference(
    grad: Tensor,
    x: Tensor,
    channel: Tensor,
    spatial: Tensor,
    dmean: Tensor | None,
    dbranch: Tensor | None,
    added: bool,
) -> Tensor:
    dx = grad.to(channel.dtype) * _gate(channel, spatial, added)
    if dmean is not None:
        dx = dx + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return to_map(dx if dbranch is None else dx + dbranch, x)


bam_scale = define(
    "bam_scale(Tensor x, Tensor channel, Tensor spatial, Tensor? residual, int activation, bool added) -> Tensor y",
    "bam",
    _bam_scale_reference,
    ("like x",),
    {**_GATED, "residual": "like x"},
)
bam_scale_bwd = define(
    "bam_scale_bwd(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor? residual, int activation, bool added)"
    " -> (Tensor dchannel, Tensor dspatial, Tensor dresidual)",
    "bam",
    _bam_scale_bwd_reference,
    ("N C", "N H W", residual_gradient_shape),
    {**_GATED, "residual": "like x", "grad": "like x"},
)
bam_input_grad = define(  # reads the layout of x, not its values
    "bam_input_grad(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor? dmean, Tensor? dbranch, bool added)"
    " -> Tensor dx",
    "bam",
    _bam_input_grad_reference,
    ("like x",),
    {**_GATED, "grad": "like x", "dmean": "N C", "dbranch": "like x"},
)


class Branches(torch.autograd.Function):
    """Mean over the pixels ``[N, C]``, x for the spatial branch, and carriers, used by `JointScale`."""

    @staticmethod
    def forward(x: Tensor, _: int) -> tuple[Tensor, ...]:
        n, c, h, w = x.shape
        return channel_mean(x), same_view(x), *carriers(x, (n, c), (n, h, w))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, inputs, 1)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dbranch: Tensor | None, *messages: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        grad, channel, spatial = messages
        if grad is not None:
            return bam_input_grad(grad, x, channel, spatial, dmean, dbranch, bool(ctx.options[0])), None
        dx = None if dmean is None else differentiate(ctx, mean, (x,), dmean)[0]
        return dbranch if dx is None else dx if dbranch is None else dx + dbranch, None


class JointScale(torch.autograd.Function):
    """``act(x * (1 + sigmoid(channel * spatial)) + residual)``, or with the sum of both branches."""

    @staticmethod
    def forward(x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return (bam_scale(x, channel, spatial, residual, rest[-2], bool(rest[-1])),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_scaled(ctx, inputs, 4, numbers=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        x, channel, spatial, residual = tensors = ctx.saved_tensors
        if grad is None:
            return (None,) * 9
        if is_recorded_backward():
            return *differentiate_scaled(ctx, _scaled, tensors, grad), *(None,) * 5
        activation, added = ctx.options
        dchannel, dspatial, dresidual = bam_scale_bwd(grad, x, channel, spatial, residual, activation, bool(added))
        upstream = dresidual if activation else grad
        dresidual = upstream if ctx.needs_input_grad[3] else None
        return None, dchannel, dspatial, dresidual, upstream, channel, spatial, None, None


def _scaled(
    x: Tensor, channel: Tensor, spatial: Tensor, residual: Tensor | None, activation: int, added: int
) -> Tensor:
    y = (x.to(accumulation_dtype(x)) * _gate(channel, spatial, bool(added))).to(x.dtype)
    return epilogue(y, residual, ACTIVATIONS[activation])


# The branches run between these nodes; `visattn_fast.fused.bam` joins them.
BAM = FusedOp("bam", Branches, reference.bam)
