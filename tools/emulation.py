"""Runs the code of the CUDA kernels on a CPU, thread by thread in random order, on memory that checks each access.

`python -m tools.emulation` prints the bytes that each variant moves. The emulation (csrc/cuda/emulation) finds reads of
unwritten memory, races, accesses out of bounds, second and missing writes, barriers that do not reset, and deadlocks.
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

from visattn_fast.reference.activations import Activation, GateActivation

from .table import show

CSRC = Path(__file__).parents[1] / "csrc"
# What the emulated thread can leave out, so that tests see the fault found.
SABOTAGE = ("", "team barrier", "block barrier", "second exchange", "copy wait", "fence")
SABOTAGE += ("arrival at a semaphore", "grid barrier")
VARIANTS, ACCESSES = ("cluster", "semaphore", "refused"), ("wide rows", "ragged", "narrow")
# The fields of csrc/cuda/emulation/call.cpp.
_NUMBERS = """N C P R stride_n dtype nhwc backward window activation hidden_activation gate_activation
    sm count shared_bytes l2_bytes threads seed sabotage W maps_window"""
_TENSORS = """x grad residual w1 b1 w2 b2 wconv bias y dresidual mean hidden gate argmax_hw
    maps argmax_c spatial_gate dz dhidden dconv dw1 db1 dw2 db2 dwconv dbias"""
_REPORTED = "variant access team teams held stages one_launch read written"
_DTYPES = {torch.float32: 0, torch.bfloat16: 2}


class _Request(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS.split()] + [
        (name, ctypes.c_void_p) for name in _TENSORS.split()
    ]


class _Report(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _REPORTED.split()] + [("faults", ctypes.c_char * 4000)]


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
    """The outcome of a call: its plan, the bytes that it moved of large maps, and every fault."""

    variant: str
    access: str
    team: int
    teams: int
    held: int
    stages: int
    one_launch: bool
    read: int
    written: int
    faults: list[str]


@dataclass
class Call:
    """A call on x [N, C, H, W], whose images are dense in a layout.

    SE; with ``window`` ECA; with a weight ``wconv`` CBAM.
    """

    x: Tensor
    weights: dict[str, Tensor]
    residual: Tensor | None = None
    window: int = 0
    activation: Activation = Activation.NONE
    hidden_activation: Activation = Activation.RELU
    gate_activation: GateActivation = GateActivation.SIGMOID
    device: Device = field(default_factory=Device)
    seed: int = 0
    sabotage: str = ""

    @property
    def hidden(self) -> int:
        return 0 if self.window else self.weights["w1"].shape[0]

    @property
    def cbam(self) -> bool:
        return "wconv" in self.weights

    def forward(self) -> tuple[dict[str, Tensor], Outcome]:
        """Returns the op's results, by name and in its order."""
        n, c, h, w = self.x.shape
        y, gate = torch.empty_like(self.x), torch.empty(n, c)
        if self.cbam:
            indices = torch.empty(n, c, dtype=torch.int32), torch.empty(n, h, w, dtype=torch.int32)
            out = {
                "y": y, "mean": torch.empty(n, 2, c), "argmax_hw": indices[0], "hidden": torch.empty(n, 2, self.hidden),
                "gate": gate, "maps": torch.empty(n, 2, h, w), "argmax_c": indices[1],
                "spatial_gate": torch.empty(n, h, w),
            }  # fmt: skip
        else:
            out = {"y": y, "mean": torch.empty(n, c), "hidden": torch.empty(n, self.hidden), "gate": gate}
        out = {name: t for name, t in out.items() if t.numel()}
        return out, self._run({"x": self.x, "residual": self.residual, **out}, backward=0)

    def backward(self, grad: Tensor, small: dict[str, Tensor]) -> tuple[dict[str, Tensor], Outcome]:
        """Returns the op's results, by name and in its order: dx, dresidual with an activation, weights' gradients."""
        n, c = self.x.shape[:2]
        out = {"dx": torch.empty_like(grad)}
        if self.activation:
            out["dresidual"] = torch.empty_like(grad)
        out |= {f"d{name}": torch.empty(w.shape) for name, w in self.weights.items()}
        branches = 2 if self.cbam else 1
        scratch = {"dz": torch.empty(n, c), "dhidden": torch.empty(n, branches, self.hidden)}
        if self.cbam:
            scratch["dconv"] = torch.empty(n, self.weights["wconv"].numel() + 1)
        given = {"grad": grad, "x": self.x, "residual": self.residual if self.activation else None}
        renamed = {"y" if name == "dx" else name: t for name, t in (out | scratch).items() if t.numel()}
        return out, self._run({**given, **small, **renamed}, backward=1)

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
        library().emulate_call(ctypes.byref(_Request(**numbers, **pointers)), ctypes.byref(report))
        plan = (report.team, report.teams, report.held, report.stages, bool(report.one_launch))
        faults = report.faults.decode().splitlines()
        moved = (report.read, report.written)
        return Outcome(VARIANTS[report.variant], ACCESSES[report.access], *plan, *moved, faults)


def why_not() -> str | None:
    """Returns why there is no emulation here, or None."""
    return None if shutil.which("g++") else "needs g++"


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the emulation, compiled anew if its sources have changed."""
    folder = Path(tempfile.gettempdir())
    sources = sorted([*CSRC.glob("common/*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/emulation/*")])
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
    """Returns a call with random values: SE with C // 4 hidden units, or with ``window`` ECA."""
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
    """Returns a call of CBAM with random values, whose convolution has ``window`` and a bias."""
    call = example(shape, layout, dtype, **options)
    generator = torch.Generator().manual_seed(5)
    wconv, bias = torch.randn(1, 2, window, window, generator=generator), torch.randn(1, generator=generator)
    weights = {"w1": call.weights["w1"], "w2": call.weights["w2"], "wconv": wconv, "bias": bias}
    return dataclasses.replace(call, weights=weights)


def kept(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the forward results that backward needs."""
    return {name: t for name, t in out.items() if name != "y"}


SHAPE = (3, 32, 8, 12)  # the map of `counts`, in bfloat16
HEADER = ("kernel", "layout", "target", "shared", "variant", "team", "teams", "held", "stages", "moved / x")


def counts(
    devices: Sequence[tuple[int, int]] = ((90, 7 << 10), (90, 60 << 10), (80, 16 << 10)),
) -> tuple[list[tuple[object, ...]], list[str]]:
    """Returns rows of `HEADER` for each kernel on small devices, given as (sm, shared bytes), and every fault."""
    rows: list[tuple[object, ...]] = []
    faults: list[str] = []
    for sm, shared in devices:
        for name, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
            for kernel, o in _every_kernel(layout, Device(sm=sm, shared_bytes=shared)):
                moved = f"{(o.read + o.written) / (2 * math.prod(SHAPE)):.2f}"
                rows.append((kernel, name, f"sm_{sm}", shared, o.variant, o.team, o.teams, o.held, o.stages, moved))
                faults += o.faults
    return rows, faults


def _every_kernel(layout: torch.memory_format, device: Device) -> Iterator[tuple[str, Outcome]]:
    for name, build, options in (("SE", example, {}), ("ECA", example, {"window": 3}), ("CBAM", cbam_example, {})):
        call = build(SHAPE, layout, torch.bfloat16, device=device, **options)
        out, forward = call.forward()
        yield f"{name} forward", forward
        yield f"{name} backward", call.backward(torch.randn_like(call.x), kept(out))[1]


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
