"""The CUDA kernels on a CPU: the code that a GPU would run, thread by thread in random order, on memory that checks.

`python -m tools.emulation` prints what each variant moves. The emulation (csrc/cuda/emulation) finds reads of what was
not written, races, accesses out of bounds, second and missing writes, barriers that do not reset and deadlocks.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from .table import show

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
# What the emulated thread can leave out, so that tests see it found.
SABOTAGE = ("", "team barrier", "block barrier", "second exchange", "copy wait", "fence", "arrival at a semaphore")
VARIANTS, ACCESSES = ("cluster", "semaphore", "refused"), ("wide rows", "ragged", "narrow")
# The fields of csrc/cuda/emulation/channel.cpp.
_NUMBERS = """N C P R stride_n dtype nhwc backward window activation hidden_activation gate_activation
    sm count shared_bytes l2_bytes threads seed sabotage W maps_window"""
_TENSORS = """x grad residual w1 b1 w2 b2 y dresidual mean hidden gate dz dhidden
    wconv argmax_hw maps argmax_c spatial_gate"""
_DTYPES = {torch.float32: 0, torch.bfloat16: 2}


class _Request(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS.split()] + [
        (name, ctypes.c_void_p) for name in _TENSORS.split()
    ]


class _Report(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ["variant", "access", "team", "teams", "stages", "read", "written"]
    ] + [("faults", ctypes.c_char * 4000)]


@dataclass(frozen=True)
class Device:
    """A small device, so that small maps need teams of several blocks."""

    sm: int = 90
    count: int = 4
    shared_bytes: int = 12 << 10
    l2_bytes: int = 1 << 20
    threads: int = 64


@dataclass(frozen=True)
class Outcome:
    """What a call did: the plan, the bytes of its large maps, and every fault."""

    variant: str
    access: str
    team: int
    teams: int
    stages: int
    read: int
    written: int
    faults: list[str]


@dataclass
class Call:
    """SE, with ``window`` ECA, with a weight ``wconv`` CBAM, on x [N, C, H, W] whose images are dense in a layout."""

    x: Tensor
    weights: dict[str, Tensor]
    residual: Tensor | None = None
    window: int = 0
    activation: int = 0
    hidden_activation: int = 1
    gate_activation: int = 0
    device: Device = field(default_factory=Device)
    seed: int = 0
    sabotage: str = ""

    @property
    def hidden(self) -> int:
        return 0 if self.window else self.weights["w1"].shape[0]

    def forward(self) -> tuple[dict[str, Tensor], Outcome]:
        """y, mean, hidden, gate, as the op returns them."""
        n, c = self.x.shape[:2]
        out = {"y": torch.empty_like(self.x), "mean": torch.empty(n, c), "gate": torch.empty(n, c)}
        if not self.window:
            out["hidden"] = torch.empty(n, self.hidden)
        return out, self._run({"x": self.x, "residual": self.residual, **out}, backward=0)

    def cbam(self) -> tuple[dict[str, Tensor], Outcome]:
        """What the op cbam_fwd returns, by name and in its order."""
        n, c, h, w = self.x.shape
        out = {
            "y": torch.empty_like(self.x), "pooled": torch.empty(n, 2, c),
            "argmax_hw": torch.empty(n, c, dtype=torch.int32), "hidden": torch.empty(n, 2, self.hidden),
            "channel_gate": torch.empty(n, c), "maps": torch.empty(n, 2, h, w),
            "argmax_c": torch.empty(n, h, w, dtype=torch.int32), "spatial_gate": torch.empty(n, h, w),
        }  # fmt: skip
        renamed = {{"pooled": "mean", "channel_gate": "gate"}.get(name, name): t for name, t in out.items()}
        return out, self._run({"x": self.x, "residual": self.residual, **renamed}, backward=0)

    def backward(self, grad: Tensor, small: dict[str, Tensor]) -> tuple[dict[str, Tensor], Outcome]:
        """dx, dresidual, and dz and dhidden, the gradients before both activations."""
        n, c = self.x.shape[:2]
        out = {"y": torch.empty_like(grad), "dz": torch.empty(n, c)}
        if self.activation:
            out["dresidual"] = torch.empty_like(grad)
        if not self.window:
            out["dhidden"] = torch.empty(n, self.hidden)
        given = {"grad": grad, "x": self.x, "residual": self.residual if self.activation else None}
        outcome = self._run({**given, **small, **out}, backward=1)
        return {"dx": out.pop("y"), **out}, outcome

    def _run(self, tensors: dict[str, Tensor | None], backward: int) -> Outcome:
        x, d = self.x, self.device
        nhwc = not x[0].is_contiguous()
        numbers = {
            "N": x.shape[0], "C": x.shape[1], "P": x.shape[2] * x.shape[3], "R": self.hidden,
            "stride_n": x.stride(0), "dtype": _DTYPES[x.dtype], "nhwc": nhwc, "backward": backward,
            "window": self.window, "activation": self.activation, "hidden_activation": self.hidden_activation,
            "gate_activation": self.gate_activation, "sm": d.sm, "count": d.count, "shared_bytes": d.shared_bytes,
            "l2_bytes": d.l2_bytes, "threads": d.threads, "seed": self.seed,
            "sabotage": SABOTAGE.index(self.sabotage), "W": x.shape[3],
            "maps_window": self.weights["wconv"].shape[-1] if "wconv" in self.weights else 0,
        }  # fmt: skip
        pointers = {k: t.data_ptr() for k, t in {**self.weights, **tensors}.items() if t is not None}
        report = _Report()
        library().emulate_channel_scale(ctypes.byref(_Request(**numbers, **pointers)), ctypes.byref(report))
        plan = (report.team, report.teams, report.stages, report.read, report.written)
        faults = report.faults.decode().splitlines()
        return Outcome(VARIANTS[report.variant], ACCESSES[report.access], *plan, faults)


def why_not() -> str | None:
    """Why there is no emulation here, or None."""
    return None if shutil.which("g++") else "needs g++"


@functools.cache
def library() -> ctypes.CDLL:
    """The emulation, compiled when its sources have changed."""
    folder = Path(tempfile.gettempdir())
    sources = sorted([*CUDA.glob("*.h"), *CUDA.glob("emulation/*")])
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    path = folder / f"visattn_fast_emulation_{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "emulation.so"
            command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-o", str(made)]
            command += [str(s) for s in sources if s.suffix == ".cpp"]
            subprocess.run([*command, *(f"-I{p}" for p in include_paths())], check=True)
            made.replace(path)
    return ctypes.CDLL(str(path))


def example(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, **options) -> Call:
    """A call with random values; SE with C // 4 hidden units, or ECA with a window."""
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    c = shape[1]
    r = max(c // 4, 1)
    x = random(*shape).to(dtype).contiguous(memory_format=layout)
    weights = {"w1": random(options["window"])} if options.get("window") else {
        "w1": random(r, c), "b1": random(r), "w2": random(c, r), "b2": random(c)
    }  # fmt: skip
    return Call(x, weights, **options)


def cbam_example(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, window: int = 3, **options
) -> Call:
    """The same of CBAM, whose convolution has a window of its own."""
    call = example(shape, layout, dtype, **options)
    wconv = torch.randn(1, 2, window, window, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(call, weights={name: call.weights[name] for name in ("w1", "w2")} | {"wconv": wconv})


SHAPE = (3, 32, 8, 12)  # of what is counted, in bfloat16
HEADER = ("kernel", "layout", "target", "shared", "variant", "team", "teams", "stages", "moved / x")


def counts(
    devices: Sequence[tuple[int, int]] = ((90, 16 << 10), (90, 60 << 10), (80, 16 << 10)),
) -> tuple[list[tuple[object, ...]], list[str]]:
    """What each kernel moves on small devices, given as (sm, shared bytes): rows of `HEADER`, and every fault."""
    rows: list[tuple[object, ...]] = []
    faults: list[str] = []
    for sm, shared in devices:
        for name, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
            for kernel, o in _every_kernel(layout, Device(sm=sm, shared_bytes=shared)):
                moved = f"{(o.read + o.written) / (2 * math.prod(SHAPE)):.2f}"
                rows.append((kernel, name, f"sm_{sm}", shared, o.variant, o.team, o.teams, o.stages, moved))
                faults += o.faults
    return rows, faults


def _every_kernel(layout: torch.memory_format, device: Device) -> Iterator[tuple[str, Outcome]]:
    for name, window in (("SE", 0), ("ECA", 3)):
        call = example(SHAPE, layout, torch.bfloat16, device=device, window=window)
        out, forward = call.forward()
        yield f"{name} forward", forward
        small = {key: out[key] for key in ("hidden", "gate") if key in out}
        yield f"{name} backward", call.backward(torch.randn_like(call.x), small)[1]
    yield "CBAM forward", cbam_example(SHAPE, layout, torch.bfloat16, device=device).cbam()[1]


def main() -> int:
    if why := why_not():
        print(f"emulation: {why}", file=sys.stderr)
        return 0
    rows, faults = counts()
    show(f"{'x'.join(map(str, SHAPE))} bfloat16, emulated", HEADER, rows)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
