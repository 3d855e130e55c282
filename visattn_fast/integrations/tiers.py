"""How much of a module its fused forward may replace: the whole of it, the passes over x, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..backends import reference_asked
from ..fused.calls import call_layers
from ..reference.as_built import Layers, Settings, as_built, tell
from .recipe import why_patched


def may_fuse(module: Any, x: Any, layers: Layers) -> bool:
    """True if ``module`` is as built. False if plain PyTorch must serve: the library's own forward is called."""
    if reference_asked():
        return False
    reason = why_patched(module)
    if reason:
        if not torch.compiler.is_compiling():
            tell(module, reason)
        return False
    return as_built(module, x, layers)


def lacks(*names: str) -> Callable[[Settings], bool]:
    """Returns a check that a module has nothing under these names, neither a layer nor a function."""
    return lambda d: all(d["_modules"].get(name) is None and d.get(name) is None for name in names)


def gate_by_passes(
    module: Any, x: Any, own: Callable[[Any], Tensor], residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Computes ``act(x * module.channel_gate(mean(x)) + residual)`` by fused passes around the module's own layers.

    Args:
        module: a fused module, whose ``PARTS`` say what the passes stand for.
        x: its input.
        own: the library's own forward, which serves if these parts are not as built.
        residual, activation: as in `functional.gate_channels`.
    """
    if may_fuse(module, x, module.PARTS):
        return functional.gate_channels(x, module.channel_gate, residual=residual, activation=activation)
    return call_layers(own, x, residual, activation)
