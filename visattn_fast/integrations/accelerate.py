"""Makes the attention of an existing model fast, in place, and undoes it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from ..backends import select
from .outcome import Acceleration, Skipped, Swapped
from .recipe import Recipe, first_match, is_fused, is_swapped, put_back, swap

# Our file for a library -> the module of the library that must have been imported.
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
    """Gives every known attention module the fused forward; everything else about the module stays as it is.

    A swapped module is the same object with a subclass of its class that overrides forward alone. It keeps its
    parameters, buffers, names, hooks, mode and device. So ``isinstance``, ``state_dict``, ``deepcopy``, ``pickle``,
    optimizers, DDP and ``torch.compile`` go on working.

    Known classes are the reference modules of this package, and the modules of timm, torchvision, MONAI, Ultralytics
    and segmentation-models-pytorch that have a recipe in `visattn_fast.integrations`. A library is looked at only if it
    is already imported. Classes are matched exactly.

    Args:
        model: changed in place.
        example: an input of the model, or a tuple of its arguments. With an example, every swapped module runs beside
            its original on the input that the model gives it. A module is put back if its result or a gradient
            differs, with a warning that names it, or if it is slower on this device.
        only: qualified names of modules to consider, or prefixes of such names; None for all.
        except_: qualified names of modules to leave alone, or prefixes.
        blocks: also let the gate of a residual block take over the block's addition and activation.

    Returns:
        The modules that were swapped, and those that were left alone, with the reason.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = Acceleration()
    recipes = known()
    originals = tuple(recipes)
    whole = [name for name, module in model.named_modules() if is_fused(module)]  # their parts do not run
    # Gates first: the recipe of a block asks if its gate was swapped.
    for block in (False, True) if blocks else (False,):
        for name, module in model.named_modules():
            if not _chosen(name, only, except_) or any(_inside(name, outer) for outer in whole):
                continue
            fitting = [recipe for recipe in recipes.get(type(module), ()) if recipe.block is block]
            if fitting:
                recipe, reason = first_match(fitting, module)
                if not reason:
                    found.swapped.append(Swapped(name, module, recipe))
                    swap(module, recipe)
                    whole.append(name)
                    continue
            elif not block and type(module) not in recipes and isinstance(module, originals) and not is_fused(module):
                reason = "is a subclass, whose forward may be its own"
            else:
                continue
            found.skipped.append(Skipped(name, type(module).__name__, reason))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        found.backend = select(parameter.device.type, parameter.dtype, "auto")
    if example is not None:
        from .verify import verify  # measures, and needs more of torch than the package itself does

        verify(model, example, found)
    return found


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: gives every swapped module its own class back. Returns their number."""
    swapped = [module for module in model.modules() if is_swapped(module)]
    for module in swapped:
        put_back(module)
    return len(swapped)


def known() -> dict[type[nn.Module], list[Recipe]]:
    """Returns the recipes by original class, for this package's reference modules and for every imported library.

    The recipes of a class are in the order in which `first_match` tries them.
    """
    there = ["own", *(name for name, needed in _LIBRARIES.items() if needed in sys.modules)]
    recipes: dict[type[nn.Module], list[Recipe]] = {}
    for name in there:
        for recipe in importlib.import_module(f".{name}", __package__).RECIPES:
            recipes.setdefault(recipe.original, []).append(recipe)
    return recipes


def _inside(name: str, outer: str) -> bool:
    """True if module ``name`` is inside module ``outer``. The model itself has an empty name."""
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _chosen(name: str, only: Collection[str] | None, except_: Collection[str]) -> bool:
    def within(names: Collection[str]) -> bool:
        return any(name == n or _inside(name, n) for n in names)

    return (only is None or within(only)) and not within(except_)
