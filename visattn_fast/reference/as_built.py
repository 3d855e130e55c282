"""The rule "as built": when a fused forward may stand for layers that it does not call.

A fused module reads the parameters of its layers and never calls them. That is right only if a call would compute the
same and nobody would notice its absence. So each layer must have exactly the class and the settings that the fused
forward assumes, no hook of any kind, no ``forward`` in its instance, and plain tensors as parameters. Parametrizations
of `torch.nn.utils.parametrize` are fine, since reading a parameter computes them; but not in a layer that is called
twice in a forward pass, since spectral norm changes with each reading.

`Layers` states what a class assumes of its layers, and `as_built` asks at every call whether it holds. If not, the
layers are called.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize

try:
    from ._layers import untouched as _native
except ImportError:  # not built, or PyPy
    _native = None

_logger = logging.getLogger("visattn_fast")
_compiling = torch.compiler.is_compiling  # looked up once: a look-up at each call costs time

PLAIN = (nn.Parameter, Tensor)  # exact types of parameters
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


class Settings(Protocol):
    """The settings of a layer: its ``__dict__``, or its `Attributes`."""

    def __getitem__(self, name: str, /) -> Any: ...

    def get(self, name: str, /) -> Any: ...


class Attributes:
    """Reads the settings of a layer as its attributes: torch.compile compiles anew when one changes.

    On Python 3.13.0 it does not when a value changes that was read from ``__dict__``.
    """

    __slots__ = ("layer", "parameters")

    def __init__(self, layer: Any, parameters: Mapping[str, Any] | None = None) -> None:
        self.layer = layer
        self.parameters = layer._parameters if parameters is None else parameters

    def __getitem__(self, name: str, /) -> Any:
        return self.parameters if name == "_parameters" else getattr(self.layer, name)

    def get(self, name: str, /) -> Any:
        return getattr(self.layer, name, None)


Check: TypeAlias = "Callable[[Settings], bool] | Fit"

# Called with each module that calls its layers, and the reason, by `explain`.
listeners: list[Callable[[nn.Module, str], None]] = []
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # the reasons that were logged


class Layer(NamedTuple):
    """The assumption of a fused forward about one layer.

    Attributes:
        kinds: its class, one of these exactly; NoneType if there may be no layer.
        fits: True if its settings are those assumed.
        words: what ``fits`` demands, for messages.
        children: the number of its child modules; None: any.
        noun: names its kinds in messages; empty: their class names do.
        twice: True if a forward pass calls it twice.
    """

    kinds: frozenset[type]
    fits: Check | None = None
    words: str = ""
    children: int | None = 0
    noun: str = ""
    twice: bool = False


class _Step(NamedTuple):
    """One layer in the order of the check: ``key`` in the ``parent``-th module found, 0 being the module itself."""

    parent: int
    key: str
    kinds: tuple[type, ...]
    fits: Check | None
    children: int | None
    name: str


class Layers(tuple[_Step, ...]):
    """The assumptions of a fused forward: qualified name -> `Layer`, containers before what they contain.

    Attributes:
        expected: the same, as given.
        fits: True if the settings of the module itself are those assumed; None: any are.
        words: the reason against other settings, for messages.
    """

    expected: Mapping[str, Layer]
    fits: Check | None
    words: str

    def __new__(cls, expected: Mapping[str, Layer], fits: Check | None = None, words: str = "") -> Layers:
        order = ["", *expected]
        steps = []
        for name, layer in expected.items():
            outer, _, key = name.rpartition(".")
            steps.append(_Step(order.index(outer), key, tuple(layer.kinds), layer.fits, layer.children, name))
        layers = super().__new__(cls, steps)
        layers.expected = dict(expected)
        layers.fits, layers.words = fits, words
        return layers


def observer(hook: Callable[..., None], *args: Any) -> functools.partial[None]:
    """Returns a forward hook that reads a module's input alone, so that the module may still serve as if it had none.

    Args:
        hook: called with ``args``, then with what a hook gets.
    """
    observing = functools.partial(hook, *args)
    observing.observes_input = True  # type: ignore[attr-defined]
    return observing


def _change_something(hooks: Mapping[int, Any]) -> bool:
    """True if one of the forward hooks is not made by `observer`."""
    return not all(getattr(hook, "observes_input", False) for hook in hooks.values())


def layer(*kinds: type, fits: Check | None = None, words: str = "") -> Layer:
    """Returns a `Layer` without children."""
    return Layer(frozenset(kinds), fits, words)


def container(kind: type[nn.Module], children: int | None) -> Layer:
    """Returns a `Layer` that holds so many others; None: any number."""
    return Layer(frozenset((kind,)), children=children)


def _has(name: str, d: Settings) -> bool:
    """True if a layer has this parameter. A replica that DataParallel makes keeps it in its instance."""
    return d["_parameters"].get(name) is not None or d.get(name) is not None


class _Fit(NamedTuple):
    names: tuple[str, ...] = ()
    allowed: Mapping[Any, tuple[Any, ...]] = {}
    parameters: tuple[tuple[str, bool], ...] = ()


class Fit(_Fit):
    """Demands settings of a layer, as data, which the native check reads.

    Attributes:
        names: settings; ``allowed`` maps the value of the first to those of the others.
        allowed: first value -> the others.
        parameters: name -> whether the layer must have this parameter, as pairs.
    """

    __slots__ = ()

    def __call__(self, d: Settings) -> bool:
        """True if the layer has these settings and parameters."""
        if self.names:
            first, *others = self.names
            if self.allowed.get(d[first]) != tuple([d[name] for name in others]):
                return False
        return all(_has(name, d) is there for name, there in self.parameters)


_CONVOLUTION = ("kernel_size", "padding", "stride", "dilation", "groups", "padding_mode")
_1X1 = {(1, 1): ((1, 1), (0, 0), 1)}


def _of_same_size(padding_mode: str) -> dict[Any, tuple[Any, ...]]:
    """Odd kernel, the same along all axes -> the other settings of a convolution that keeps the size of its input."""
    return {
        (k,) * axes: ((k // 2,) * axes, (1,) * axes, (1,) * axes, 1, padding_mode)
        for k in range(1, 64, 2)
        for axes in (1, 2)
    }


_WITH_BIAS, _WITHOUT_BIAS = (("bias", True),), (("bias", False),)
is_pointwise = Fit(("kernel_size", "stride", "padding", "groups"), _1X1)
keeps_size = Fit(_CONVOLUTION, _of_same_size("zeros"))
replicates = Fit(_CONVOLUTION, _of_same_size("replicate"))

RELU, SIGMOID = layer(nn.ReLU), layer(nn.Sigmoid)
MEAN = layer(nn.AdaptiveAvgPool2d, fits=Fit(("output_size",), {1: (), (1, 1): ()}), words="the mean of the map")
# The mean over all positions of a signal, a map or a volume: in each, the number of dimensions that the layer takes.
MEAN_DIMENSIONS = {nn.AdaptiveAvgPool1d: 3, nn.AdaptiveAvgPool2d: 4, nn.AdaptiveAvgPool3d: 5}
MEAN_OF_POSITIONS = layer(
    *MEAN_DIMENSIONS,
    fits=Fit(("output_size",), {1: (), (1,): (), (1, 1): (), (1, 1, 1): ()}),
    words="the mean of all positions",
)
LINEAR = layer(nn.Linear)
LINEAR_WITH_BIAS = layer(nn.Linear, fits=Fit(parameters=_WITH_BIAS), words="with a bias")
LINEAR_WITHOUT_BIAS = layer(nn.Linear, fits=Fit(parameters=_WITHOUT_BIAS), words="without a bias")
POINTWISE = layer(nn.Conv2d, fits=is_pointwise, words="1x1, with stride 1, no padding and one group")
POINTWISE_WITH_BIAS = layer(
    nn.Conv2d, fits=is_pointwise._replace(parameters=_WITH_BIAS), words="1x1, with one group and a bias"
)
POINTWISE_WITHOUT_BIAS = layer(
    nn.Conv2d, fits=is_pointwise._replace(parameters=_WITHOUT_BIAS), words="1x1, with one group and without a bias"
)
SAME_SIZE = layer(nn.Conv2d, fits=keeps_size, words="zero-padded to the size of its input, with stride and dilation 1")
SAME_SIZE_WITHOUT_BIAS = layer(
    nn.Conv2d, fits=keeps_size._replace(parameters=_WITHOUT_BIAS), words=f"{SAME_SIZE.words}, without a bias"
)
SAME_SIZE_1D_WITHOUT_BIAS = SAME_SIZE_WITHOUT_BIAS._replace(kinds=frozenset({nn.Conv1d}))
REPLICATE = layer(nn.Conv2d, fits=replicates, words="padded by replication to the size of its input")
ABSENT = layer(type(None))
BATCH_NORM = layer(nn.BatchNorm2d)
AFFINE_BATCH_NORM = layer(nn.BatchNorm2d, fits=Fit(parameters=(("weight", True), ("bias", True))), words="affine")


def as_built(module: nn.Module, x: Any, layers: Layers) -> bool:
    """True if ``module`` may serve ``x`` without calling its layers.

    If not, `explain` hears the reason, and the logger ``visattn_fast`` gets one line when the reason is new.

    Args:
        module: the module.
        x: its input. False if it is no tensor: torch.fx traces layers by calling them.
        layers: what the module assumes.
    """
    if not isinstance(x, Tensor):
        return False
    if _native is not None and not _compiling():
        if _native(module.__dict__, layers, layers.fits, PLAIN, _GLOBAL_HOOKS):
            return True
    elif _is_untouched(module, layers):
        return True
    reason = why_not(module, layers)
    if reason and not torch.compiler.is_compiling():
        tell(module, reason)
    return not reason


def has_plain_layers(module: nn.Module, x: Any, layers: Layers) -> bool:
    """True if x is a tensor, and checks may read the weights: the layers are as built and have no parametrization."""
    return isinstance(x, Tensor) and is_untouched(module, layers)


def are_plain(modules: Mapping[str, Any], layers: Layers) -> bool:
    """Answers `as_built` for layers by name, instead of a module that has them. Tells nobody."""
    return is_untouched(_Parts(modules), layers) or not _why_not(modules, layers)


class _Parts:
    """Layers by name, held as a module holds them."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self._parameters: dict[str, Any] = {}
        self._modules = modules


def is_untouched(module: nn.Module | _Parts, layers: Layers) -> bool:
    """The fast form of `why_not`, for a module without parametrizations: on small maps each microsecond shows."""
    if _native is not None and not _compiling():
        untouched = _native(module.__dict__, layers, layers.fits, PLAIN, _GLOBAL_HOOKS)
        return bool(untouched) or _is_untouched(module, layers)
    return _is_untouched(module, layers)


def _is_untouched(module: nn.Module | _Parts, layers: Layers) -> bool:
    """`is_untouched` in Python, which torch.compile traces."""
    if any(_GLOBAL_HOOKS) or (layers.fits and not layers.fits(Attributes(module))):
        return False
    own = module._parameters
    if own:
        for parameter in own.values():
            if parameter is not None and type(parameter) not in PLAIN:
                return False
    found = [module._modules]
    for parent, key, kinds, fits, children, _ in layers:
        inner = found[parent].get(key)
        if type(inner) not in kinds:
            return False
        if inner is None:
            found.append({})
            continue
        d = inner.__dict__
        if d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
            return False
        if d["_forward_hooks"] and _change_something(d["_forward_hooks"]):
            return False
        below, own = d["_modules"], d["_parameters"]
        if "forward" in d or (len(below) != children and children is not None):
            return False
        if fits and not fits(Attributes(inner)):
            return False
        if own:
            for parameter in own.values():
                if parameter is not None and type(parameter) not in PLAIN:
                    return False
        found.append(below)
    return True


def why_not(module: nn.Module, layers: Layers) -> str:
    """Returns why ``module`` must call its layers; an empty string if it need not."""
    if layers.fits is not None and not layers.fits(Attributes(module)):
        return layers.words
    for name, parameter in module._parameters.items():
        if not _is_plain(parameter):
            return f"{name} is a {type(parameter).__name__}"
    return _why_not(module._modules, layers)


def _why_not(modules: Mapping[str, Any], layers: Layers) -> str:
    if any(_GLOBAL_HOOKS):
        return "global hooks of torch.nn.modules.module must see every layer"
    found = [modules]
    for step in layers:
        inner = found[step.parent].get(step.key)
        reason = why_not_layer(inner, layers.expected[step.name])
        if reason:
            return f"{step.name} {reason}"
        found.append({} if inner is None else inner._modules)
    return ""


def why_not_layer(inner: Any, expected: Layer) -> str:
    """Returns what keeps a layer from being as built, as the end of a sentence about it; empty if nothing does."""
    parametrized = isinstance(inner, nn.Module) and parametrize.is_parametrized(inner)
    kind = type(inner).__mro__[1] if parametrized else type(inner)
    if kind not in expected.kinds:
        names = sorted({_name(k) for k in expected.kinds})
        return f"is {_name(kind)}, not {expected.noun or ' or '.join(names)}"
    if inner is None:
        return ""
    if inner._forward_pre_hooks or inner._backward_hooks or inner._backward_pre_hooks:
        return "has hooks"
    if _change_something(inner._forward_hooks):
        return "has hooks"
    if "forward" in inner.__dict__:
        return "has a forward of its own in its instance"
    parameters: Mapping[str, Any] = inner._parameters
    if parametrized:
        if expected.twice:
            return "has a parametrization, and is called twice"
        originals = {name: next(p.parameters(), None) for name, p in inner.parametrizations.items()}
        parameters = {**inner._parameters, **originals}
    if expected.children is not None and len(inner._modules) - parametrized != expected.children:
        return f"has {len(inner._modules)} layers, not {expected.children}"
    if expected.fits is not None and not expected.fits(Attributes(inner, parameters)):
        return f"is not {expected.words}"
    for name, parameter in parameters.items():
        if not _is_plain(parameter):
            return f"has a {type(parameter).__name__} as {name}"
    return ""


def _is_plain(parameter: Tensor | None) -> bool:
    """True for a tensor of torch's own: of values, or without them in exports and in `explain`."""
    kind = type(parameter)
    return parameter is None or kind in PLAIN or kind.__module__.startswith("torch._subclasses.")


def _name(kind: type) -> str:
    return "missing" if kind is type(None) else kind.__name__


def tell(module: nn.Module, reason: str) -> None:
    """Tells `explain` that ``module`` calls its layers, and why; logs a new reason once."""
    for listener in listeners:
        listener(module, reason)
    told = _told.setdefault(module, set())
    if reason not in told:
        told.add(reason)
        name = module.__dict__.get("_qualified_name", "")
        _logger.info("%s%s calls its layers: %s", f"{name}: " if name else "", type(module).__name__, reason)
