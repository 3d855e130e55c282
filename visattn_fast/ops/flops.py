"""Counts of floating-point operations, for `torch.utils.flop_counter.FlopCounterMode`.

An op counts what PyTorch counts for the plain operations that it stands for. They run on the meta device, where they
compute nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}  # by op, until the counter is imported


def count(function: Callable[..., Any], *args: Any) -> int:
    """Counts the operations of ``function(*args)``."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as mode:
        function(*args)
    return mode.get_total_flops()


def count_gradient(mathematics: Callable[..., Tensor], args: Sequence[Any], constants: Sequence[int] = ()) -> int:
    """Counts the operations of the backward pass of ``mathematics(*args)``.

    Every floating-point tensor gets a gradient, except those at the positions ``constants``.
    """
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):  # a dispatch mode runs below autograd
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        wanted = [a.requires_grad_() for a in floats if not any(a is args[i] for i in constants)]
        y = mathematics(*args)
        return count(lambda: torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True))


def register(op: Any, operations: Callable[..., int]) -> None:
    """Registers the formula of an op with PyTorch's counter, now if it is imported, else as soon as it is.

    Importing the counter here would import triton, and slow every import of this package down.

    Args:
        op: the packet of overloads.
        operations: counts for the op's arguments on the meta device.
    """

    def formula(*args: Any, out_val: Any = None, **_: Any) -> int:
        return operations(*map(_on_meta, args))

    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(op, get_raw=True)(formula)
    else:
        _formulas[op] = formula


def _on_meta(a: Any) -> Any:
    """Returns a tensor without memory in the place of ``a``. Counts depend on shapes, not on dtypes."""
    if not isinstance(a, Tensor):
        return a
    dtype = torch.float32 if a.is_floating_point() else a.dtype
    return torch.empty_strided(a.shape, a.stride(), dtype=dtype, device="meta")


class _CounterFinder(importlib.abc.MetaPathFinder):
    """Registers the formulas as PyTorch's counter is imported, once."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                for op, formula in _formulas.items():
                    module.register_flop_formula(op, get_raw=True)(formula)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _CounterFinder())
