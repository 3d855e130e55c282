"""Fast access to the children and parameters of a module.

On small maps ``nn.Module.__getattr__`` takes a good part of a call.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def child(module: nn.Module, name: str) -> Any:
    """The submodule ``module.name``."""
    return module._modules[name]


def parameter(module: nn.Module, name: str) -> Any:
    """``module.name``, by ``__getattr__`` only if it is no plain parameter: parametrized, pruned, or in a replica."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def weight_and_bias(layer: nn.Module) -> tuple[Any, Any]:
    """``(layer.weight, layer.bias)``, read as by `parameter`."""
    own = layer._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return layer.weight, layer.bias
