"""Squeeze-and-excitation as other libraries spell it: one fused forward, and what it assumes of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..reference.as_built import POINTWISE, Layer, layer
from ..reference.batch_norm import Norm
from ..reference.parameter_access import weight_and_bias
from .recipe import ACTIVATIONS

GATES: Mapping[type[nn.Module], str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}


def se_like(
    x: Tensor,
    reduce: Any,
    hidden: nn.Module,
    expand: Any,
    gate: nn.Module,
    residual: Tensor | None = None,
    activation: str | None = None,
    norm: Norm | None = None,
    gates: Mapping[type[nn.Module], str] = GATES,
) -> Tensor:
    """Computes ``act(x * gate(expand(hidden(reduce(mean(x))))) + residual)`` with the parameters of the given layers.

    Args:
        norm: as in `functional.se`.
        gates: layer -> the name of the gate's activation.
    """
    return functional.se(
        x, *weight_and_bias(reduce), *weight_and_bias(expand),
        residual=residual, activation=activation, norm=norm,
        hidden_activation=ACTIVATIONS[type(hidden)], gate_activation=gates[type(gate)],
    )  # fmt: skip


def se_layers(
    reduce: str,
    hidden: str,
    expand: str,
    gate: str,
    gates: Mapping[type[nn.Module], str] = GATES,
    linear: Layer = POINTWISE,
) -> dict[str, Layer]:
    """Returns what `se_like` assumes of the layers of these names: ``linear`` twice, and activations that it knows."""
    return {reduce: linear, hidden: layer(*ACTIVATIONS), expand: linear, gate: layer(*gates)}


def why_no_units(reduce: str) -> Callable[[nn.Module], str]:
    """Returns a check that refuses a module whose layer ``reduce`` has no output."""

    def why_not(module: nn.Module) -> str:
        # Not the layer's weight: spectral norm changes with each reading.
        squeeze = dict(module.named_modules()).get(reduce)
        empty = squeeze is not None and any(p.numel() == 0 for p in squeeze.parameters())
        return f"{reduce} has no hidden unit" if empty else ""

    return why_not
