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
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize

_logger = logging.getLogger("visattn_fast")

PLAIN = frozenset({Tensor, nn.Parameter})  # exact types of parameters
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)

Settings = Mapping[str, Any]  # a layer's __dict__

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
    fits: Callable[[Settings], bool] | None = None
    words: str = ""
    children: int | None = 0
    noun: str = ""
    twice: bool = False


class _Step(NamedTuple):
    """One layer in the order of the check: ``key`` in the ``parent``-th module found, 0 being the module itself."""

    parent: int
    key: str
    kinds: frozenset[type]
    fits: Callable[[Settings], bool] | None
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
    fits: Callable[[Settings], bool] | None
    words: str

    def __new__(
        cls, expected: Mapping[str, Layer], fits: Callable[[Settings], bool] | None = None, words: str = ""
    ) -> Layers:
        order = ["", *expected]
        steps = []
        for name, layer in expected.items():
            outer, _, key = name.rpartition(".")
            steps.append(_Step(order.index(outer), key, layer.kinds, layer.fits, layer.children, name))
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


def layer(*kinds: type, fits: Callable[[Settings], bool] | None = None, words: str = "") -> Layer:
    """Returns a `Layer` without children."""
    return Layer(frozenset(kinds), fits, words)


def container(kind: type[nn.Module], children: int | None) -> Layer:
    """Returns a `Layer` that holds so many others; None: any number."""
    return Layer(frozenset((kind,)), children=children)


def _has(name: str, d: Settings) -> bool:
    """True if a layer has this parameter. A replica that DataParallel makes keeps it in its instance."""
    return d["_parameters"].get(name) is not None or d.get(name) is not None


def _has_bias(d: Settings) -> bool:
    return _has("bias", d)


def has_no_bias(d: Settings) -> bool:
    """True if a layer adds nothing to its products."""
    return not _has("bias", d)


def _is_affine(d: Settings) -> bool:
    return _has("weight", d) and _has("bias", d)


def is_pointwise(d: Settings) -> bool:
    """True if a convolution is a matrix product over channels."""
    return (d["kernel_size"], d["stride"], d["padding"], d["groups"]) == ((1, 1), (1, 1), (0, 0), 1)


def keeps_size(d: Settings) -> bool:
    """True if a convolution has an odd kernel, the same along all axes, and zero-pads to the size of its input."""
    settings = d["padding"], d["stride"], d["dilation"], d["groups"], d["padding_mode"]
    return settings == _SAME_SIZE.get(d["kernel_size"])


# Kernel size -> the settings that `keeps_size` demands.
_SAME_SIZE = {
    (k,) * axes: ((k // 2,) * axes, (1,) * axes, (1,) * axes, 1, "zeros") for k in range(1, 64, 2) for axes in (1, 2)
}


RELU, SIGMOID = layer(nn.ReLU), layer(nn.Sigmoid)
MEAN = layer(nn.AdaptiveAvgPool2d, fits=lambda d: d["output_size"] in (1, (1, 1)), words="the mean of the map")
LINEAR = layer(nn.Linear)
LINEAR_WITH_BIAS = layer(nn.Linear, fits=_has_bias, words="with a bias")
LINEAR_WITHOUT_BIAS = layer(nn.Linear, fits=has_no_bias, words="without a bias")
POINTWISE = layer(nn.Conv2d, fits=is_pointwise, words="1x1, with stride 1, no padding and one group")
POINTWISE_WITH_BIAS = layer(
    nn.Conv2d, fits=lambda d: is_pointwise(d) and _has_bias(d), words="1x1, with one group and a bias"
)
POINTWISE_WITHOUT_BIAS = layer(
    nn.Conv2d, fits=lambda d: is_pointwise(d) and has_no_bias(d), words="1x1, with one group and without a bias"
)
SAME_SIZE = layer(nn.Conv2d, fits=keeps_size, words="zero-padded to the size of its input, with stride and dilation 1")
SAME_SIZE_WITHOUT_BIAS = layer(
    nn.Conv2d, fits=lambda d: keeps_size(d) and has_no_bias(d), words=f"{SAME_SIZE.words}, without a bias"
)
ABSENT = layer(type(None))
BATCH_NORM = layer(nn.BatchNorm2d)
AFFINE_BATCH_NORM = layer(nn.BatchNorm2d, fits=_is_affine, words="affine")


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
    if _is_untouched(module.__dict__, layers):
        return True
    reason = why_not(module, layers)
    if reason and not torch.compiler.is_compiling():
        tell(module, reason)
    return not reason


def has_plain_layers(module: nn.Module, x: Any, layers: Layers) -> bool:
    """True if x is a tensor, and checks may read the weights: the layers are as built and have no parametrization."""
    return isinstance(x, Tensor) and _is_untouched(module.__dict__, layers)


def are_plain(modules: Mapping[str, Any], layers: Layers) -> bool:
    """Answers `as_built` for layers by name, instead of a module that has them. Tells nobody."""
    return _is_untouched({"_parameters": {}, "_modules": modules}, layers) or not _why_not(modules, layers)


def _is_untouched(d: Settings, layers: Layers) -> bool:
    """The fast form of `why_not`, for a module without parametrizations: on small maps each microsecond shows.

    Args:
        d: the ``__dict__`` of the module.
        layers: what the module assumes.
    """
    if any(_GLOBAL_HOOKS) or (layers.fits and not layers.fits(d)):
        return False
    own = d["_parameters"]
    if own:
        for parameter in own.values():
            if parameter is not None and type(parameter) not in PLAIN:
                return False
    found = [d["_modules"]]
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
        if "forward" in d or (len(below) != children and children is not None) or (fits and not fits(d)):
            return False
        if own:
            for parameter in own.values():
                if parameter is not None and type(parameter) not in PLAIN:
                    return False
        found.append(below)
    return True


def why_not(module: nn.Module, layers: Layers) -> str:
    """Returns why ``module`` must call its layers; an empty string if it need not."""
    if layers.fits is not None and not layers.fits(module.__dict__):
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
    settings = dict(inner.__dict__)
    if parametrized:
        if expected.twice:
            return "has a parametrization, and is called twice"
        originals = {name: next(p.parameters(), None) for name, p in inner.parametrizations.items()}
        settings["_parameters"] = {**inner._parameters, **originals}
    if expected.children is not None and len(inner._modules) - parametrized != expected.children:
        return f"has {len(inner._modules)} layers, not {expected.children}"
    if expected.fits is not None and not expected.fits(settings):
        return f"is not {expected.words}"
    for name, parameter in settings["_parameters"].items():
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
