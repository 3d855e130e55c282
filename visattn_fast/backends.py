"""The backends of this machine, the one that serves a call, and the reasons against the others.

`decide` makes this decision for every call. Public functions ask it in `visattn_fast.fused.serve`; `explain` prints it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native, replicas
from .ops.autograd import FusedOp
from .ops.library import register_cuda, register_triton

NAMES = ("cuda", "triton", "cpp", "reference")  # "auto" tries them in this order
_DTYPES = {
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "cpp": (torch.float32, torch.float64, torch.bfloat16),
    "triton": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}
_TRITON_KEYS = {"cuda": "CUDA", "xpu": "XPU", "cpu": "CPU"}  # cpu only under the interpreter
# Device types on which the present Triton kernels have passed their tests; on others they are opt-in. AMD's GPUs count
# as "cuda". docs/internals/gpu.md says what has run, and when.
_TRITON_PROVEN = ()
_CUDA_FASTER = ()  # device types on which the native CUDA kernels pass their tests and are faster than Triton's


class _Choice:
    """An open `use_backend`."""

    def __init__(self, name: str) -> None:
        self.name = name


_open: dict[int, list[_Choice]] = {}  # thread -> its open choices


def _choice_of(thread: int | None) -> str:
    """Returns the innermost open choice of a thread; ``"auto"`` if it has none."""
    choices = _open.get(thread) if thread is not None else None
    return choices[-1].name if choices else "auto"


class _OfThread(threading.local):
    """The choice in force in each thread: its innermost open one, or the one that it began with.

    Attributes:
        name: the choice; None in threads that Python did not start. Autograd runs backward passes in such threads.
        at_first: the choice that the thread began with: that of DataParallel's caller in the threads of its replicas.
        choices: the open choices, innermost last.
    """

    def __init__(self) -> None:  # runs at the first access in each thread
        foreign = isinstance(threading.current_thread(), threading._DummyThread)
        self.at_first = None if foreign else _choice_of(replicas.caller())
        self.name = self.at_first
        self.choices: list[_Choice] = []


_here = _OfThread()
_ever_chosen = False  # spares programs that never choose the look-up in `_here`
_handed_over = ContextVar("chosen_backend", default="auto")  # PyTorch hands it to autograd's threads

_probing = threading.RLock()

# Looked up once: a look-up at each call takes as long as the call itself.
_exporting, _tracing = torch.compiler.is_exporting, torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_transforming = torch._C._are_functorch_transforms_active


class Decision(NamedTuple):
    """The backend that serves a call, and why.

    Attributes:
        backend: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``; ``"torch"`` if the op is made of PyTorch's
            operations and needs no kernel.
        why: the reason, one clause.
        fallback: True if the reference serves only because no other backend does.
    """

    backend: str
    why: str
    fallback: bool = False

    @property
    def fused(self) -> bool:
        """True if the ops serve; False if plain PyTorch does."""
        return self.backend != "reference"


_CHOSEN = {name: Decision(name, "the first backend that can serve") for name in NAMES[:-1]}
_CHOSEN["reference"] = Decision("reference", "no other backend serves this call", fallback=True)
_ASKED = {name: Decision(name, "asked for by use_backend") for name in NAMES}
_TRANSFORMED = Decision("reference", "exports, traces and transforms use plain PyTorch unless a backend is asked for")
_TINY = Decision("reference", "on so small a map Inductor's code is faster than an op")
_INDUCTOR = Decision("reference", "Inductor fuses more than an op could")
_TORCH = Decision("torch", "made of PyTorch's operations, needs no kernel")

# The contexts that `explain` asks about. "export" stands for traces, torch.func and forward mode as well.
CONTEXTS = ("eager", "torch.compile", "export")
listeners: list[Callable[[FusedOp, Tensor, Decision], None]] = []  # called with every decision, by `explain`


@dataclass(frozen=True)
class Backend:
    """A backend on one device type of this machine.

    Attributes:
        name: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
        device: the device type, ``"cpu"``, ``"cuda"``, ...
        dtypes: the dtypes that it serves; empty: all.
        missing: the reasons why it cannot serve on this machine; empty if it can.
        opt_in: the reason why ``"auto"`` passes it over although it can serve; empty if ``"auto"`` considers it.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: tuple[str, ...]
    opt_in: str = ""

    @property
    def available(self) -> bool:
        """True if `use_backend` can choose it."""
        return not self.missing

    def reasons_against(self, dtype: torch.dtype) -> list[str]:
        """Returns every reason why it cannot serve ``dtype``."""
        reasons = list(self.missing)
        if self.dtypes and dtype not in self.dtypes:
            served = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"serves {served}, not {str(dtype).removeprefix('torch.')}")
        return reasons


def backends(device: str | torch.device = "cpu") -> dict[str, Backend]:
    """Returns each backend on a device by its name, with the reasons against it.

    The first call for a device type loads the native library, or imports triton and registers its kernels.

    Args:
        device: a device or its type.
    """
    device_type = torch.device(device).type
    with _probing:  # kernels can be registered only once; other threads wait
        return {name: _probe(name, device_type) for name in NAMES}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every call within the context use the backend ``name``, in the thread that enters it.

    The threads of DataParallel's replicas and of autograd follow the thread that called them. Other threads choose for
    themselves.

    A call that this backend cannot serve raises RuntimeError with the reasons; no other backend takes its place. An
    exported program then contains its ops, and `torch.func.vmap` raises; ``"auto"`` uses the reference for both.

    Args:
        name: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: an unknown name.
    """
    global _ever_chosen
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")
    _ever_chosen = True
    if _compiling():  # Dynamo traces these lines, and no more than these
        before, _here.name = _here.name, name
        try:
            yield
        finally:
            _here.name = before
        return
    # Contexts of one thread may end in any order, and in another thread, as those of coroutines and generators do.
    state, thread, choice = _here.__dict__, threading.get_ident(), _Choice(name)
    choices, token = state["choices"], _handed_over.set(name)
    choices.append(choice)
    _open[thread] = choices
    state["name"] = name
    try:
        yield
    finally:
        choices.remove(choice)
        state["name"] = choices[-1].name if choices else state["at_first"]
        if not choices:
            _open.pop(thread, None)
        try:
            _handed_over.reset(token)
        except ValueError:  # it ends in another context than it began in
            _handed_over.set("auto")


def preference() -> str:
    """Returns the choice in force in this thread: ``"auto"``, or the name given to `use_backend`."""
    return (_here.name or _from_caller_of_backward()) if _ever_chosen else "auto"


def _from_caller_of_backward() -> str:
    """Returns the choice of the thread that called ``backward``, in a thread of autograd's."""
    if not torch._C._is_key_in_tls("context"):
        return "auto"
    context: Any = torch._C._get_obj_in_tls("context")
    return context.get(_handed_over, "auto")


_from_caller_of_backward._dynamo_marked_constant = True  # type: ignore[attr-defined]


def decide(x: Tensor, op: FusedOp, context: str | None = None) -> Decision:
    """Decides which backend serves a call, under the choice in force.

    Args:
        x: the first tensor of the call.
        op: the op to call.
        context: one of `CONTEXTS`, to ask about another context; None: the context of this call.

    Returns:
        The backend and the reason for it.

    Raises:
        RuntimeError: the backend asked for cannot serve x; the message lists every backend's reasons.
    """
    if listeners:
        return _announce(x, op, context)
    # `preference`, without its call: on small maps the difference shows.
    asked = (_here.name or _from_caller_of_backward()) if _ever_chosen else "auto"
    if asked == "auto":
        if wants_own_operations() if context is None else context == "export":
            return _TRANSFORMED
        if (op.tiny or op.compiled_plain) and (_compiling() if context is None else context == "torch.compile"):
            if op.compiled_plain:
                return _INDUCTOR
            if _known_to_hold(x.shape[op.pixels[0]] * x.shape[op.pixels[1]] <= op.tiny):
                return _TINY
    if op.in_torch == "all":
        return _ASKED["reference"] if asked == "reference" else _TORCH
    backend = select(x.device, x.dtype, asked)
    if asked != "auto":
        return _ASKED[backend]
    if backend == "reference" and op.in_torch == x.device.type:
        return _TORCH
    return _CHOSEN[backend]


def _announce(x: Tensor, op: FusedOp, context: str | None) -> Decision:
    """Decides, and tells the listeners."""
    hearing = listeners[:]
    listeners.clear()
    try:
        decision = decide(x, op, context)
    finally:
        listeners.extend(hearing)
    for listener in hearing:
        listener(op, x, decision)
    return decision


def reference_asked() -> bool:
    """True if plain PyTorch must serve, for any tensor. Modules that are made of PyTorch's operations ask this."""
    asked = preference()
    return asked == "reference" or (asked == "auto" and wants_own_operations())


def compiles_freely() -> bool:
    """True if `torch.compile` traces the call and no backend is asked for: its fastest form may serve."""
    return preference() == "auto" and _compiling() and not wants_own_operations()


def _known_to_hold(condition: bool) -> bool:
    """True if the condition holds for all sizes that the compiled code may meet. Adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def wants_own_operations() -> bool:
    """True in an export, a trace, a transform of torch.func, or forward mode.

    Exported programs must run without this package, and the ops have no rules for such transforms.
    """
    return _exporting() or _transforming() or forward_ad._current_level >= 0 or _tracing() is not None


def select(device: str | torch.device, dtype: torch.dtype, preference: str) -> str:
    """Returns the name of the backend that serves calls on a device in a dtype.

    Args:
        device: a device or its type.
        dtype: the dtype of the first tensor.
        preference: ``"auto"``, or the backend asked for.

    Raises:
        RuntimeError: the backend asked for cannot serve; the message lists every backend's reasons.
    """
    return _select(device, dtype, preference)


# torch.compile treats the results as constants of its trace, guarded by the arguments: backends do not come and go.
# (torch.compiler.assume_constant_result sets the same mark, but imports all of Dynamo, 1.6 s.)
select._dynamo_marked_constant = True  # type: ignore[attr-defined]
wants_own_operations._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _select(device: str | torch.device, dtype: torch.dtype, preference: str) -> str:
    found = backends(device)
    if preference == "auto":
        return next(b.name for b in found.values() if not b.opt_in and not b.reasons_against(dtype))
    if found[preference].reasons_against(dtype):
        lines = "\n".join(f"  {b.name}: {'; '.join(b.reasons_against(dtype)) or 'can serve'}" for b in found.values())
        raise RuntimeError(f"backend {preference!r} cannot serve {dtype} on {torch.device(device).type}:\n{lines}")
    return preference


@functools.cache
def _probe(name: str, device_type: str) -> Backend:
    if name == "reference":
        return Backend(name, device_type, (), ())
    if name == "cuda":
        missing = _missing_for_cuda(device_type)
        opt_in = "" if missing or device_type in _CUDA_FASTER else "opt-in: slower than triton; serves SE, ECA and CBAM"
        return Backend(name, device_type, _DTYPES[name], missing, opt_in)
    if name == "cpp":
        return Backend(name, device_type, _DTYPES[name], _missing_for_cpp(device_type))
    missing = _missing_for_triton(device_type)
    if not missing:
        try:
            register_triton(_TRITON_KEYS[device_type])
        except Exception as error:  # a damaged install may raise anything; without triton, the others serve
            missing = (f"triton does not load: {type(error).__name__}: {error}",)
    tested = _interpreted() or device_type in _TRITON_PROVEN
    opt_in = "" if tested else "opt-in until its kernels have been tested on such a device"
    return Backend(name, device_type, _DTYPES[name], missing, opt_in)


def _interpreted() -> bool:
    """True if triton interprets its kernels on CPU tensors in this process. It then owns the CPU key, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing_for_cpp(device_type: str) -> tuple[str, ...]:
    if device_type != "cpu":
        return (f"serves cpu, not {device_type}",)
    if _interpreted():
        return ("TRITON_INTERPRET=1 gives CPU tensors to triton in this process",)
    absent = native.load()
    return (absent,) if absent else ()


def _missing_for_cuda(device_type: str) -> tuple[str, ...]:
    if device_type != "cuda":
        return (f"serves cuda, not {device_type}",)
    if torch.version.cuda is None:
        return ("this torch is built without CUDA",)
    absent = register_cuda(lambda: native.load(native.CUDA_LIBRARY), lambda: preference() == "cuda")
    return (absent,) if absent else ()


def _missing_for_triton(device_type: str) -> tuple[str, ...]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if device_type == "cpu" and not _interpreted():
        reasons.append("serves cpu only under TRITON_INTERPRET=1")
    elif device_type not in _TRITON_KEYS:
        reasons.append(f"serves {', '.join(_TRITON_KEYS)}, not {device_type}")
    return tuple(reasons)
