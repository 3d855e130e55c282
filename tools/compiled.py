"""Compiles every kernel ahead of time, without a GPU, and judges the result: `python -m tools.compiled`.

It compiles what launchers launch: Triton itself specialises each launch on tensors without memory (device "meta"), with
its meta-parameters and alignment, for targets that need not be there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from visattn_fast import catalogue
from visattn_fast.kernels.core import heuristics

from . import binary, ttir
from .launches import Call, Launch, Shape, flat
from .table import show

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
EVERY = {**TARGETS, "sm_89": GPUTarget("cuda", 89, 32)}  # desktop cards, with little shared memory: only if asked for
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SHAPES = ((64, 256, 56, 56), (64, 64, 112, 112), (32, 512, 28, 28), (32, 2048, 7, 7), (1, 256, 56, 56))
# More than 2^31 elements: in many images, in one image, and between the rows of a slice.
HUGE = ((4096, 256, 56, 56), (1, 2048, 1100, 1100), (2, 3, 32000, 32000))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Window attention beside the catalogue's; with `--attention`, everything that its kernels are for.
WINDOWS = (8, 9, 12, 16)
WINDOW_DTYPES = (torch.bfloat16, torch.float32)
EVERY_WINDOW = range(7, 17)
HEADS = (32, 64, 96)
EVERY_HEAD = (16, 24, 32, 48, 64, 96, 128)
MAPS = ((7, 7), (14, 14), (16, 16), (32, 32), (64, 64), (13, 15))
WIDE = 16  # bytes of the widest load of one thread that every target has


@dataclass(frozen=True)
class Use:
    """A launch, the call that it belongs to, and the shape of the maps that it streams."""

    launch: Launch
    origin: str
    shape: tuple[int, ...]

    @property
    def scalars(self) -> dict[str, int]:
        return {name: a for name, a in self.launch.flat.items() if isinstance(a, int)}

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything that addresses depend on: launches of one variant that agree in it need one check."""
        tensors = [(name, t.shape, t.stride()) for name, t in self.launch.tensors.items()]
        return self.shape, self.launch.grid, self.scalars, tensors


@dataclass(frozen=True)
class Variant:
    """A kernel as Triton specialises it for a target, and every launch that it serves."""

    target: str
    source: ASTSource
    options: dict[str, Any]
    uses: list[Use]

    @property
    def kernel(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> str:
        """The dtype of its first tensor."""
        return next((kind[1:] for kind in flat(self.source.signature).values() if kind.startswith("*")), "")

    @property
    def label(self) -> str:
        """The meta-parameters that tell it from the kernel's other variants."""
        constants = self.uses[0].launch.constants.items()
        return " ".join(f"{name.split('.')[-1]}={int(value)}" for name, value in constants if isinstance(value, int))

    @property
    def parameters(self) -> list[str]:
        """The arguments that the compiled kernel still has."""
        return [name for name, kind in flat(self.source.signature).items() if kind != "constexpr"]


@dataclass(frozen=True)
class Compiled:
    """A compiled variant, and what is wrong with it."""

    variant: Variant
    asm: dict[str, Any]
    shared: int

    @cached_property
    def resources(self) -> binary.Resources:
        return binary.resources(self.asm, self.shared)

    @cached_property
    def accesses(self) -> list[binary.Access]:
        return binary.accesses(self.asm)

    @property
    def widest_load(self) -> int:
        return max((a.width for a in self.accesses if a.kind == "load"), default=0)

    @cached_property
    def faults(self) -> list[str]:
        """The faults; each message names kernel, meta-parameters, target and figure."""
        found = [f"spills {self.resources.spilled} bytes per thread"] if self.resources.spilled else []
        limit = SHARED[self.variant.target]
        found += [f"takes {self.shared} bytes of shared memory, {limit} are there"] if self.shared > limit else []
        found += ttir.lost_nan(self.asm["ttir"])
        for use in self.variant.uses:
            arguments = [use.launch.flat[name] for name in self.variant.parameters]
            faults = [*self._narrow(use), *ttir.overflows(self.asm["ttir"], arguments, use.launch.grid)]
            found += [f"{fault}, in {use.origin}" for fault in faults]
        return [f"{self.variant.kernel} [{self.variant.label}] for {self.variant.target}: {fault}" for fault in found]

    def _narrow(self, use: Use) -> Iterator[str]:
        """Finds accesses to streamed maps that are narrower than their alignment allows."""
        for name, tensor in use.launch.tensors.items():
            if tensor.shape != use.shape:
                continue
            rows = use.launch.constants.get("TILE.ROW_ALIGN")  # of kernels that address each row of a plane
            allowed = min((rows or alignment(tensor)) * tensor.element_size(), WIDE)
            position = self.variant.parameters.index(name)
            widths = {(a.kind, a.width) for a in self.accesses if position in a.arguments}
            if not widths:
                yield f"no access to {name} was found"
            for kind, width in sorted(widths):
                if width < allowed:
                    yield f"{kind}s {name} {width} bytes at a time, {allowed} are aligned"


def alignment(t: torch.Tensor) -> int:
    """Returns the power of two that divides the dense extent of a map ``[N, C, H, W]`` and the strides beyond it."""
    N, C, H, W = t.shape
    dense = H * W if t.stride(3) == 1 and (C == 1 or t.stride(1) != 1) else C
    bits = dense
    for size, stride in zip((N, C), (t.stride(0), t.stride(1)), strict=True):
        bits |= stride if size > 1 and stride > 1 else 0
    return bits & -bits


def variants(calls: Iterable[Call], targets: Iterable[str]) -> list[Variant]:
    """Returns the different variants that the launches of the calls need."""
    calls, found = list(calls), []
    for amd, chosen in itertools.groupby(sorted(targets, key=_amd), _amd):
        uses: list[Use] = []
        with mock.patch.object(heuristics, "amd", lambda amd=amd: amd):
            for call in calls:
                call.run("meta", lambda launch, run, call=call: uses.append(_use(launch, call)))  # noqa: B023
        found += specialise(uses, chosen)
    return found


def _amd(target: str) -> bool:
    return EVERY[target].backend == "hip"


def _use(launch: Launch, call: Call) -> Use:
    return Use(launch, f"{launch.op} of {call}", call.shape)


def specialise(uses: Iterable[Use], targets: Iterable[str]) -> list[Variant]:
    """Returns what Triton compiles for the launches, by the steps of its JITFunction.run, without a driver."""
    found: dict[str, Variant] = {}
    for target, use in itertools.product(targets, uses):
        kernel, backend = use.launch.kernel, make_backend(EVERY[target])
        given = {"debug": False, "instrumentation_mode": "", "enable_fp_fusion": True, **use.launch.options}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        arguments, specialization, options = bind(**use.launch.arguments, **given)
        options, signature, constants, attributes = kernel._pack_args(
            backend, given, arguments, specialization, options
        )
        source = _Source(kernel, signature, constants, attributes)
        key = f"{target} {source.hash()} {options.hash()}"
        uses_so_far = found.setdefault(key, Variant(target, source, options.__dict__, [])).uses
        if all(use.geometry != other.geometry for other in uses_so_far):
            uses_so_far.append(use)
    return list(found.values())


class _Source(ASTSource):
    """Guards Python's parser, which Triton's front end calls and which is not thread-safe everywhere (3.11.7)."""

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        with _PARSER:
            return super().make_ir(*args, **kwargs)


_PARSER = Lock()


def compile_variant(variant: Variant) -> Compiled:
    kernel = triton.compile(variant.source, target=EVERY[variant.target], options=variant.options)
    return Compiled(variant, kernel.asm, kernel.metadata.shared)


def compile_all(found: Iterable[Variant]) -> list[Compiled]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_variant, found))


def calls(
    shapes: Sequence[Shape] = SHAPES, dtypes: Sequence[torch.dtype] = DTYPES, resident: bool = False
) -> list[Call]:
    """Returns calls of every module in both layouts, plain and with residual and relu.

    Every shape is in the first dtype, the first shape in all dtypes.

    Args:
        resident: returns resident calls, of the modules that have such kernels.
    """
    return [
        Call(entry, shape, layout, dtype, activation is not None, activation, resident=resident)
        for shape in shapes
        for dtype in (dtypes if shape == shapes[0] else dtypes[:1])
        for layout in catalogue.LAYOUTS
        for entry in (*catalogue.ENTRIES.values(), *catalogue.INFERENCE.values())
        if entry.supports(shape) and (entry.resident or not resident)
        for activation in ((None, "relu") if entry.epilogue else (None,))
    ]


def window_calls(
    windows: Iterable[int] = WINDOWS, heads: Iterable[int] = HEADS, dtypes: Iterable[torch.dtype] = WINDOW_DTYPES
) -> list[Call]:
    """Returns calls of window attention, shifted, with four heads of so many channels."""
    entry = catalogue.ENTRIES["window_attention"]
    return [
        _attention_call(entry, (4 * window, 5 * window), head, dtype, window=window, shift=window // 2)
        for window, head, dtype in itertools.product(windows, heads, dtypes)
    ]


def attention_calls() -> list[Call]:
    """Returns calls of all windows, heads and dtypes, and of maps of all sizes with a bias and without."""
    entry = catalogue.ENTRIES["self_attention"]
    return window_calls(EVERY_WINDOW, EVERY_HEAD, DTYPES) + [
        _attention_call(entry, size, head, dtype, position_bias=bias)
        for size, head, dtype in itertools.product(MAPS, EVERY_HEAD, DTYPES)
        for bias in (None, size)
    ]


def _attention_call(
    entry: catalogue.Entry, size: tuple[int, int], head: int, dtype: torch.dtype, **arguments: Any
) -> Call:
    def with_heads(channels: int) -> dict[str, Any]:
        return {"channels": channels, "heads": 4, **arguments}

    name = f"{entry.name}-{head}" + "".join(f"-{value}" for value in arguments.values())
    return Call(replace(entry, name=name, arguments=with_heads), (4, 4 * head, *size), "channels_last", dtype)


def every_call(shapes: Sequence[Shape] = SHAPES) -> list[Call]:
    """Returns every call, with resident ones and window attention."""
    return [*calls(shapes), *calls(shapes, resident=True), *window_calls()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=EVERY, default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", type=lambda s: tuple(map(int, s.split("x"))), default=SHAPES)
    parser.add_argument("--kernels", default="", help="those alone whose name holds this")
    parser.add_argument("--attention", action="store_true", help="attention alone, in all windows, heads and dtypes")
    options = parser.parse_args()
    found = variants(attention_calls() if options.attention else every_call(options.shapes), options.targets)
    done = compile_all(v for v in found if options.kernels in v.kernel)
    done.sort(key=lambda c: (c.variant.kernel, c.variant.label, c.variant.dtype, c.variant.target))
    faults, rows = [], []
    for c in done:
        faults += c.faults
        r, v = c.resources, c.variant
        rows.append((v.kernel, v.dtype, v.label, v.target, r.registers, r.shared, r.spilled, c.widest_load))
    header = ("kernel", "dtype", "variant", "target", "registers", "shared", "spilled", "widest load")
    show(f"{len(done)} compiled kernels", header, rows)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
