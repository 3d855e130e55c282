"""Signals and volumes as maps, for gates that treat all positions of a channel alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

DIMENSIONS = (3, 5)  # of [N, C, L] and [N, C, D, H, W]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_signal_or_volume(x: Any) -> bool:
    """True if x is ``[N, C, L]`` or ``[N, C, D, H, W]`` with at least one position. Maps are not, nor traced values."""
    return isinstance(x, Tensor) and x.dim() in DIMENSIONS and 0 not in x.shape[1:]


def as_map(x: Tensor) -> Tensor:
    """Returns ``[N, C, 1, L]`` or ``[N, C, D H, W]``: a view if x is dense in either layout."""
    return x[:, :, None] if x.dim() == 3 else x.flatten(2, 3)


def as_before(y: Tensor, x: Tensor) -> Tensor:
    """Returns y, a map of the size of `as_map` of x or one with sizes of 1 in place of its own, in the form of x."""
    _, _, *sizes = x.shape
    if len(sizes) == 1:
        return y[:, :, 0]
    depth, height, _ = sizes
    return y.unflatten(2, (depth, height) if y.shape[2] == depth * height else (1, 1))


def over_positions(function: _Function) -> _Function:
    """Lets a function, or a method, whose first tensor is a map take signals and volumes as well.

    The results, a tensor or a dict of tensors, return to the form of the input.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        position = 0 if isinstance(args[0], Tensor) else 1  # after self
        x = args[position] if len(args) > position else None
        if not is_signal_or_volume(x):
            return function(*args, **options)
        assert isinstance(x, Tensor)
        y = function(*args[:position], as_map(x), *args[position + 1 :], **options)
        return {key: as_before(t, x) for key, t in y.items()} if isinstance(y, dict) else as_before(y, x)

    return cast(_Function, call)
