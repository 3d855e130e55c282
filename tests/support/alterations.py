"""Alterations of a single layer inside a module. Each changes results or gradients if the layer is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FACTOR = 1.5


def _scaled(values: Any) -> Any:
    """Scales a tensor, or each tensor of a tuple."""
    if isinstance(values, tuple):
        return tuple(_scaled(value) for value in values)
    return _FACTOR * values if isinstance(values, torch.Tensor) else values


class Adapter(nn.Module):
    """Wraps a layer, as adapters do: it has none of the layer's attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _scaled(self.layer(*args, **kwargs))


def _set_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: _scaled(forward(*args, **kwargs))


def _set_subclass(layer: nn.Module) -> None:
    kind = type(layer)
    layer.__class__ = type(
        "Own", (kind,), {"forward": lambda self, *args, **kwargs: _scaled(kind.forward(self, *args, **kwargs))}
    )


def _wrap(module: nn.Module, name: str) -> None:
    module.set_submodule(name, Adapter(module.get_submodule(name)))


ALTERATIONS: dict[str, Callable[[nn.Module, str], object]] = {
    "forward hook": lambda m, name: m.get_submodule(name).register_forward_hook(lambda _, args, y: _scaled(y)),
    "forward pre-hook": lambda m, name: m.get_submodule(name).register_forward_pre_hook(lambda _, args: _scaled(args)),
    "backward hook": lambda m, name: m.get_submodule(name).register_full_backward_hook(lambda _, dx, dy: _scaled(dx)),
    "backward pre-hook": lambda m, name: m.get_submodule(name).register_full_backward_pre_hook(
        lambda _, dy: _scaled(dy)
    ),
    "forward in the instance": lambda m, name: _set_forward(m.get_submodule(name)),
    "subclass": lambda m, name: _set_subclass(m.get_submodule(name)),
    "adapter": _wrap,
}
