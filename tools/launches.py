"""Runs the package's ops through their Triton launchers, and shows every kernel launch to an observer.

Nothing is copied from the launchers: an op is called as a user's module calls it, forward and backward, and its
launches are intercepted where Triton would run them, with the arguments and launch parameters that they were given.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter, jit

from visattn_fast import catalogue
from visattn_fast.kernels.experimental.resident import LAUNCHERS as RESIDENT
from visattn_fast.ops import library

Shape = tuple[int, int, int, int]
EPILOGUES = ((False, None), (True, None), (False, "silu"), (True, "relu"))  # (residual, activation)


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        op: the module's direction that made it, ``se_fwd``, ``se_bwd``, ...
        arguments: the kernel's arguments by name, constexprs included.
        options: num_warps and the like.
    """

    op: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: a for name, a in self.flat.items() if isinstance(a, torch.Tensor)}

    @property
    def flat(self) -> dict[str, Any]:
        """The arguments; the fields of named tuples stand as ``name.field``."""
        return flat(self.arguments)

    @property
    def constants(self) -> dict[str, Any]:
        """The constexprs, in the form of `flat`."""
        annotations = self.kernel.fn.__annotations__
        return flat({name: a for name, a in self.arguments.items() if "constexpr" in str(annotations.get(name, ""))})


def flat(named: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces named tuples, also inside each other, by their fields as ``name.field``."""
    found = {}
    for name, value in named.items():
        fields = value._asdict() if hasattr(value, "_asdict") else None
        found |= {name: value} if fields is None else {f"{name}.{key}": v for key, v in flat(fields).items()}
    return found


def on_triton(entry: catalogue.Entry) -> bool:
    """True if there are kernels for the module; otherwise PyTorch's operations serve it on GPUs, too."""
    ops = entry.ops or (f"{entry.name}_fwd", f"{entry.name}_bwd")
    return any(library.OPS[op].launcher for op in ops)


@dataclass(frozen=True)
class Call:
    """A forward and a backward pass of a module of the catalogue; modules for inference run forward alone.

    A sliced x is half the channels of a wider map. A resident call runs the launchers of `kernels.experimental`, which
    keep an image on the chip.
    """

    entry: catalogue.Entry
    shape: Shape
    layout: str = "nchw"
    dtype: torch.dtype = torch.bfloat16
    residual: bool = False
    activation: str | None = None
    sliced: bool = False
    resident: bool = False

    @property
    def epilogue(self) -> str:
        """``none``, ``residual``, ``relu``, ``residual+relu``, ..."""
        parts = (["residual"] if self.residual else []) + ([self.activation] if self.activation else [])
        return "+".join(parts) or "none"

    def __str__(self) -> str:
        size, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        kind = "-sliced" * self.sliced + "-resident" * self.resident
        return f"{self.entry.name}-{size}-{self.layout}-{dtype}-{self.epilogue}{kind}"

    def passes(self) -> dict[str, int]:
        """Returns what its directions are declared to move, in multiples of x.

        The epilogue reads a residual, and backward also writes g' with an activation.
        """
        name, residual, activation = self.entry.name, self.residual, self.activation is not None
        forward, backward = self.entry.forward_passes - self.resident, self.entry.backward_passes - self.resident
        passes = {f"{name}_fwd": forward + residual}
        if not self.entry.inference:
            passes[f"{name}_bwd"] = backward + activation * (residual + 1)
        return passes

    def run(self, device: str, observe: Observer, operation: Operation | None = None, between: bool = False) -> None:
        """Runs its passes on ``device``, which may be ``"meta"``; see `routed`."""
        module = self.entry.fast(**self.entry.arguments(self.shape[1])).to(device, self.dtype)
        module.train(self.entry.training)
        x, residual = self._map(device, self.sliced).requires_grad_(), self._map(device).requires_grad_()
        extra = {"residual": residual if self.residual else None, "activation": self.activation}
        forward, *backward = self.passes()
        instead = RESIDENT if self.resident else {}
        with routed(forward, observe, operation, between, instead), torch.set_grad_enabled(bool(backward)):
            y = module(x, **(extra if self.entry.epilogue else {}))
        if not backward:
            return
        inputs = [x, *module.parameters(), *([residual] if self.residual else [])]
        grad = torch.ones_like(y)
        with routed(*backward, observe, operation, between, instead):
            torch.autograd.grad(y, inputs, grad)

    def _map(self, device: str, sliced: bool = False) -> torch.Tensor:
        N, C, H, W = self.shape
        x = torch.empty((N, C * (1 + sliced), H, W), dtype=self.dtype, device=device)
        x = x.contiguous(memory_format=catalogue.LAYOUTS[self.layout])[:, :C]
        return x if device == "meta" else x.normal_()


# Sees a launch, and runs it, or not, by calling its second argument.
Observer = Callable[[Launch, Callable[[], None]], None]
# Sees an operation of PyTorch in a launcher: the direction, PyTorch's overload, its arguments, its results.
Operation = Callable[[str, Any, Any, Any], None]
Launcher = Callable[..., Any]


@contextmanager
def routed(
    op: str,
    observe: Observer,
    operation: Operation | None = None,
    between: bool = False,
    instead: Mapping[str, Launcher] | None = None,
) -> Iterator[None]:
    """Within the context every op of the package is its Triton launcher, on tensors of any device.

    ``observe`` sees, and decides on, every launch; ``operation`` sees every other operation of a launcher.

    Args:
        op: the name that launches and operations are seen under.
        between: also shows what PyTorch does between the package's ops, and in ops without kernels.
        instead: launchers that serve ops instead of those of `kernels.ops`.
    """
    backends = importlib.import_module("visattn_fast.backends")  # the package has a function of that name
    router = _Router(op, observe, operation, between, instead or {})
    with mock.patch.object(backends, "select", return_value="triton"), router:
        yield


def launches(call: Call) -> dict[str, Counter[str]]:
    """Counts what each direction of the call launches, without a GPU: kernels, and PyTorch's operations beside them."""
    found: dict[str, Counter[str]] = {op: Counter() for op in call.passes()}

    def operation(op: str, func: Any, inputs: Any, outputs: Any) -> None:
        if launches_something(func, inputs, outputs):
            found[op][str(func)] += 1

    call.run("meta", lambda launch, _: found[launch.op].update([launch.name]), operation, between=True)
    return found


def peak_bytes(call: Call) -> tuple[int, int]:
    """Returns the most bytes that tensors hold at once in both directions of a call, and the bytes of y.

    x and y's gradient are among them. Needs no GPU: tensors have no memory. What an operation of PyTorch allocates for
    itself is not seen.
    """
    module = call.entry.fast(**call.entry.arguments(call.shape[1])).to("meta", call.dtype)
    with _Live() as live, routed(call.entry.name, lambda launch, run: None):
        y = module(call._map("meta").requires_grad_())
        y.backward(torch.ones_like(y))
    return live.peak, y.nbytes


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that an operation has made and something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.storages = {key: s for key, s in self.storages.items() if not s[0].expired()}
        for t in filter(_is_tensor, tree_leaves(results)):
            storage = t.untyped_storage()
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return results


def launches_something(func: Any, inputs: Any, outputs: Any) -> bool:
    """True if an operation of PyTorch does more than allocate or make a view.

    `contiguous` and `to` do if they copy. An operation that returns no tensor has read one on the host.
    """
    if "empty" in str(func):
        return False
    given, made = ({t.untyped_storage()._cdata for t in tree_leaves(v) if _is_tensor(t)} for v in (inputs, outputs))
    return func._schema.is_mutable or not made or not made <= given


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class _Router(TorchDispatchMode):
    def __init__(
        self,
        op: str,
        observe: Observer,
        operation: Operation | None,
        between: bool,
        instead: Mapping[str, Launcher],
    ) -> None:
        super().__init__()
        self.op, self.observe, self.operation, self.between, self.instead = op, observe, operation, between, instead

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "visattn_fast":
            result = func(*args, **(kwargs or {}))
            if self.between and self.operation:
                self.operation(self.op, func, (args, kwargs), result)
            return result
        op = func._schema.name.removeprefix("visattn_fast::")
        launcher = library.OPS[op].launcher
        if launcher is None:
            if not (self.between and self.operation):
                return func(*args, **(kwargs or {}))
            with _Operations(self.op, self.operation):
                return library.OPS[op].reference(*args, **(kwargs or {}))
        launch = self.instead.get(op) or getattr(importlib.import_module(f"visattn_fast.kernels.ops.{launcher}"), op)
        with watched(self.op, self.observe, self.operation):
            return launch(*args, **(kwargs or {}))


@contextmanager
def watched(op: str, observe: Observer, operation: Operation | None = None) -> Iterator[None]:
    """Within the context, which runs the launcher of ``op``, ``observe`` stands between every launch and Triton."""
    with ExitStack() as stack:
        for runner in (jit.JITFunction, interpreter.InterpretedFunction):
            stack.enter_context(mock.patch.object(runner, "run", _interceptor(op, observe, runner.run)))
        if operation:
            stack.enter_context(_Operations(op, operation))
        yield


class _Operations(TorchDispatchMode):
    def __init__(self, op: str, operation: Operation) -> None:
        super().__init__()
        self.op, self.operation = op, operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operation(self.op, func, (args, kwargs), result)
        return result


def _interceptor(op: str, observe: Observer, run: Callable[..., None]) -> Callable[..., None]:
    def intercept(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        signature = inspect.signature(kernel.fn)
        options = {name: value for name, value in kwargs.items() if name not in signature.parameters}
        bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
        bound.apply_defaults()
        launch = Launch(op, kernel, tuple(grid), dict(bound.arguments), options)
        observe(launch, lambda: run(kernel, *args, grid=grid, warmup=warmup, **kwargs))

    return intercept
