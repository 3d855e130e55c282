"""What every gate's public function does after its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import fused, serving
from ..reference.batch_norm import Norm, update_running_statistics
from ..reference.checks import ACTIVATIONS, check_batch_norm, check_choice, check_residual

# Compiled, maps of at most this many pixels take plain PyTorch, which Inductor makes faster: docs/guide/compile.md.
TINY: dict[Callable[..., Any], int] = {
    ops.se_mathematics: 25, reference.channel_mlp: 49, reference.norm_gate: 49, reference.split_attention: 49,
    reference.nam: 196, reference.simam: 196, reference.soca: 196, reference.attention2d: 196,
}  # fmt: skip


def gated(
    mathematics: Callable[..., Tensor],
    function: type,
    tensors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str | None,
    options: tuple[Any, ...] = (),
    norm: Norm | None = None,
    normed: Callable[..., Tensor] | None = None,
) -> Tensor:
    """A gate and its epilogue, by the reference or by the fused function, as the backend in use says.

    Args:
        mathematics: the gate in plain PyTorch, ``(*tensors, *options) -> y``.
        function: its `ops.fused_function`, ``(*tensors, residual, activation's code, *options) -> (y, *small)``.
        tensors: x and the weights.
        options: numbers.
        norm: of what is given as x, before the gate.
        normed: the op of both, ``(z, *norm, *weights, residual, activation's code, *options) -> y``.
    """
    x: Any = tensors[0]
    code = check_choice("activation", activation, ACTIVATIONS)
    check_residual(residual, x)
    if norm is not None:
        check_batch_norm(x, *norm[:4], False, norm.eps)
        if normed is not None and at_once(x, (*tensors, residual, *norm[:4]), residual):
            return normed(x, *norm, *tensors[1:], residual, code, *options)
        x = norm.apply(x)
        tensors = (x, *tensors[1:])
    if not fused(x, TINY.get(mathematics, 0)):
        return reference.epilogue(ops.mixed(mathematics, x, *tensors[1:], *options), residual, activation)
    return gated_outputs(function, tensors, residual, code, options)[0]


def at_once(z: Tensor, tensors: Iterable[Any], residual: Tensor | None) -> bool:
    """Whether norm and gate of z are one op: on CPUs, where no gradient can be asked for of what it is made of."""
    if torch.compiler.is_compiling() or (residual is not None and residual.dtype != z.dtype):
        return False
    return serving(z) == "cpp" and not ops.recorded(tensors)


def gated_outputs(
    function: type, tensors: tuple[Tensor | None, ...], residual: Tensor | None, code: int, options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Every result of a fused gate: in one op where the residual has x's dtype, else in steps."""
    x = tensors[0]
    if residual is not None and x is not None and residual.dtype != x.dtype:  # the sum is wider than the op's result
        y, *small = ops.run(function, *tensors, None, 0, *options)
        return reference.epilogue(y, residual, ACTIVATIONS[code]), *small
    return ops.run(function, *tensors, residual, code, *options)


def batch_norm_gated(
    mathematics: Callable[..., Tensor],
    function: type,
    maps: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """As `gated`, for a gate that is a batch norm of the last of ``maps``; in training the statistics are updated.

    Args:
        mathematics: ``(*maps, weight, bias, *statistics, training, momentum, eps) -> y``.
        function: ``(*maps, weight, bias, *statistics or Nones, residual, activation's code, eps) -> (y, mean, var)``.
        maps: the first is x.
    """
    x, normed = maps[0], maps[-1]
    code = check_choice("activation", activation, ACTIVATIONS)
    check_residual(residual, x)
    if not fused(x, TINY.get(mathematics, 0)):
        if normed.dtype in (torch.float32, torch.float64):
            weight, bias = weight.to(normed.dtype), bias.to(normed.dtype)
        y = mathematics(*maps, weight, bias, *statistics, training, momentum, eps)
        return reference.epilogue(y.to(x.dtype), residual, activation)
    tensors = (*(m.to(x.dtype) for m in maps), weight, bias, *((None, None) if training else statistics))
    y, mean, var = gated_outputs(function, tensors, residual, code, (float(eps),))
    if training and x.shape[0]:
        count = x.numel() // x.shape[1]
        update_running_statistics(*statistics, mean.detach(), var.detach(), count, momentum)
    return y
