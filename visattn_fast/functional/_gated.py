"""What every gate's public function does after its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import fused
from ..reference.batch_norm import update_running_statistics
from ..reference.checks import ACTIVATIONS, check_choice, check_residual

# Compiled, maps of at most so many pixels are the reference's, which Inductor makes faster code of: docs/compile.md.
_TINY: dict[Callable[..., Tensor], int] = {ops.se_mathematics: 25, reference.nam: 64, reference.simam: 196}


def gated(
    mathematics: Callable[..., Tensor],
    function: type,
    tensors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str | None,
    options: tuple[Any, ...] = (),
) -> Tensor:
    """A gate and its epilogue, by the reference or by the fused function, as the backend in use says.

    Args:
        mathematics: the gate in plain PyTorch, ``(*tensors, *options) -> y``.
        function: its `ops.fused_function`, ``(*tensors, residual, activation's code, *options) -> (y, *small)``.
        tensors: x and the weights.
        options: numbers.
    """
    x: Any = tensors[0]
    code = check_choice("activation", activation, ACTIVATIONS)
    check_residual(residual, x)
    if not fused(x, _TINY.get(mathematics, 0)):
        return reference.epilogue(ops.mixed(mathematics, x, *tensors[1:], *options), residual, activation)
    return gated_outputs(function, tensors, residual, code, options)[0]


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
    if not fused(x, _TINY.get(mathematics, 0)):
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
