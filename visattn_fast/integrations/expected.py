"""Predicts how much less memory a swapped module keeps for the backward pass, without an example or computing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ..measure.memory import saved_bytes
from .recipe import Recipe, is_swapped, put_back, swap

_SIDE = 32  # pixels
_found: dict[tuple[Recipe, str, str], float | None] = {}  # models repeat their blocks


def expected_saving(module: nn.Module, recipe: Recipe) -> float | None:
    """Returns the bytes that the module will no longer keep from forward to backward, in multiples of its input.

    Runs both forwards on tensors without data, of 32 x 32 pixels and a number of channels that the module accepts.
    Returns None if it accepts none, and if it has hooks, which are not to see such tensors.
    """
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return None
    key = recipe, repr(module), str([p.shape for p in module.parameters()])
    if key not in _found:
        _found[key] = _expected(module, recipe)
    return _found[key]


def _expected(module: nn.Module, recipe: Recipe) -> float | None:
    try:
        fused = copy.deepcopy(module)
    except Exception:  # of whatever the module holds
        return None
    if not is_swapped(fused):
        swap(fused, recipe)
    original = copy.deepcopy(fused)
    put_back(original)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        pair = [copy.deepcopy(m) for m in (original, fused)]
    with mode, torch.enable_grad():
        for channels in _widths(module):
            x = torch.empty(2, channels, _SIDE, _SIDE, requires_grad=True)
            try:
                before, after = (saved_bytes(functools.partial(m, x), (*m.parameters(), *m.buffers())) for m in pair)
            except (RuntimeError, TypeError, ValueError):
                continue  # other channels, or another kind of input
            return (before - after) / x.nbytes
    return None


def _widths(module: nn.Module) -> Iterator[int]:
    """Yields candidates for the number of input channels: sizes of the first parameter, then of the others."""
    yield from dict.fromkeys([*(size for p in module.parameters() for size in p.shape[1::-1]), _SIDE])
