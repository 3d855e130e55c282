"""What an integration says of a class: which fused class takes its place, and when it cannot."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}  # modules -> what our functions call them


def accept(module: nn.Module) -> str:
    """No reason against any module."""
    return ""


@dataclass(frozen=True)
class Recipe:
    """How modules of one class are made fast: by giving them a class that overrides forward alone.

    Attributes:
        original: the class, matched exactly.
        fused: its subclass.
        op: the name of the catalogue that forward becomes.
        against: a reason why this module cannot be served, or an empty string.
        pattern: whether it is a block around a gate, whose epilogue the gate then takes over.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    op: str
    against: Callable[[nn.Module], str] = accept
    pattern: bool = False

    @property
    def gate(self) -> bool:
        """Whether the module does nothing but scale its input; attention over positions is part of more."""
        return not self.pattern and self.op not in ("window_attention", "self_attention")

    def reason_against(self, module: nn.Module) -> str:
        """Why the module is left alone; empty if it is not. The fused forward runs no inner module's hooks."""
        for name, inner in () if self.pattern else module.named_modules():
            if inner is not module and has_hooks(inner):
                return f"{name} has hooks, which the fused forward would not run"
        return self.against(module)


def swap(module: nn.Module, recipe: Recipe) -> None:
    """Gives the module the fused class, and notes its own, by which copies and pickles of it can be put back, too."""
    module._accelerated_from = type(module)  # type: ignore[assignment]
    module.__class__ = recipe.fused


def is_swapped(module: nn.Module) -> bool:
    """Whether `swap` gave the module its class."""
    return "_accelerated_from" in module.__dict__


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it had before `swap`."""
    return module.__dict__.get("_accelerated_from", type(module))


def put_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    module.__class__ = module.__dict__.pop("_accelerated_from")


def is_fused(module: nn.Module) -> bool:
    """Whether the module's forward is the package's own."""
    return is_swapped(module) or type(module).__module__.startswith("visattn_fast.fused")


def has_hooks(module: nn.Module) -> bool:
    """Whether anything waits for the module's forward or backward pass."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def layers(expected: dict[str, tuple[type[nn.Module], ...]]) -> Callable[[nn.Module], str]:
    """A check that the inner layers of these names have exactly one of these classes each."""

    def against(module: nn.Module) -> str:
        for name, allowed in expected.items():
            inner = module.get_submodule(name)
            if type(inner) not in allowed:
                names = dict.fromkeys(c.__name__ for c in allowed)
                return f"{name} is {type(inner).__name__}, not {' or '.join(names)}"
        return ""

    return against


def all_of(*checks: Callable[[nn.Module], str]) -> Callable[[nn.Module], str]:
    """The first reason that one of the checks finds."""
    return lambda module: next(filter(None, (check(module) for check in checks)), "")


def fingerprint(*functions: Callable[..., Any]) -> str:
    """Of the source of functions that a fused forward repeats: another version's may do something else."""
    return hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).hexdigest()[:16]
