"""What every gate's public function does after its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import ops, reference
from ..backends import fused
from ..reference.checks import ACTIVATIONS, check_choice, check_residual


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
    x, *weights = tensors
    assert x is not None
    code = check_choice("activation", activation, ACTIVATIONS)
    check_residual(residual, x)
    if not fused(x):
        return reference.epilogue(ops.mixed(mathematics, x, *weights, *options), residual, activation)
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
