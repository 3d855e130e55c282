"""Blocks that end in a batch norm and a gate, as they are compiled: the compiler is shown both at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backends import compiled_freely
from ..functional.normed import gate_normed_channels
from ..reference.batch_norm import batch_norm_step
from .recipe import has_hooks


def in_view(norm: nn.Module, gate: nn.Module) -> bool:
    """Whether `gate_of_norm` takes the place of ``gate(norm(z))``: under `torch.compile`, where no backend was chosen.

    An op would keep Inductor from fusing the norm into what follows it, and so cost a map that it would not store.
    """
    if not compiled_freely():
        return False
    if type(norm) is not nn.BatchNorm2d or not hasattr(gate, "channel_gate"):
        return False
    known = norm.affine and norm.momentum is not None  # a cumulative average's momentum is no constant
    return known and not has_hooks(norm) and not has_hooks(gate)


def gate_of_norm(z: Tensor, norm: Any, gate: Any, residual: Tensor, activation: str) -> Tensor:
    """``gate(norm(z), residual, activation)``, for a gate whose ``channel_gate`` is its part on pooled values."""
    training, momentum = batch_norm_step(norm)
    return gate_normed_channels(
        z, norm.weight, norm.bias, norm.running_mean, norm.running_var, gate.channel_gate,
        training=training, momentum=momentum, eps=norm.eps, residual=residual, activation=activation,
    )  # fmt: skip
