"""Predicts how much less memory a swapped module keeps for the backward pass, without an example or computing."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
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

    Runs both forwards on tensors without data, of 32 x 32 pixels and a number of channels that the module accepts, as a
    map or as a token grid.
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
    with mode, torch.enable_grad(), _quiet():
        for shape in _shapes(module):
            x = torch.empty(shape, requires_grad=True)
            try:
                before, after = (saved_bytes(functools.partial(m, x), (*m.parameters(), *m.buffers())) for m in pair)
            except (RuntimeError, TypeError, ValueError):
                continue  # another shape, or another kind of input
            return (before - after) / x.nbytes
    return None


def _shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yields candidates: with channels of the sizes of the first parameter, then of the others; maps, then grids."""
    widths = dict.fromkeys([*(size for p in module.parameters() for size in (*p.shape[1::-1], p.shape[-1])), _SIDE])
    yield from ((2, channels, _SIDE, _SIDE) for channels in widths)
    yield from ((2, _SIDE, _SIDE, channels) for channels in widths)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps PyTorch from logging as errors the shapes that do not fit."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
