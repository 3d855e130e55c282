"""Makes the attention of an existing model fast, in place, and undoes it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from ..backends import select
from .outcome import Acceleration, Skipped, Swapped
from .recipe import Look, Recipe, is_fused, is_swapped, own_class, put_back, swap, why_not_put_back

# Our file for a library -> the module of the library that must have been imported, and a class that it must have.
_LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "monai": "monai",
    "monai_mednext": "monai.networks.blocks.mednext_block:MedNeXtBlock",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "transformers": "transformers.models.convnextv2.modeling_convnextv2",
    "ultralytics": "ultralytics.nn.modules.conv",
    "ultralytics_attention": "ultralytics.nn.modules.block:AAttn",
}


def accelerate(
    model: nn.Module,
    example: Any = None,
    *,
    only: str | Collection[str] | None = None,
    except_: str | Collection[str] = (),
    blocks: bool = True,
) -> Acceleration:
    """Gives every known attention module the fused forward; everything else about the module stays as it is.

    A swapped module is the same object with a subclass of its class that overrides forward alone. It keeps its
    parameters, buffers, names, hooks, mode and device. So ``isinstance``, ``state_dict``, optimizers, DDP and
    ``torch.compile`` go on working. Copies stay swapped; pickles hold the library's own class.

    At every call a swapped module is fused as far as its layers are what the fused forward assumes: of the very class,
    without hooks. The others are called, by the library's own forward if need be.

    Known classes are the reference modules of this package, and the modules of timm, torchvision, MONAI, Ultralytics
    and segmentation-models-pytorch that have a recipe in `visattn_fast.integrations`. A library is looked at only if it
    is already imported. Classes are matched exactly.

    Args:
        model: changed in place.
        example: an input of the model, or a tuple of its arguments. With an example, every swapped module runs beside
            its original on the input that the model gives it. A module is put back if its result or a gradient
            differs, with a warning that names it, or if it is slower on this device. The model itself runs once, and
            keeps its state; hooks run in that run only.
        only: qualified names of the modules to consider, with all that they contain; a single name may be a plain
            string; None: the whole model. Names may leave out what torch.compile and DDP add.
        except_: names of modules to leave alone, likewise.
        blocks: also let the gate of a residual block take over the block's addition and activation.

    Returns:
        The modules that were swapped, and those that were left alone, with the reason.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a name in ``only`` or ``except_`` fits no module.
        RuntimeError: a module cannot be compared with its original; the message names it, and says why.

    Whatever is raised, the model is as it was, also if it does not run on the example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    left_out = _inside(model, "except_", except_)
    wanted = (set(model.modules()) if only is None else _inside(model, "only", only)) - left_out
    before = {module for module in model.modules() if is_swapped(module)}
    found = Acceleration()
    try:
        _swap_all(model, wanted, blocks, found)
        if example is not None:
            from .verify import verify  # measures, and needs more of torch than the package itself does

            verify(model, example, found)
    except BaseException:
        for module in model.modules():
            if is_swapped(module) and module not in before:
                put_back(module)
        raise
    return found


def _swap_all(model: nn.Module, wanted: set[nn.Module], blocks: bool, found: Acceleration) -> None:
    """Swaps the modules that are ``wanted`` and known. Lists them in ``found``, and those that are left alone."""
    recipes = known()
    originals = tuple(recipes)
    # A fused module stands for its parts.
    parts = {part for module in model.modules() if is_fused(module) for part in _parts(module)}
    # Gates first: the recipe of a block asks if its gate was swapped.
    for block in (False, True) if blocks else (False,):
        for name, module in model.named_modules():
            if module not in wanted or module in parts:
                continue
            recipe = recipes.get(type(module))
            if recipe is not None and recipe.inline is not None and not recipe.inline(module):
                continue
            if recipe is not None and recipe.block is block:
                op, reason = recipe.plan(module)
                if op:
                    swap(module, recipe, name)
                    found.swapped.append(Swapped(name, module, recipe))
                    parts.update(_parts(module))
                else:
                    found.skipped.append(Skipped(name, type(module).__name__, reason))
            elif recipe is None and not block and isinstance(module, originals) and not is_fused(module):
                reason = "is a subclass, whose forward may be its own"
                found.skipped.append(Skipped(name, type(module).__name__, reason))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        found.backend = select(parameter.device.type, parameter.dtype, "auto")


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: gives every swapped module its own class back. Returns their number.

    Raises:
        RuntimeError: another tool has changed the class of a swapped module since, as ``fully_shard`` does. Nothing is
            restored then.
    """
    swapped = {name: module for name, module in model.named_modules() if is_swapped(module)}
    for name, module in swapped.items():
        reason = why_not_put_back(module)
        if reason:
            raise RuntimeError(f"{name or 'model'} cannot be restored: {reason}; undo that first")
    for module in swapped.values():
        put_back(module)
    return len(swapped)


def known() -> dict[type[nn.Module], Recipe]:
    """Returns the recipes by original class, for this package's reference modules and for every imported library."""
    there = ["own", *(name for name, needed in _LIBRARIES.items() if _is_imported(needed))]
    found = [importlib.import_module(f".{name}", __package__).RECIPES for name in there]
    return {recipe.original: recipe for recipes in found for recipe in recipes}


def _is_imported(needed: str) -> bool:
    """True if the module is imported and, in ``"module:class"``, has the class: older releases may lack it."""
    module, _, name = needed.partition(":")
    return module in sys.modules and (not name or hasattr(sys.modules[module], name))


def look_at(module: nn.Module) -> Look | None:
    """Returns the function that finds the gates of a library's module, accelerated or not; None if there is none."""
    recipe = known().get(own_class(module))
    return recipe.look if recipe else None


def _parts(module: nn.Module) -> set[nn.Module]:
    """Returns the modules inside ``module``."""
    return set(module.modules()) - {module}


def _inside(model: nn.Module, argument: str, names: str | Collection[str]) -> set[nn.Module]:
    """Returns the modules of these names and all modules inside them. The names may leave wrappers out.

    Raises:
        ValueError: a name fits no module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[nn.Module] = set()
    for name in (names,) if isinstance(names, str) else names:
        exact = [modules[name]] if name in modules else []
        fitting = exact or [module for other, module in modules.items() if _unwrapped(other) == _unwrapped(name)]
        if not fitting:
            raise ValueError(f"{argument} must name modules of the model, got {name!r}")
        found.update(*(module.modules() for module in fitting))
    return found


def _unwrapped(name: str) -> str:
    """Removes what torch.compile, DataParallel and DistributedDataParallel add to a qualified name."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
