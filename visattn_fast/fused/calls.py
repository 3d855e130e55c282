"""The fallback of fused modules: layers that are not as built are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Proxy

from .. import reference
from ..reference.checks import check_floating
from .serve import check_epilogue


def call_layers(
    forward: Callable[[Any], Tensor], x: Any, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Computes ``act(forward(x) + residual)`` in plain PyTorch. Checks the epilogue before any layer runs.

    Args:
        forward: calls the layers of the module.
        x: the module's input; in a trace of torch.fx, a `torch.fx.Proxy`.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Raises:
        TypeError: a residual whose dtype is not floating-point.
        ValueError: a residual that does not fit x, an unknown activation.
    """
    if isinstance(x, Proxy):
        return finish_trace(forward(x), residual, activation)
    check_floating("x", x)
    check_epilogue(x, residual, activation)
    return reference.epilogue(forward(x), residual, activation)


def finish_trace(y: Tensor, residual: Any, activation: Any) -> Tensor:
    """Applies the epilogue in a trace of torch.fx, which must know whether there is one.

    Raises:
        TypeError: the traced module got placeholders for ``residual`` or ``activation``.
    """
    for name, value in (("residual", residual), ("activation", activation)):
        if isinstance(value, Proxy) and value.node.op == "placeholder" and value.node.args == (None,):
            raise TypeError(f"{name} must be known in a trace: pass concrete_args={{{name!r}: None}} to symbolic_trace")
    return reference.epilogue(y, residual, activation)
