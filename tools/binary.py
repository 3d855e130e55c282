"""Reads resources and widths of access of a compiled kernel: from NVIDIA's cubin and PTX, AMD's assembly and LLVM."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton.backends


@dataclass(frozen=True)
class Resources:
    """A thread's registers and the bytes that it spills, and the program's shared memory in bytes."""

    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Access:
    """One load or store of global memory: the arguments that its address comes from, and its bytes per thread."""

    kind: str  # "load" or "store"
    arguments: tuple[int, ...]  # positions among the kernel's arguments
    width: int


def resources(asm: dict, shared: int) -> Resources:
    """Returns the resources of a kernel; ``shared`` bytes come from Triton's metadata."""
    if "cubin" in asm:
        usage = _cuobjdump(asm["cubin"])
        registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        return Resources(registers, shared, stack + local)
    keys = (".vgpr_count", ".private_segment_fixed_size", ".vgpr_spill_count")
    registers, scratch, spills = (int(re.search(rf"{re.escape(key)}: +(\d+)", asm["amdgcn"])[1]) for key in keys)
    return Resources(registers, shared, max(scratch, 4 * spills))


def accesses(asm: dict) -> list[Access]:
    """Returns the loads and stores of a kernel."""
    return list(_ptx_accesses(asm["ptx"]) if "ptx" in asm else _llvm_accesses(asm["llir"]))


@functools.cache
def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout


def _ptx_accesses(ptx: str) -> Iterator[Access]:
    parameters = {name: i for i, name in enumerate(re.findall(r"^\s*\.param .*?(\w+),?$", ptx, re.MULTILINE))}
    pointers = {i for name, i in parameters.items() if re.search(rf"\.param \.u64 .*\b{name}\b", ptx)}
    sources: dict[str, set[str]] = {}  # register -> what it is computed from, over all of its definitions
    for line in ptx.splitlines():
        if found := re.match(
            r"\s*(?:@!?%p\d+ )?(?!st\.|ld\.global|ld\.shared)[a-z][\w.]* *\t?(\{.*?\}|%\w+)[^,]*, *(.*);", line
        ):
            for target in re.findall(r"%\w+", found[1]):
                sources.setdefault(target, set()).update(re.findall(r"%\w+|\w+_param_\d+", found[2]))
    pattern = re.compile(r"\b(ld|st)\.global(?:\.[a-z:]\w*)*?(?:\.v(\d))?\.[a-z]+(\d+) [^[]*\[ *(%\w+)")

    def arguments(address: str) -> tuple[int, ...]:
        return tuple(sorted({parameters[s] for s in _closure(address, sources) if s in parameters} & pointers))

    for kind, vector, bits, address in pattern.findall(ptx):
        yield Access({"ld": "load", "st": "store"}[kind], arguments(address), int(vector or 1) * int(bits) // 8)
    # Loads that a pipelined loop sends past the registers, into shared memory.
    copy = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^[]*\[[^]]*\], *\[ *(%\w+)[^]]*\], *(0x[0-9a-f]+|\d+)")
    for address, width in copy.findall(ptx):
        yield Access("load", arguments(address), int(width, 0))


def _llvm_accesses(llvm: str) -> Iterator[Access]:
    header = re.search(r"^define amdgpu_kernel .*?\((.*)\)", llvm, re.MULTILINE)[1]
    pointers = {
        name: i
        for i, (kind, name) in enumerate(re.findall(r"(ptr|\bi\d+|float) [^%]*(%[\w.]+)", header))
        if kind == "ptr"
    }
    sources: dict[str, set[str]] = {}
    for line in llvm.splitlines():
        if (found := re.match(r"\s*(%[\w.]+) = (.*)", line)) and not re.search(r"\bload\b", found[2]):
            sources[found[1]] = set(re.findall(r"%[\w.]+", found[2]))
    plain = r"(load|store) (?:<(\d+) x )?([a-z]+)(\d*)>?(?: %[\w.]+)?, ptr addrspace\(1\) (%[\w.]+)"
    buffer = r"buffer\.(load|store)\.(?:v(\d+))?([a-z]+)(\d+)\(.*?ptr addrspace\(8\) (%[\w.]+)"
    for kind, count, name, bits, address in (m for p in (plain, buffer) for m in re.findall(p, llvm)):
        found = {pointers[s] for s in _closure(address, sources) if s in pointers}
        width = int(count or 1) * int(bits or _LLVM_BITS[name]) // 8
        yield Access(kind, tuple(sorted(found)), width)


_LLVM_BITS = {"float": 32, "double": 64, "half": 16, "bfloat": 16}


def _closure(start: str, sources: dict[str, set[str]]) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        new = sources.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen
