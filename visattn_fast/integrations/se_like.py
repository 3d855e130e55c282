"""The many spellings of squeeze-and-excitation: what their forward becomes, once, and when it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..reference.batch_norm import Norm
from ..reference.parameter_access import weight_and_bias
from .recipe import ACTIVATIONS, all_of, layers

_GATES = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}
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
) -> Tensor:
    """``act(x * gate(expand(hidden(reduce(mean(x))))) + residual)`` with the layers' own parameters and activations.

    norm: as in `functional.se`.
    """
    return functional.se(
        x, *weight_and_bias(reduce), *weight_and_bias(expand),
        residual=residual, activation=activation, norm=norm,
        hidden_activation=ACTIVATIONS[type(hidden)], gate_activation=_GATES[type(gate)],
    )  # fmt: skip


def se_layers(
    reduce: str,
    hidden: str,
    expand: str,
    gate: str,
    *gates: type[nn.Module],
    more: Callable[[nn.Module], str] | None = None,
) -> Callable[[nn.Module], str]:
    """A check that the layers of these names are what `se_like` takes; ``gates``: other spellings of the sigmoid."""
    for spelling in gates:
        _GATES.setdefault(spelling, "sigmoid")
    known = layers({reduce: _LAYERS, hidden: tuple(ACTIVATIONS), expand: _LAYERS, gate: tuple(_GATES)})
    return all_of(known, more) if more else known
