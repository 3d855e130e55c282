"""Asks csrc/common/plan.h, through the native library of the CPU, which native CUDA kernel a shape takes, and why."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import native

_VARIANTS = ("cluster", "semaphore", "refused")
_ACCESSES = ("16 bytes at a time", "16 bytes at a time, sums one by one", "one element at a time")


class Device(NamedTuple):
    """The properties of a device that plans depend on."""

    name: str
    sm: int
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int


# Capacities from NVIDIA's data sheets and the CUDA programming guide; a device of this machine is asked itself.
DEVICES = (
    Device("A100", 80, 108, 163 << 10, 40 << 20),
    Device("H200", 90, 132, 227 << 10, 50 << 20),
    Device("B200", 100, 148, 227 << 10, 126 << 20),
)


class Plan(NamedTuple):
    """A planned call; csrc/common/plan.h explains the fields."""

    variant: str
    access: str
    team: int
    teams: int
    held: int
    stages: int
    threads: int
    shared_bytes: int
    one_launch: bool
    why: str


# The fields of csrc/cpu/cuda_plan.cpp.
_ASKED = "N C P R element nhwc backward W window sm count shared_bytes l2_bytes"
_ANSWERED = "variant access team teams held stages threads shared_bytes one_launch"


class _Question(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _ASKED.split()]


class _Answer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _ANSWERED.split()] + [("why", ctypes.c_char_p)]


class Kernel(NamedTuple):
    """The properties of a kernel that plans depend on; ``window`` is the side of CBAM's convolution, else 0."""

    name: str
    reduction: int
    backward: bool
    window: int = 0


KERNELS = (
    Kernel("SE forward", 16, False),
    Kernel("SE backward", 16, True),
    Kernel("CBAM forward", 8, False, 7),
    Kernel("CBAM backward", 8, True, 7),
)


def plan(shape: tuple[int, ...], kernel: Kernel, dtype: torch.dtype, channels_last: bool, device: Device) -> Plan:
    """Returns the plan for a dense map ``[N, C, H, W]``.

    Raises:
        RuntimeError: the native library is absent.
    """
    if absent := native.load():
        raise RuntimeError(absent)
    n, c, h, w = shape
    hidden = max(c // kernel.reduction, 1)
    sizes = (n, c, h * w, hidden, dtype.itemsize, channels_last, kernel.backward, w, kernel.window)
    question, answer = _Question(*sizes, *device[1:]), _Answer()
    library = ctypes.CDLL(str(native.build_of(native.LIBRARY)))
    library.visattn_fast_cuda_plan(ctypes.byref(question), ctypes.byref(answer))
    numbers = (answer.team, answer.teams, answer.held, answer.stages, answer.threads, answer.shared_bytes)
    names = (_VARIANTS[answer.variant], _ACCESSES[answer.access])
    return Plan(*names, *numbers, bool(answer.one_launch), answer.why.decode())


def devices() -> tuple[Device, ...]:
    """Returns the CUDA devices of this machine, or a few common ones if it has none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return DEVICES
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(Device(p.name, 10 * p.major + p.minor, p.multi_processor_count, *_capacities(p)) for p in found)


def _capacities(properties: Any) -> tuple[int, int]:
    return properties.shared_memory_per_block_optin, properties.L2_cache_size


def lines(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[str]:
    """Describes the plans of SE (ECA's are the same) and CBAM on each device, in both layouts, with default options."""
    size, kind = "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
    yield f"native CUDA kernels of SE (ECA takes the same) and CBAM for {size} in {kind}"
    for device in devices():
        for channels_last in (False, True):
            yield f"{device.name} {'channels_last' if channels_last else 'nchw'}"
            for kernel in KERNELS:
                yield f"  {kernel.name:<13}  {_line(plan(shape, kernel, dtype, channels_last, device), kernel)}"


def _line(p: Plan, kernel: Kernel) -> str:
    if p.variant == "refused":
        return f"refused: {p.why}"
    blocks = f"{p.variant}: {p.teams} teams of {p.team} blocks of {p.threads} threads"
    slabs = f"{p.held} x {p.stages}" if p.stages else "none"
    memory = f"{p.shared_bytes / 1024:.1f} KB of shared memory each, resident slabs: {slabs}, {p.access}"
    sums = "the same launch sums" if p.one_launch else "a second launch sums"
    return "; ".join((blocks, memory, p.why, *([f"{sums} the weights' gradients"] if kernel.backward else [])))
