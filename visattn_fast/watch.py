"""Shows a model's gates: all of them for one input, or their statistics during training.

A gate is a module whose class has a method ``attention``. It takes some or all arguments of ``forward`` and returns
gates by name, for example ``{"channel": [N, C, 1, 1]}``. Every module of the catalogue has it. A fused module never
holds its gates as tensors; ``attention`` computes them in plain PyTorch. The modules of other libraries that
`accelerate` knows are gates too, accelerated or not.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import replicas
from .integrations.accelerate import look_at
from .integrations.traceless import eager, same_randomness
from .ops.autograd import in_autocast
from .reference.as_built import observer

_logger = logging.getLogger(__name__)

_SHUT, _OPEN = 0.05, 0.95
_FLAT = 1e-3  # below this spread a gate counts as constant; for gates that are no sigmoid, relative to their mean
_SIGMOIDS = ("channel", "spatial", "height", "width", "element")  # kinds that can saturate at 0 or 1
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

_looking = ContextVar("_looking", default=False)  # True in a run that only looks at gates: no training step

Found = list[tuple[str, dict[str, Tensor]]]  # for each call of a gate module: its name and its gates


def attention_maps(model: nn.Module, x: Any) -> dict[str, Tensor]:
    """Returns every gate of ``model`` for the input x by module name, in the order in which the modules run.

    The model runs in eval mode, eagerly and without gradients. Its parameters, buffers, modes, hooks and gradients stay
    exactly as they are, and so do the random generators. DataParallel, DistributedDataParallel and torch.compile's
    wrappers are unwrapped.

    Args:
        model: any module. Gates have a method ``attention``, or are modules that `accelerate` knows; modules inside a
            gate count as parts of it. Gates that do not run are left out.
        x: the model's input; a tuple: its positional arguments.

    Returns:
        Detached tensors with the shapes that each module's ``attention`` documents. Keys are the names of
        ``model.named_modules()``: ``"stages.0.0.gate"``. A module with several gates adds the name of each:
        ``"stages.0.0.gate.channel"``. A module that runs several times adds the number of the call, from 0:
        ``"gate[1].channel"``. If the model itself is a gate, keys are the names of its gates.

    Raises:
        ValueError: the model has no gate.
    """
    model = _unwrapped(model)
    _require_gates(model)
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        return {key: gate for key, _, gate in _named(_run(model, x if isinstance(x, tuple) else (x,), {}))}
    finally:
        for module, training in modes.items():
            module.training = training


class GateStatistics(NamedTuple):
    """Statistics of one gate in one training step, over all images, channels and pixels.

    Attributes:
        step: number of the training step, from 0.
        name: key of the gate, as in `attention_maps`.
        kind: name of the gate in its module: ``"channel"``, ``"spatial"``, ...
        mean, spread: mean and standard deviation.
        below, above: shares of values below 0.05 and above 0.95.
    """

    step: int
    name: str
    kind: str
    mean: float
    spread: float
    below: float
    above: float

    @property
    def fault(self) -> str:
        """The fault of the gate, or an empty string.

        ``"not finite"``; ``"shut"`` or ``"open"``: 99 % of a sigmoid gate are below 0.05 or above 0.95; ``"constant"``:
        the spread is at most 0.001 or, for a gate that is no sigmoid, at most a thousandth of the mean.
        """
        if not abs(self.mean) < float("inf"):
            return "not finite"
        sigmoid = self.kind in _SIGMOIDS
        if sigmoid and max(self.below, self.above) >= 0.99:
            return "shut" if self.below > self.above else "open"
        return "constant" if self.spread <= _FLAT * (1.0 if sigmoid else abs(self.mean)) else ""


def log_statistics(statistics: GateStatistics) -> None:
    """Logs one line to ``visattn_fast.watch``, as a warning if the gate has a fault, else as information."""
    level = logging.WARNING if statistics.fault else logging.INFO
    verdict = f": {statistics.fault}" if statistics.fault else ""
    message = "step %d, gate %s: mean %.3f, spread %.3f, %.0f%% below 0.05, %.0f%% above 0.95%s"
    step, name, _, mean, spread, below, above = statistics
    _logger.log(level, message, step, name, mean, spread, 100 * below, 100 * above, verdict)


def watch_gates(
    model: nn.Module, log: Callable[[GateStatistics], object] = log_statistics, every: int = 100
) -> GateWatch:
    """Passes the statistics of every gate of ``model`` to ``log``, in every ``every``-th training step from the first.

    A training step is a call of ``model`` in training mode. One that raises does not count. Results, gradients, buffers
    and random generators stay the same. DistributedDataParallel and DataParallel may wrap the model before or after
    this call; of DataParallel's replicas the first is watched. torch.compile may wrap it only before. Hooks inside a
    compiled graph do nothing, so the watch of a ``torch.compile(model)`` runs the model once more in each step that it
    reports, eagerly and without gradients. A model compiled later is not watched.

    Args:
        model: any module, as in `attention_maps`.
        log: called with the `GateStatistics` of one gate after the other; by default `log_statistics`.
        every: steps from one report to the next.

    Returns:
        A handle. ``remove()`` ends the watch, and so does leaving the handle as a context manager.

    Raises:
        ValueError: ``every`` is not a positive int, or the model has no gate.

    Warns:
        UserWarning: ``module.compile()`` has compiled a module in place; the watch cannot see its gates.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be a positive int, got {every!r}")
    inner = _unwrapped(model)
    gates = _require_gates(inner)
    if any(module._compiled_call_impl is not None for module in model.modules()):
        warnings.warn(
            "watch_gates sees no gate inside a module that module.compile() compiled in place: use"
            " torch.compile(module) instead, and watch what it returns",
            stacklevel=2,
        )
    watch = GateWatch(log, every)
    watch._compiled = any(_is_compiled(module) for module in model.modules())
    watch._attach(*(model, []) if watch._compiled else (inner, gates))
    return watch


class GateWatch:
    """The handle that `watch_gates` returns. A copied or pickled model carries a watch that does nothing."""

    def __init__(self, log: Callable[[GateStatistics], object], every: int) -> None:
        self._log, self._every = log, every
        self._compiled = False
        self._step = -1  # the last training step that returned
        self._running = False  # True from the beginning of a training step to its end
        self._found: Found | None = None  # gates of the current step; None if it is not reported
        self._handles: list[RemovableHandle] = []

    def remove(self) -> None:
        """Removes the hooks from the model."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> GateWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return GateWatch, (log_statistics, self._every)

    def _attach(self, model: nn.Module, gates: list[tuple[str, nn.Module]]) -> None:
        for name, gate in gates:
            look = observer(self._look, name)
            self._handles.append(gate.register_forward_hook(look, with_kwargs=True))
        self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._end))

    def _is_blind(self) -> bool:
        """True in compiled code, in a run that only looks at gates, and in all replicas but the first."""
        return torch.compiler.is_compiling() or _looking.get() or replicas.place() > 0

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_blind():
            return
        self._found = None  # of a step that raised
        self._running = bool(model.training and self._handles)
        if not self._running or (self._step + 1) % self._every:
            return
        self._found = []
        if self._compiled:
            self._found = _run(_unwrapped(model), args, kwargs, _summary)

    def _look(self, name: str, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._is_blind() and self._found is not None:
            with torch.no_grad():
                self._found.append((name, {k: _summary(g) for k, g in _gates_of(gate, args, kwargs).items()}))

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_blind() or not self._running:
            return
        self._running = False
        self._step += 1
        found, self._found = self._found, None
        for name, kind, summary in _named(found or []):
            self._log(GateStatistics(self._step, name, kind, *summary.tolist()))


def _summary(gate: Tensor) -> Tensor:
    """Mean, spread, and the shares of values that are shut and open, ``[4]``."""
    values = gate.float()
    spread, mean = torch.std_mean(values, correction=0)
    return torch.stack([mean, spread, (values < _SHUT).float().mean(), (values > _OPEN).float().mean()])


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Callable[[Tensor], Tensor] = Tensor.detach
) -> Found:
    """Runs the model once, on copies of its buffers and without side effects. Returns ``keep(gate)`` of every gate."""
    found: Found = []

    def look(name: str, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append((name, {kind: keep(value) for kind, value in _gates_of(gate, args, kwargs).items()}))

    handles = [gate.register_forward_hook(observer(look, name), with_kwargs=True) for name, gate in _gates(model)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    looking = _looking.set(True)
    try:
        with torch.no_grad(), eager(), same_randomness((*model.parameters(), *model.buffers())):
            torch.func.functional_call(model, buffers, args, kwargs)
    finally:
        _looking.reset(looking)
        for handle in handles:
            handle.remove()
    return found


def _named(found: Found) -> Iterator[tuple[str, str, Tensor]]:
    """Yields each gate's key, its name in its module, and its tensor; `attention_maps` describes the keys."""
    calls, seen = Counter(name for name, _ in found), Counter[str]()
    for name, gates in found:
        call = f"{name}[{seen[name]}]" if calls[name] > 1 else name
        seen[name] += 1
        for kind, tensor in gates.items():
            yield (call if call and len(gates) == 1 else f"{call}.{kind}".lstrip(".")), kind, tensor


def _require_gates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the gates of ``model``. Raises ValueError if there are none."""
    gates = list(_gates(model))
    if not gates:
        raise ValueError(
            "model must have a module with a method attention(x), or one that accelerate knows,"
            f" got {type(model).__name__} without"
        )
    return gates


def _gates(module: nn.Module, name: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost gates among ``module`` and the modules below it, each once, with their names."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    if _inputs(module):
        yield name, module
        return
    for child, submodule in module.named_children():
        below = name if child == "_orig_mod" else f"{name}.{child}".lstrip(".")
        yield from _gates(submodule, below, seen)


def _inputs(module: nn.Module) -> tuple[str, ...]:
    """The arguments of ``forward`` from which the module's gates are computed, by name; empty if it is no gate."""
    look = look_at(module)
    method: Any = getattr(type(module), "attention", None)
    if look is None and not inspect.isfunction(method):
        return ()
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    names = arguments[:1] if look else tuple(inspect.signature(method).parameters)[1:]
    return names if set(names) <= set(arguments) else ()


def _gates_of(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The module's gates for one call. Outside autocast, floating-point inputs are cast to the parameters' dtype."""
    given = inspect.signature(type(gate).forward).bind(gate, *args, **kwargs).arguments
    inputs = {name: given[name] for name in _inputs(gate) if name in given}
    weight = next(gate.parameters(), None)
    for name, value in inputs.items():
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if weight is not None and floating and not in_autocast(value):
            inputs[name] = value.to(weight.dtype)
    look = look_at(gate)
    gates: dict[str, Tensor] = look(gate, *inputs.values()) if look else gate.attention(**inputs)  # type: ignore[operator]
    return gates


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, _WRAPPERS) or _is_compiled(model):
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod  # type: ignore[assignment]
    return model


def _is_compiled(module: nn.Module) -> bool:
    """True if ``module`` is a result of ``torch.compile``."""
    return "_orig_mod" in module._modules
