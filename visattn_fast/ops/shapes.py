"""Shapes of results as text, and the fakes that follow from them.

- ``"N 2 C"``: sizes, in the accumulation dtype. N, C, H and W are the sizes of the map x. Other letters get their sizes
  from the declared shapes of arguments: ``{"w1": "R C"}`` makes R the first size of w1.
- ``"N C : int32"``, ``"N C 1 1 : x"``: sizes, then the dtype, or the argument that has this dtype.
- ``"like x"``: a map with the shape, dtype and memory format of that argument.
- ``"shape of w"``: the shape of that argument, in the accumulation dtype.

A function of the arguments by name, which returns the uninitialised result, may take the place of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import empty_map, empty_small

Arguments = Mapping[str, Any]
Shape = str | Callable[[Arguments], Tensor]


def fake_of(names: Sequence[str], results: Sequence[Shape], weights: Mapping[str, str]) -> Callable[..., Any]:
    """Makes the fake of an op.

    Args:
        names: the op's arguments.
        results: the shape of each result.
        weights: argument -> declared shape.
    """

    def fake(*args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        made = [allocated(result, given, weights) for result in results]
        return made[0] if len(made) == 1 else tuple(made)

    return fake


def allocated(result: Shape, given: Arguments, weights: Mapping[str, str]) -> Tensor:
    """Allocates one result, uninitialised, from the op's arguments by name and the declared shapes of arguments."""
    if callable(result):
        return result(given)
    x = _leading(given, weights)
    kind, _, name = result.rpartition(" ")
    if kind == "like":
        return empty_map(given[name])
    if kind == "shape of":
        return empty_small(x, *given[name].shape)
    shape, _, dtype = result.partition(" : ")
    wanted = given[dtype].dtype if dtype in given else getattr(torch, dtype) if dtype else None
    sizes = _sizes(x, given, weights)
    return empty_small(x, *(sizes[s] if s in sizes else int(s) for s in shape.split()), dtype=wanted)


def _leading(given: Arguments, weights: Mapping[str, str]) -> Tensor:
    """The argument that gives results their device and dtype: x, the first with a declared shape, or the first map."""
    if "x" in given or weights:
        return given["x" if "x" in given else next(iter(weights))]
    tensors = [t for t in given.values() if isinstance(t, Tensor)]
    return next((t for t in tensors if t.dim() == 4), tensors[0])


def _sizes(x: Tensor, given: Arguments, weights: Mapping[str, str]) -> dict[str, int]:
    """Letter -> size: N, C, H and W from the map, if there is one, the others from the declared shapes."""
    sizes = dict(zip("NCHW", x.shape, strict=True)) if x.dim() == 4 else {}
    for name, shape in weights.items():
        weight = given.get(name)
        if weight is not None:
            bound = zip(shape.split(), weight.shape, strict=False)  # a 1x1 convolution's weight has two more dimensions
            sizes.update((letter, size) for letter, size in bound if letter.isalpha() and letter not in sizes)
    return sizes
