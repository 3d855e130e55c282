"""Recipes: which fused class takes the place of a class, and when it cannot."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import modules

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}  # layer -> its name in our functions
_OURS = frozenset(getattr(modules, name) for name in modules.__all__)

Check = Callable[[nn.Module], str]  # returns why a module cannot be served; an empty string if it can


def always(module: nn.Module) -> str:
    """Finds no reason against any module."""
    return ""


@dataclass(frozen=True)
class Recipe:
    """Makes modules of one class fast: gives them a subclass that overrides forward alone.

    A class may have several recipes. Their order matters, see `first_match`.

    Attributes:
        original: the class, matched exactly.
        fused: the subclass.
        op: the name of the function in `functional` that forward becomes; ``"epilogue"`` for a block.
        why_not: the reason why a module cannot be served; an empty string if it can.
        block: True if the module is a block around a gate, and the gate takes over the block's epilogue.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    op: str
    why_not: Check = always
    block: bool = False

    @property
    def gate(self) -> bool:
        """True if the module only scales its input. Attention over positions does more."""
        return not self.block and self.op not in ("window_attention", "self_attention")

    def reason_against(self, module: nn.Module) -> str:
        """Returns why the module is left alone; an empty string if it is not."""
        for name, inner in () if self.block else module.named_modules():
            if inner is not module and has_hooks(inner):
                return f"{name} has hooks, which the fused forward would not run"
        return self.why_not(module)


def first_match(recipes: Sequence[Recipe], module: nn.Module) -> tuple[Recipe, str]:
    """Tries the recipes, at least one, in order: the first without a reason against the module wins.

    So a recipe that replaces a module's inner layers stands before the one that runs them as they are. If none wins,
    returns the last recipe with its reason.
    """
    for recipe in recipes:
        reason = recipe.reason_against(module)
        if not reason:
            break
    return recipe, reason


def swap(module: nn.Module, recipe: Recipe) -> None:
    """Gives the module the fused class. Notes its own class in it, so that copies and pickles can be put back, too."""
    module._accelerated_from = type(module)  # type: ignore[assignment]
    module.__class__ = recipe.fused


def is_swapped(module: nn.Module) -> bool:
    """True if `swap` gave the module its class."""
    return "_accelerated_from" in module.__dict__


def own_class(module: nn.Module) -> type[nn.Module]:
    """Returns the module's class, or the class that it had before `swap`."""
    return module.__dict__.get("_accelerated_from", type(module))


def put_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    module.__class__ = module.__dict__.pop("_accelerated_from")


def is_fused(module: nn.Module) -> bool:
    """True if the module is swapped, or of a fused class of this package."""
    return is_swapped(module) or type(module) in _OURS


def has_hooks(module: nn.Module) -> bool:
    """True if the module has a hook on its forward or backward pass."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def require_layers(expected: Mapping[str, tuple[type[nn.Module], ...]]) -> Check:
    """Requires that each inner layer of these names has exactly one of these classes."""

    def why_not(module: nn.Module) -> str:
        for name, allowed in expected.items():
            inner = module.get_submodule(name)
            if type(inner) not in allowed:
                names = dict.fromkeys(c.__name__ for c in allowed)
                return f"{name} is {type(inner).__name__}, not {' or '.join(names)}"
        return ""

    return why_not


def all_of(*checks: Check) -> Check:
    """Joins checks: the first reason found counts."""
    return lambda module: next(filter(None, (check(module) for check in checks)), "")


def fingerprint(*functions: Callable[..., Any]) -> str:
    """Hashes the source of functions that a fused forward repeats, to tell other versions, which may differ."""
    return hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).hexdigest()[:16]
