"""Compiles the native CUDA kernels without a GPU, and checks the objects: `python -m tools.cuda_objects`.

No kernel may spill. Kernels that move maps 16 bytes at a time must have 16-byte loads and stores of global memory in
their machine code, or bulk copies instead of the loads. Needs nvcc; triton's cuobjdump reads the machine code.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton.backends
from torch.utils.cpp_extension import include_paths

from .table import show

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# sm_90a adds Hopper's own instructions. The kernels use none of them: instruction by instruction, the code equals that
# for sm_90, which setup.py builds by default.
TARGETS = ("sm_80", "sm_90a", "sm_100")
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]
FLAGS += ["--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
_ACCESSES = {0: "wide rows", 1: "ragged", 2: "narrow"}  # csrc/common/geometry.h
_KERNEL = re.compile(r"\d(channel_scale|cbam)_kernelILb([01])ELi([012])ELb([01])E(.*)")


class Loop(NamedTuple):
    """A loop over packs of 16 bytes.

    ``instructions`` excludes the loops inside it, which only NaN enters. Backward loads two packs for each that it
    stores, x and grad; some loops also load coefficients.
    """

    instructions: int
    loads: int  # of 16 bytes
    stores: int  # of 16 bytes
    divisions: int  # of integers, in each turn


@dataclass(frozen=True)
class Compiled:
    """A kernel of an object: ptxas's report, and the instructions that move data."""

    symbol: str
    target: str
    registers: int
    spilled: int
    instructions: Counter[str]
    loops: tuple[Loop, ...] = ()

    @property
    def variant(self) -> tuple[str, ...] | None:
        """Kernel, direction, element type, layout, access and variant; None for the small kernels."""
        found = _KERNEL.search(self.symbol)
        if found is None:
            return None
        kernel, nhwc, access, cluster, rest = found.groups()
        direction = "backward" if "Backward" in rest else "forward"
        dtype = next((name for name in ("BFloat16", "Half") if name in rest), "float")
        layout = "channels_last" if nhwc == "1" else "nchw"
        variant = "cluster" if cluster == "1" else "semaphore"
        return kernel, direction, dtype, layout, _ACCESSES[int(access)], variant

    @property
    def name(self) -> str:
        return " ".join(self.variant or (re.sub(r"^_ZN.*\d([a-z_]+_kernel).*", r"\1", self.symbol),))

    @property
    def empty(self) -> bool:
        """True for cluster kernels before sm_90: never launched, they only trap."""
        return "cluster" in (self.variant or ()) and self.target == "sm_80"

    @property
    def faults(self) -> list[str]:
        found = [f"spills {self.spilled} bytes"] if self.spilled else []
        if self.variant and not self.empty and "narrow" not in self.variant:
            loads = "UBLKCP" if "cluster" in self.variant and "forward" in self.variant else "LDG.128"
            needed = [loads] if "wide rows" in self.variant else []
            needed += ["UBLKCP"] * ("cluster" in self.variant) + ["STG.128"]
            found += [f"has no {name}" for name in dict.fromkeys(needed) if not self.instructions[name]]
        if "wide rows" in (self.variant or ()) and any(loop.divisions for loop in self.loops):
            found.append("divides in a loop over packs")
        return [f"{self.name} for {self.target}: {fault}" for fault in found]


def why_not() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    return None if nvcc() else "needs nvcc: set CUDA_HOME, or put it on the path"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def compile_source(source: Path, target: str, *flags: str) -> list[Compiled]:
    """Compiles the kernels of a source for one target, without the host's code."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.cubin"
        number = target.removeprefix("sm_")
        command = [str(nvcc()), *FLAGS, *flags, "-gencode", f"arch=compute_{number},code={target}"]
        command += [f"-I{path}" for path in include_paths()]
        done = subprocess.run([*command, "-cubin", str(source), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc cannot compile {source.name} for {target}:\n{done.stderr}")
        machine_code = dict(instructions(made))
    return [
        Compiled(symbol, target, registers, spilled, *machine_code.get(symbol, (Counter(), ())))
        for symbol, registers, spilled in ptxas_report(done.stderr)
    ]


def compile_all(sources: Iterable[Path] = SOURCES, targets: Sequence[str] = TARGETS, *flags: str) -> list[Compiled]:
    """Compiles the kernels of sources that are launched, on all cores; sorted by name and target."""
    pairs = itertools.product(sources, targets)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda pair: compile_source(*pair, *flags), pairs)
        kernels = [kernel for part in parts for kernel in part if not kernel.empty]
    return sorted(kernels, key=lambda k: (k.name, k.target))


def ptxas_report(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields (symbol, registers, bytes spilled) for each kernel in the output of ``-Xptxas -v``."""
    for part in text.split("Compiling entry function")[1:]:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spills is None or registers is None:
            raise RuntimeError(f"not a report of ptxas: {part[:200]}")
        yield part.split("'")[1], int(registers[1]), max(map(int, spills.groups()))


def instructions(made: Path) -> Iterator[tuple[str, tuple[Counter[str], tuple[Loop, ...]]]]:
    """Yields (symbol, (counts of LDG.128, STG.128, UBLKCP, ..., loops over packs)) for each kernel in a cubin."""
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", str(made)], capture_output=True, text=True, check=True).stdout
    for part in text.split("Function : ")[1:]:
        found = re.findall(r"\b(LDG|STG|LDS|STS|UBLKCP|LDL|STL)((?:\.\w+)*) ", part)
        counted = Counter(f"{name}.128" if ".128" in rest else name for name, rest in found)
        yield part.split()[0], (counted, tuple(loops(part)))


def loops(sass: str) -> Iterator[Loop]:
    """Yields a kernel's loops over packs: innermost loops, and others with four or more loads of their own."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", sass)]
    index = {at: i for i, (at, _) in enumerate(lines)}
    jumps = ((re.search(r"\bBRA\S* (?:\S+, )*`?\(?0x([0-9a-f]+)", text), i) for i, (_, text) in enumerate(lines))
    spans = {(index[int(to[1], 16)], i) for to, i in jumps if to and int(to[1], 16) <= lines[i][0]}
    for first, last in sorted(spans):
        inside = [s for s in spans if s != (first, last) and first <= s[0] and s[1] <= last]
        own = [lines[i][1] for i in range(first, last + 1) if not any(a <= i <= b for a, b in inside)]
        loads, stores, divisions = (
            sum(bool(re.search(name, text)) for text in own) for name in (r"\bLD\S*\.128", r"\bSTG\S*\.128", r"\bI2F")
        )
        if not any("BAR" in text for text in own) and (loads >= 4 or (loads and not inside)):
            yield Loop(len(own), loads, stores, 0 if inside else divisions)


def show_loops(targets: Sequence[str]) -> int:
    chosen = [s for s in SOURCES if s.stem.endswith("bfloat16")]
    kernels = [k for k in compile_all(chosen, targets, "-DVISATTN_FEW_KERNELS") if k.variant]
    rows = [(k.name, k.target, *loop) for k in kernels for loop in k.loops]
    header = ("kernel", "target", *Loop._fields)
    show("loops over packs of 16 bytes", header, rows)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument(
        "--loops", action="store_true", help="show the instructions a pack in the loops of bfloat16, wide rows"
    )
    options = parser.parse_args()
    if why := why_not():
        print(f"cuda_objects: {why}", file=sys.stderr)
        return 0
    if options.loops:
        return show_loops(options.targets)
    kernels = compile_all(SOURCES, options.targets)
    rows = [
        (k.name, k.target, k.registers, k.spilled, *(k.instructions[i] for i in ("LDG.128", "STG.128", "UBLKCP")))
        for k in kernels
    ]
    header = ("kernel", "target", "registers", "spilled", "16-byte loads", "16-byte stores", "bulk copies")
    show(f"{len(rows)} native CUDA kernels, torch {torch.__version__}", header, rows)
    faults = [fault for kernel in kernels for fault in kernel.faults]
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
