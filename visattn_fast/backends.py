"""Which backends exist here, which one serves a call, and every reason why the others do not."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from . import native, ops

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
_CUDA_FASTER = ()  # those on which the native CUDA kernels are right, and faster than Triton's

_preference = "auto"

# Asked at every call. Looking them up takes as long as calling them.
_exporting, _tracing = torch.compiler.is_exporting, torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_transforming = torch._C._are_functorch_transforms_active


@dataclass(frozen=True)
class Backend:
    """A backend on one device type of this machine.

    Attributes:
        name: ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
        device: the device type, ``"cpu"``, ``"cuda"``, ...
        dtypes: the dtypes it serves; empty for all.
        missing: why it cannot serve at all here; empty if it can.
        opt_in: why ``"auto"`` passes it over although it can serve; empty if it does not.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: tuple[str, ...]
    opt_in: str = ""

    @property
    def available(self) -> bool:
        """Whether an explicit choice of it works."""
        return not self.missing

    def reasons_against(self, dtype: torch.dtype) -> list[str]:
        """Every reason why it cannot serve ``dtype``."""
        reasons = list(self.missing)
        if self.dtypes and dtype not in self.dtypes:
            served = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"serves {served}, not {str(dtype).removeprefix('torch.')}")
        return reasons


def backends(device: str | torch.device = "cpu") -> dict[str, Backend]:
    """What each backend can do on ``device`` here, and why not. Loads the native library or triton to know.

    Args:
        device: a device or its type.
    """
    device_type = torch.device(device).type
    return {name: _probe(name, device_type) for name in NAMES}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every call uses backend ``name``, in all threads.

    An explicit choice is never replaced: a call that it cannot serve raises RuntimeError with the reasons. So exports
    hold its ops, and `torch.func.vmap` raises, where ``"auto"`` takes the reference.

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


def fused(x: torch.Tensor, tiny: int = 0) -> bool:
    """Whether the ops serve x under the current choice; the reference does otherwise.

    Args:
        x: a map, or anything else that ops take.
        tiny: the most pixels of a map with which Inductor's code of the reference is the faster one.

    Raises:
        RuntimeError: the chosen backend cannot serve x.
    """
    if tiny and is_tiny(x.shape[2] * x.shape[3], tiny):
        return False
    return select(x.device, x.dtype, _asked()) != "reference"


def is_tiny(pixels: int, most: int) -> bool:
    """Whether `torch.compile` traces the call of a map of at most ``most`` pixels, and no backend was chosen.

    Asked of sizes that the graph fixes: of others nothing is known.
    """
    return _compiling() and _asked() == "auto" and _known_to_hold(pixels <= most)


def serving(x: torch.Tensor) -> str:
    """The backend that serves x under the current choice. Raises as `fused` does."""
    return select(x.device, x.dtype, _asked())


def _known_to_hold(condition: bool) -> bool:
    """Whether it holds of all sizes that the code being compiled may meet; asking adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def reference_asked() -> bool:
    """Whether the reference is to serve any tensor: what fast modules made of PyTorch's operations alone go by."""
    return _asked() == "reference"


def compiled_freely() -> bool:
    """Whether `torch.compile` traces the call and no backend was chosen: what is fastest compiled may then serve."""
    return _compiling() and _asked() == "auto"


def _asked() -> str:
    """The choice in force: the reference where none was made and only PyTorch's own operations will do."""
    return "reference" if _preference == "auto" and _wants_own_operations() else _preference


def _wants_own_operations() -> bool:
    """Whether the call is part of an export, or of a transform of torch.func or in forward mode.

    Exported programs are to run without this package; the ops have no rules for such transforms.
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
_wants_own_operations._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        ops.register_triton(_TRITON_KEYS[device_type])
    opt_in = (
        "" if _interpreted() or device_type in _TRITON_PROVEN else "not proven on such a device as it is now: opt-in"
    )
    return Backend(name, device_type, _DTYPES[name], missing, opt_in)


def _interpreted() -> bool:
    """Whether triton runs its kernels on CPU tensors in this process. It then owns the CPU key, as tests need it."""
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
    absent = ops.register_cuda(lambda: native.load(native.CUDA_LIBRARY), lambda: _preference == "cuda")
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
