"""Shapes of results as text, and the fakes that follow from them.

- ``"N 2 C"``: sizes, in the accumulation dtype. Letters have the sizes that the arguments gave them (`signature`).
- ``"N C : int32"``, ``"N C 1 1 : x"``: sizes, then the dtype, or the argument that has this dtype.
- ``"like x"``: a map with the shape, dtype and memory format of that argument.
- ``"shape of w"``: the shape of that argument, in the accumulation dtype.

A function of the arguments by name, which returns the uninitialised result or such a text, may take the place of a
text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import empty_map, empty_small
from .signature import Signature, expression

Arguments = Mapping[str, Any]
Shape = str | Callable[[Arguments], Tensor | str]


def fake_of(signature: Signature, results: Sequence[Shape]) -> Callable[..., Any]:
    """Makes the fake of an op: it checks the arguments, and allocates each result in its declared shape."""

    def fake(*args: Any) -> Any:
        args, sizes = signature.check(args)
        given = dict(zip(signature.names, args, strict=True))
        made = [allocated(result, given, sizes, given[signature.leading]) for result in results]
        return made[0] if len(made) == 1 else tuple(made)

    return fake


def allocated(result: Shape, given: Arguments, sizes: Mapping[str, Any], leading: Tensor) -> Tensor:
    """Allocates one result, uninitialised.

    Args:
        result: its shape.
        given: the op's arguments by name.
        sizes: letter -> size.
        leading: the argument with the device and the accumulation dtype.
    """
    if callable(result):
        made = result(given)
        return made if isinstance(made, Tensor) else allocated(made, given, sizes, leading)
    kind, _, name = result.rpartition(" ")
    if kind == "like":
        return empty_map(given[name])
    if kind == "shape of":
        return empty_small(leading, *given[name].shape)
    shape, _, dtype = result.partition(" : ")
    wanted = given[dtype].dtype if dtype in given else getattr(torch, dtype) if dtype else None
    return empty_small(leading, *(expression(text).value(sizes) for text in shape.split()), dtype=wanted)
