"""Squeeze-and-excitation as other libraries spell it: one fused forward, and the check of the layers that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..reference.batch_norm import Norm
from ..reference.parameter_access import weight_and_bias
from .recipe import ACTIVATIONS, Check, require_layers

GATES: Mapping[type[nn.Module], str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}
_LAYERS = (nn.Linear, nn.Conv2d)


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


def se_layers(reduce: str, hidden: str, expand: str, gate: str, gates: Mapping[type[nn.Module], str] = GATES) -> Check:
    """Requires that the layers of these names are layers that `se_like` takes with these ``gates``."""
    return require_layers({reduce: _LAYERS, hidden: tuple(ACTIVATIONS), expand: _LAYERS, gate: tuple(gates)})
