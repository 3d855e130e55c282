"""The codes that the ops take for activations and for ties of a maximum.

Public functions take the names instead: ``"relu"``, ``"hard_sigmoid"``, ``"even"``; None for `Activation.NONE`.
"""

from __future__ import annotations

from enum import IntEnum


class Activation(IntEnum):
    """The activation of an epilogue or of a hidden layer."""

    NONE = 0
    RELU = 1
    SILU = 2


class GateActivation(IntEnum):
    """The activation at the end of a gate; the hard sigmoid is ``relu6(v + 3) / 6``."""

    SIGMOID = 0
    HARD_SIGMOID = 1


class Ties(IntEnum):
    """The rule for the gradient of equal maxima: all of it to the first, or an even share to each."""

    FIRST = 0
    EVEN = 1
