"""Reading a module's parameters in little time: on small maps nn.Module's ``__getattr__`` is a good part of a call."""

from __future__ import annotations

from typing import Any

from torch import nn


def child(module: nn.Module, name: str) -> Any:
    """``module.name``, a submodule."""
    return module._modules[name]


def parameter(module: nn.Module, name: str) -> Any:
    """``module.name``; ``__getattr__`` finds it where it is no plain parameter: parametrized, pruned, a replica's."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def weight_and_bias(layer: nn.Module) -> tuple[Any, Any]:
    """``(layer.weight, layer.bias)``; see `parameter`."""
    own = layer._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return layer.weight, layer.bias
