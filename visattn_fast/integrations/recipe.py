"""Recipes: which fused class takes the place of a class, what it assumes of the module, and when it cannot serve."""

from __future__ import annotations

import ast
import copy
import copyreg
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import modules
from ..reference.as_built import Layer, Layers, Settings, why_not

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}  # layer -> its name in our functions
_OURS = frozenset(getattr(modules, name) for name in modules.__all__)
_ANY = Layers({})

Look = Callable[[Any, Tensor], dict[str, Tensor]]  # a module and its input -> its gates by name
Check = Callable[[nn.Module], str]  # returns why a module cannot be served; an empty string if it can


def always(module: nn.Module) -> str:
    """Finds no reason against any module."""
    return ""


class Repeated(NamedTuple):
    """A function of a library whose mathematics a fused class repeats.

    Attributes:
        owner: the class or module that has it.
        known: the `source_hash` of the function that is repeated. Other versions may compute something else.
        name: its name there.
    """

    owner: Any
    known: str
    name: str = "forward"

    @property
    def function(self) -> Any:
        """The function that is there now."""
        return getattr(self.owner, self.name, None)

    def why_not(self) -> str:
        """Returns why the function may compute something else; an empty string if it is the one that is repeated."""
        owner = self.owner.__name__.rpartition(".")[2]
        return "" if source_hash(self.function) == self.known else f"unknown version of {owner}.{self.name}"


@functools.cache
def source_hash(function: Any) -> str:
    """Hashes the code of a function, without comments, docstring and annotations. Empty if it has no source."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return ""  # inspect would read the source of the wrapped function
    if function.__code__.co_filename == "<string>":
        return ""  # made by exec: Python 3.13 would read that of ``python -c``
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(code):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            node.body = node.body[ast.get_docstring(node) is not None :]
        elif isinstance(node, ast.arg):
            node.annotation = None
    return hashlib.sha256(ast.unparse(code).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """Makes modules of one class fast: gives them a subclass that overrides forward alone.

    The subclass asks at every call how much of the module it may fuse. `plan` asks the same for `accelerate`.

    Attributes:
        original: the class, matched exactly.
        fused: the subclass. Its table ``LAYERS`` holds what ``op`` assumes, ``PARTS`` what ``passes`` assumes.
        op: the name of the function in `functional` that forward becomes; ``"epilogue"`` for a block.
        passes: the name of the function that serves instead if layers have to be called; empty: none does.
        why_not: the reason why a module can never be served; an empty string if it can.
        block: True if the module is a block around a gate, and the gate takes over the block's epilogue.
        inline: for a class whose own forward may compute a gate among other things: True if it does in this module. The
            others of the class are none of our business.
        look: returns the gates of a module of the original class; None: the class has a method ``attention``, or none.
        repeats: the library's functions that ``fused`` repeats. If one is another, the module is left alone.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    op: str
    passes: str = ""
    why_not: Check = always
    block: bool = False
    inline: Callable[[Any], bool] | None = None
    look: Look | None = None
    repeats: tuple[Repeated, ...] = ()

    @property
    def gate(self) -> bool:
        """True if the module only scales its input. Attention over positions does more."""
        return (
            not self.block
            and self.inline is None
            and self.op not in ("window_attention", "self_attention", "map_attention")
        )

    def plan(self, module: nn.Module) -> tuple[str, str]:
        """Returns the name of the function that serves ``module`` as it is now, and why it calls its layers.

        The name is empty if the module is left alone. The reason is empty if the module calls no layers.
        """
        reason = next(filter(None, (r.why_not() for r in self.repeats)), "") or self.why_not(module)
        if reason:
            return "", reason
        reason = why_not(module, getattr(self.fused, "LAYERS", _ANY))
        if not reason:
            return self.op, ""
        if self.passes:
            against_passes = why_not(module, getattr(self.fused, "PARTS", _ANY))
            return ("", against_passes) if against_passes else (self.passes, reason)
        return "", reason


def swap(module: nn.Module, recipe: Recipe, name: str = "") -> None:
    """Gives the module the fused class. Notes its qualified name in it, for messages.

    If this is interrupted, the module has its own class, or `put_back` undoes it.
    """
    kind = swapped_class(recipe.fused, recipe.original)
    kind._repeats = tuple((r.owner, r.name, r.function) for r in recipe.repeats)
    module.__class__ = kind
    module._qualified_name = name  # type: ignore[assignment]


class SwappedModule(nn.Module):
    """Base of every class that `swap` gives: copies stay swapped, pickles do not.

    Pickles hold the original class and nothing of this package, so that they load where it is not installed.
    """

    _accelerated_from: type[nn.Module]
    _repeats: tuple[tuple[Any, str, Any], ...] = ()  # the owner, name and function of each `Repeated`

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *others = reduced
        kept = {key: value for key, value in state.items() if key != "_qualified_name"}
        # copyreg.__newobj__, which object takes, is held to the present class.
        return copyreg._reconstructor, (self._accelerated_from, object, None), kept, *others  # type: ignore[attr-defined]

    def __copy__(self) -> SwappedModule:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SwappedModule:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


_swapped_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[SwappedModule]] = {}


def swapped_class(fused: type[nn.Module], original: type[nn.Module]) -> type[SwappedModule]:
    """Returns the class that `swap` gives a module: the fused one, with the methods of `SwappedModule`."""
    if (fused, original) not in _swapped_classes:
        names = {"_accelerated_from": original, "__module__": fused.__module__, "__doc__": fused.__doc__}
        _swapped_classes[fused, original] = type(fused.__name__, (SwappedModule, fused), names)
    return _swapped_classes[fused, original]


def swapped_gate(recipes: Sequence[Recipe], fits: Callable[[Settings], bool] | None = None, words: str = "") -> Layer:
    """Returns the gate of a block: of a fused class of these recipes, all of which take an epilogue."""
    swapped = (swapped_class(recipe.fused, recipe.original) for recipe in recipes)
    kinds = frozenset((*swapped, *(recipe.fused for recipe in recipes)))
    return Layer(kinds, fits, words, children=None, noun="a fused gate with an epilogue")


def is_swapped(module: nn.Module) -> bool:
    """True if `swap` gave the module its class, or the class that this one is derived from."""
    return isinstance(module, SwappedModule)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Returns the module's class, or the class that it had before `swap`."""
    return module._accelerated_from if isinstance(module, SwappedModule) else type(module)


def why_not_put_back(module: nn.Module) -> str:
    """Returns why `put_back` would take off more than `swap` put on; an empty string if it would not."""
    kind = type(module)
    return "" if SwappedModule in kind.__bases__ else f"another tool has since made it a {kind.__name__}"


def put_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    module.__dict__.pop("_qualified_name", None)
    module.__class__ = own_class(module)


def why_patched(module: nn.Module) -> str:
    """Returns which function of the library was replaced since the module was swapped; an empty string if none was."""
    for owner, name, function in getattr(type(module), "_repeats", ()):
        if getattr(owner, name, None) is not function:
            return f"{owner.__name__.rpartition('.')[2]}.{name} was replaced"
    return ""


def is_fused(module: nn.Module) -> bool:
    """True if the module is swapped, or of a fused class of this package."""
    return is_swapped(module) or type(module) in _OURS
