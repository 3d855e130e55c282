"""Makes an existing model's attention fast, in place, and undoes it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from ..backends import select
from .recipe import Recipe, is_fused, is_swapped, put_back, swap
from .report import Acceleration, Skipped, Swapped

# Of each library, by the name of our file, the module that must have been imported.
_LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "monai": "monai",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "ultralytics": "ultralytics.nn.modules.conv",
}


def accelerate(
    model: nn.Module,
    example: Any = None,
    *,
    only: Collection[str] | None = None,
    except_: Collection[str] = (),
    blocks: bool = True,
) -> Acceleration:
    """Gives every attention module that is known the fused forward; all else about it stays as it is.

    A module that is swapped keeps its parameters, buffers, names, hooks, mode and device: it is the same object, with a
    subclass of its class that overrides forward alone. So ``isinstance``, ``state_dict``, ``deepcopy``, ``pickle``,
    optimizers, DDP and ``torch.compile`` go on working.

    Known are the reference modules of this package and the modules of timm, torchvision, MONAI, Ultralytics and
    segmentation-models-pytorch that `visattn_fast.integrations` names; a library is looked at only if it is imported
    already. Classes are matched exactly.

    Args:
        model: changed in place.
        example: an input of the model, or a tuple of its arguments. With it every swapped module is run beside its
            original on what the model gives it: where results or gradients differ, a warning names it and it is put
            back; where it is slower on this device, it is put back, too.
        only: qualified names of modules, or prefixes of such, to consider; None for all.
        except_: those to leave alone.
        blocks: also let a residual block's gate take over the block's addition and activation.

    Returns:
        What was swapped, and what was left alone and why.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = Acceleration()
    recipes = known()
    originals = tuple(recipes)
    whole = [name for name, module in model.named_modules() if is_fused(module)]  # their parts do not run
    # Gates first: a block asks whether its gate was swapped.
    for patterns in (False, True) if blocks else (False,):
        for name, module in model.named_modules():
            if not _chosen(name, only, except_) or any(_inside(name, outer) for outer in whole):
                continue
            mine = recipes.get(type(module), [])
            if not mine and not patterns and isinstance(module, originals) and not is_fused(module):
                found.skipped.append(
                    Skipped(name, type(module).__name__, "is a subclass, whose forward may be its own")
                )
            fitting = [(recipe, recipe.reason_against(module)) for recipe in mine if recipe.pattern is patterns]
            if not fitting:
                continue
            recipe, reason = next((pair for pair in fitting if not pair[1]), fitting[-1])
            if reason:
                found.skipped.append(Skipped(name, type(module).__name__, reason))
            else:
                found.swapped.append(Swapped(name, module, recipe))
                swap(module, recipe)
                whole.append(name)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        found.backend = select(parameter.device.type, parameter.dtype, "auto")
    if example is not None:
        from .verify import verify  # it measures, which the package itself does not

        verify(model, example, found)
    return found


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: every swapped module gets its own class back. Returns how many did."""
    swapped = [module for module in model.modules() if is_swapped(module)]
    for module in swapped:
        put_back(module)
    return len(swapped)


def known() -> dict[type[nn.Module], list[Recipe]]:
    """The recipes of this package's reference modules and of every library that is imported, by original class.

    The first whose reason is empty is taken: those that keep a module's own layers come after those that replace them.
    """
    there = ["own", *(name for name, needed in _LIBRARIES.items() if needed in sys.modules)]
    recipes: dict[type[nn.Module], list[Recipe]] = {}
    for name in there:
        for recipe in importlib.import_module(f".{name}", __package__).RECIPES:
            recipes.setdefault(recipe.original, []).append(recipe)
    return recipes


def _inside(name: str, outer: str) -> bool:
    """Whether ``outer``, a qualified name, holds the module of that name; the model's own is empty."""
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _chosen(name: str, only: Collection[str] | None, except_: Collection[str]) -> bool:
    def within(names: Collection[str]) -> bool:
        return any(name == n or _inside(name, n) for n in names)

    return (only is None or within(only)) and not within(except_)
