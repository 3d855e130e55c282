"""Blocks that end in a batch norm and a gate on channel means, computed without storing the normalised map."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..backends import compiles_freely, decide
from ..fused.normed import gate_normed_channels
from ..fused.serve import norm_fuses_into_gate
from ..ops.autograd import recorded
from ..ops.gates import GATE_CHANNELS
from ..reference.batch_norm import Norm, batch_norm_step
from .tiers import may_fuse

# Elements of z from which on eager mode folds the norm: its dozen calls for scales and shifts take longer than the pass
# that they save on a smaller map. The number for other devices than CPUs is a guess, from launches and bytes.
_WORTH_FOLDING = {"cpu": 1 << 19}
_ELSEWHERE = 1 << 24


def is_evaluated(norm: Any) -> bool:
    """True if the norm uses its running statistics, so that it is affine and updates nothing."""
    return not norm.training and norm.running_mean is not None


def is_folded(z: Tensor, norm: Any, gate: Any, residual: Tensor) -> bool:
    """True if `gate_of_norm` takes the place of ``gate(norm(z), residual, ...)``. There are two cases.

    - Under `torch.compile`, if no backend was chosen: an op would keep Inductor from fusing the norm into its
      consumers, and so cost a map that Inductor would not store.
    - In eager mode, if the norm is evaluated and no gradient is wanted: the norm is then part of the gate's passes
      over z, unless z is small.
    """
    if not (torch.compiler.is_compiling() or is_evaluated(norm)) or not hasattr(gate, "channel_gate"):
        return False
    if not may_fuse(gate, z, gate.PARTS):
        return False
    if torch.compiler.is_compiling():
        return compiles_freely() and norm.momentum is not None  # the momentum of a cumulative average changes
    if z.numel() < _WORTH_FOLDING.get(z.device.type, _ELSEWHERE) or residual.dtype != z.dtype:
        return False
    if recorded(chain((z, residual), norm.parameters(), gate.parameters())):
        return False
    return decide(z, GATE_CHANNELS).backend in ("triton", "cpp")  # the native CUDA kernels are whole gates


def normed_gate(z: Tensor, norm: Any, gate: Any, residual: Tensor, activation: str | None) -> Tensor:
    """Computes ``gate(norm(z), residual, activation)``: in one op, with the norm folded, or one after the other.

    The caller has seen that ``norm`` is an affine batch norm as built, and ``gate`` a fused gate without hooks.
    """
    if is_one_op(z, norm, gate, residual):
        values = Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
        return gate(z, residual=residual, activation=activation, norm=values)
    if is_folded(z, norm, gate, residual):
        return gate_of_norm(z, norm, gate, residual, activation)
    return gate(norm(z), residual=residual, activation=activation)


def is_one_op(z: Tensor, norm: Any, gate: Any, residual: Tensor) -> bool:
    """True if the gate's own op includes the norm: the norm is evaluated, and no gradient is wanted."""
    if not getattr(gate, "takes_norm", False) or torch.compiler.is_compiling():
        return False
    if not (is_evaluated(norm) and may_fuse(gate, z, gate.LAYERS)):
        return False
    return norm_fuses_into_gate(GATE_CHANNELS, z, chain((z, residual), norm.parameters(), gate.parameters()), residual)


def gate_of_norm(z: Tensor, norm: Any, gate: Any, residual: Tensor, activation: str | None) -> Tensor:
    """Computes ``gate(norm(z), residual, activation)`` with the norm folded. ``gate.channel_gate`` gates the means."""
    training, momentum = batch_norm_step(norm)
    return gate_normed_channels(
        z, norm.weight, norm.bias, norm.running_mean, norm.running_var, gate.channel_gate,
        training=training, momentum=momentum, eps=norm.eps, residual=residual, activation=activation,
    )  # fmt: skip
