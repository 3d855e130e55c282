"""Which backends exist here, which one serves a call, and every reason why the others do not.

`decide` is the one decision. Public functions ask it by way of `visattn_fast.fused.serve`; `explain` prints it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native
from .ops.autograd import FusedOp
from .ops.library import register_cuda, register_triton

NAMES = ("cuda", "triton", "cpp", "reference")  # in the order in which "auto" tries them
_DTYPES = {
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "cpp": (torch.float32, torch.float64, torch.bfloat16),
    "triton": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}
_TRITON_KEYS = {"cuda": "CUDA", "xpu": "XPU", "cpu": "CPU"}  # the last under the interpreter alone
# Device types on which the Triton kernels have passed their tests as they are now; others are opt-in. AMD's GPUs are
# "cuda", too. What has run, and when: docs/internals/gpu.md.
_TRITON_PROVEN = ()
_CUDA_FASTER = ()  # device types on which the native CUDA kernels are right, and faster than Triton's

_preference = "auto"

# Looked up once: looking them up at each call takes as long as calling them.
_exporting, _tracing = torch.compiler.is_exporting, torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_transforming = torch._C._are_functorch_transforms_active


class Decision(NamedTuple):
    """Who serves a call, and why.

    Attributes:
        backend: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``; ``"torch"`` where the op is made of PyTorch's
            operations and needs no kernel.
        why: one clause.
        fallback: True if the reference serves only because every other backend has a reason against it.
    """

    backend: str
    why: str
    fallback: bool = False

    @property
    def fused(self) -> bool:
        """True if the ops serve; False if plain PyTorch does."""
        return self.backend != "reference"


_CHOSEN = {name: Decision(name, "the first in order without a reason against it") for name in NAMES[:-1]}
_CHOSEN["reference"] = Decision("reference", "every other backend has a reason against it", fallback=True)
_ASKED = {name: Decision(name, "asked for by use_backend") for name in NAMES}
_OWN = Decision(
    "reference", "exports, traces, torch.func and forward mode take plain PyTorch, unless a backend is asked for"
)
_TINY = Decision("reference", "compiled, so small a map is faster in Inductor's code")
_INDUCTOR = Decision("reference", "compiled, Inductor fuses more than an op would")
_TORCH = Decision("torch", "made of PyTorch's operations: it needs no kernel")

# The surroundings of a call: as they are, or as `explain` supposes them.
CONTEXTS = ("eager", "torch.compile", "export")
listeners: list[Callable[[FusedOp, Tensor, Decision], None]] = []  # told of every decision; see `explain`


@dataclass(frozen=True)
class Backend:
    """A backend on one device type of this machine.

    Attributes:
        name: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
        device: the device type, ``"cpu"``, ``"cuda"``, ...
        dtypes: the dtypes it serves; empty for all.
        missing: the reasons why it cannot serve at all here; empty if it can.
        opt_in: the reason why ``"auto"`` passes it over although it can serve; empty if it does not.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: tuple[str, ...]
    opt_in: str = ""

    @property
    def available(self) -> bool:
        """True if an explicit choice of it works."""
        return not self.missing

    def reasons_against(self, dtype: torch.dtype) -> list[str]:
        """Every reason why it cannot serve ``dtype``."""
        reasons = list(self.missing)
        if self.dtypes and dtype not in self.dtypes:
            served = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"serves {served}, not {str(dtype).removeprefix('torch.')}")
        return reasons


def backends(device: str | torch.device = "cpu") -> dict[str, Backend]:
    """Returns each backend on ``device``, with the reasons against it. Loads the native library or triton to know.

    Args:
        device: a device or its type.
    """
    device_type = torch.device(device).type
    return {name: _probe(name, device_type) for name in NAMES}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every call within the context use backend ``name``, in all threads.

    An explicit choice is never replaced: a call that it cannot serve raises RuntimeError with the reasons. Exported
    programs then hold its ops, and `torch.func.vmap` raises, where ``"auto"`` takes the reference.

    Args:
        name: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: an unknown name.
    """
    global _preference
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")
    before, _preference = _preference, name
    try:
        yield
    finally:
        _preference = before


def preference() -> str:
    """The choice in force: ``"auto"``, or the name given to `use_backend`."""
    return _preference


def decide(x: Tensor, op: FusedOp, context: str | None = None) -> Decision:
    """Decides who serves ``op`` of x under the current choice.

    Args:
        x: the first tensor of the call.
        op: what is called.
        context: one of `CONTEXTS`, to ask what would be; None: the surroundings of this call.

    Raises:
        RuntimeError: the backend that was chosen cannot serve x; the message lists every backend's reasons.
    """
    decision = _decide(x, op, context)
    if listeners:
        for listener in listeners:
            listener(op, x, decision)
    return decision


def _decide(x: Tensor, op: FusedOp, context: str | None) -> Decision:
    if _preference == "auto":
        if wants_own_operations() if context is None else context == "export":
            return _OWN
        if (op.tiny or op.compiled_plain) and (_compiling() if context is None else context == "torch.compile"):
            if op.compiled_plain:
                return _INDUCTOR
            if _known_to_hold(x.shape[op.pixels[0]] * x.shape[op.pixels[1]] <= op.tiny):
                return _TINY
    if op.in_torch == "all":
        return _ASKED["reference"] if _preference == "reference" else _TORCH
    backend = select(x.device, x.dtype, _preference)
    if _preference != "auto":
        return _ASKED[backend]
    if backend == "reference" and op.in_torch == x.device.type:
        return _TORCH
    return _CHOSEN[backend]


def reference_asked() -> bool:
    """True if plain PyTorch is to serve whatever the tensor: the question of modules made of PyTorch's operations."""
    return _preference == "reference" or (_preference == "auto" and wants_own_operations())


def compiles_freely() -> bool:
    """True if `torch.compile` traces the call and no backend was chosen: the fastest compiled form may then serve."""
    return _preference == "auto" and _compiling() and not wants_own_operations()


def _known_to_hold(condition: bool) -> bool:
    """True if the condition holds for all sizes that the compiled code may meet. Asking adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def wants_own_operations() -> bool:
    """True if the call is part of an export, or of a transform of torch.func or in forward mode.

    Exported programs shall run without this package, and the ops have no rules for such transforms.
    """
    return _exporting() or _transforming() or forward_ad._current_level >= 0 or _tracing() is not None


def select(device: str | torch.device, dtype: torch.dtype, preference: str) -> str:
    """The backend that serves calls on ``device`` (or devices of its type) in ``dtype``.

    Raises:
        RuntimeError: ``preference`` is not ``"auto"`` and cannot serve; the message lists every backend's reasons.
    """
    return _select(device, dtype, preference)


# torch.compile takes the result as a constant of its trace, guarded by the arguments: what is installed stays.
# (torch.compiler.assume_constant_result sets just this, but imports all of Dynamo, 1.6 s, to do so.)
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
        missing = _why_no_cuda(device_type)
        opt_in = (
            "" if missing or device_type in _CUDA_FASTER else "slower than Triton's: opt-in; serves SE, ECA and CBAM"
        )
        return Backend(name, device_type, _DTYPES[name], missing, opt_in)
    if name == "cpp":
        return Backend(name, device_type, _DTYPES[name], _why_no_cpp(device_type))
    missing = _why_no_triton(device_type)
    if not missing:
        register_triton(_TRITON_KEYS[device_type])
    opt_in = (
        "" if _interpreted() or device_type in _TRITON_PROVEN else "not proven on such a device as it is now: opt-in"
    )
    return Backend(name, device_type, _DTYPES[name], missing, opt_in)


def _interpreted() -> bool:
    """True if triton runs its kernels on CPU tensors in this process. It then owns the CPU key, as tests need it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_cpp(device_type: str) -> tuple[str, ...]:
    if device_type != "cpu":
        return (f"serves cpu, not {device_type}",)
    if _interpreted():
        return ("TRITON_INTERPRET=1 gives CPU tensors to triton in this process",)
    absent = native.load()
    return (absent,) if absent else ()


def _why_no_cuda(device_type: str) -> tuple[str, ...]:
    if device_type != "cuda":
        return (f"serves cuda, not {device_type}",)
    if torch.version.cuda is None:
        return ("this torch is built without CUDA",)
    absent = register_cuda(lambda: native.load(native.CUDA_LIBRARY), lambda: _preference == "cuda")
    return (absent,) if absent else ()


def _why_no_triton(device_type: str) -> tuple[str, ...]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if device_type == "cpu" and not _interpreted():
        reasons.append("serves cpu only under TRITON_INTERPRET=1")
    elif device_type not in _TRITON_KEYS:
        reasons.append(f"serves {', '.join(_TRITON_KEYS)}, not {device_type}")
    return tuple(reasons)
