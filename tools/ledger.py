"""Writes docs/internals/evidence.md: what is proven of each GPU kernel, and where. Run it with ``make evidence``.

It runs the parity tests under the interpreter, counts the traffic, and compiles every Triton kernel. With nvcc it also
compiles the native kernels, and with a C++ compiler counts their traffic in the emulation. It reads the results of
``make gpu-check`` from bench/results/. The file has no other source. It takes some ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from visattn_fast import catalogue
from visattn_fast.report.results import Comparison, geometric_mean
from visattn_fast.report.rows import Row

from . import compiled, cuda_objects, emulation
from .launches import on_triton

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "docs" / "internals" / "evidence.md"
RESULTS = ROOT / "bench" / "results"
TRAFFIC = """
import json
from tools import launches, traffic
from visattn_fast import catalogue
entries = [e for e in catalogue.ENTRIES.values() if launches.on_triton(e)] + list(catalogue.INFERENCE.values())
accounts = [(c, a) for e in entries for c in traffic.calls(e) for a in traffic.accounts(c)]
rows = [(c, a, c.layout + ", resident" * c.resident) for c, a in accounts if not c.sliced]
print(json.dumps([(a.op, layout, c.epilogue, a.declared, a.streamed) for c, a, layout in rows]))
"""
# Kernels that a GPU check measures beside the streaming ones: key of their rows -> name.
BESIDE = {"native_cuda": "native CUDA", "triton_resident": "Triton, resident"}
INTRODUCTION = """# What is proven of the GPU kernels, and where

`make evidence` writes this file from the tests, the tools and `bench/results/`. Do not edit it by hand.
"""


def main() -> int:
    parts = [INTRODUCTION, gpu_section(gpu_results()), parity_section(), traffic_section(), compiled_section()]
    parts += [emulation_section(), native_section()]
    LEDGER.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {LEDGER}")
    return 0


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def section(title: str, *sentences: str) -> str:
    return f"\n## {title}\n\n{' '.join(sentences)}\n\n"


def gpu_results() -> list[dict[str, Any]]:
    """Reads the results of GPU checks, the oldest first, without rehearsals. Their names begin with the date."""
    results = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("[0-9]*.json")))
    return [result for result in results if not result["rehearsal"]]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a JSON in one piece, so that no reader sees a part of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(result, file, indent=1)
    Path(file.name).replace(path)


def gpu_section(results: list[dict[str, Any]]) -> str:
    """Reports tests and speed on each card, or says that there are none yet."""
    text = section("On a GPU", "Each run of `make gpu-check` writes one result.")
    if not results:
        return text + '**Not yet run on a GPU.** `auto` chooses no kernel there; `use_backend("triton")` opts in.\n'
    return text + "\n".join(map(result_section, results))


def result_section(result: dict[str, Any]) -> str:
    """Reports one GPU check."""
    machine, tests = result["machine"], result["tests"]
    text = f"### {machine['device_name']}, {result['date'][:10]}, commit {machine['commit']}\n\n"
    text += "A rehearsal: nothing was measured.\n\n" if result["rehearsal"] else ""
    text += "" if result["complete"] else "Cut short: only the results until then.\n\n"
    text += (
        f"torch {machine['torch']}, triton {machine['triton']}. Tests: {tests['summary']}. {result['sanitizer']}.\n\n"
    )
    header = ("module", "mode", "cases", "time / copy", "vs eager", "vs compile")
    text += "Triton's streaming kernels, geometric means over sizes and layouts. vs eager, vs compile: the rival's time"
    text += " over ours; above 1 ours is faster.\n\n" + table(header, speeds(result["rows"]))
    if any(result[key] for key in BESIDE):
        text += "\nKernels that keep an image on the chip, and streaming kernels in the same cases, time / copy:\n\n"
        text += table(("kernels", "module", "mode", "cases", "resident", "streaming"), resident_speeds(result))
    if result["left_out"]:
        text += f"\nLeft out: {len(result['left_out'])}; the first: {result['left_out'][0]}.\n"
    return text


Cases = dict[tuple[str, str], dict[Any, dict[str, Row]]]


def cases_of(rows: list[dict[str, Any]]) -> Cases:
    """Groups rows by module and mode, then by case, then by contender."""
    cases: Cases = {}
    for row in (Row(**r | {"shape": tuple(r["shape"])}) for r in rows):
        cases.setdefault((row.op, row.mode), {}).setdefault(row.case, {})[row.contender] = row
    return cases


def speeds(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Returns geometric means over sizes and layouts, by module and mode."""
    found = []
    for (op, mode), group in cases_of(rows).items():
        comparisons = [Comparison(case, contenders) for case, contenders in group.items()]
        means = [geometric_mean([c.rows["fused"].x_of_copy for c in comparisons])]
        means += [geometric_mean([c.speedup(rival) for c in comparisons]) for rival in ("eager", "compile")]
        found.append([op, mode, str(len(group)), *map(figure, means)])
    return found


def resident_speeds(result: dict[str, Any]) -> list[list[str]]:
    """Returns geometric means of the kernels of `BESIDE`, and of the streaming kernels in the same cases."""
    streamed, found = cases_of(result["rows"]), []
    for key, name in BESIDE.items():
        for (op, mode), group in cases_of(result[key]).items():
            beside = [streamed.get((op, mode), {}).get(case, {}) for case in group]
            ours, theirs = (
                geometric_mean([c["fused"].x_of_copy if "fused" in c else None for c in cases])
                for cases in (group.values(), beside)
            )
            found.append([name, op, mode, str(len(group)), figure(ours), figure(theirs)])
    return found


def figure(mean: float | None) -> str:
    return "none" if mean is None else f"{mean:.2f}"


def parity_section() -> str:
    """Counts the parity tests under the interpreter by module, and the tests of the resident kernels."""
    counts = {name: Counter[str]() for name in catalogue.ENTRIES}
    for case in interpreted("tests/modules/test_parity.py"):
        module = next(part for part in re.split(r"[\[\]-]", case.attrib["name"]) if part in counts)
        counts[module][outcome(case)] += 1
    resident = Counter(outcome(case) for case in interpreted("tests/kernels/test_resident.py"))
    return parity_table(counts) + resident_line(resident)


def interpreted(tests: str) -> list[ElementTree.Element]:
    """Runs the tests of a file under the interpreter. Returns its test cases."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "cases.xml"
        run("-m", "pytest", tests, "-q", f"--junitxml={report}", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        return list(ElementTree.parse(report).iter("testcase"))


def resident_line(counts: Counter[str]) -> str:
    names = " and ".join(entry.name for entry in catalogue.ENTRIES.values() if entry.resident)
    text = f"\nThe resident kernels of {names}, which keep an image on the chip, with programs run in random order:"
    text += f" {counts['passed']} passed, {counts['failed']} failed. Command: `TRITON_INTERPRET=1 pytest"
    return text + " tests/kernels/test_resident.py`. Its other tests need a GPU, or compile.\n"


def parity_table(counts: dict[str, Counter[str]]) -> str:
    """Tabulates the tests of modules with Triton kernels; those of other modules prove nothing about Triton."""
    without = [name for name in counts if not on_triton(catalogue.ENTRIES[name])]
    rows = [
        (name, *(count[o] for o in ("passed", "failed", "skipped")))
        for name, count in counts.items()
        if name not in without
    ]
    text = section(
        "Under Triton's interpreter",
        "Tests of values, every gradient, ties, NaN, strides and determinism.",
        "Command: `TRITON_INTERPRET=1 pytest tests/modules/test_parity.py`.",
    )
    text += table(("module", "passed", "failed", "skipped"), rows)
    return text + (f"\nWithout Triton kernels, served by PyTorch: {', '.join(without)}.\n" if without else "")


def outcome(case: ElementTree.Element) -> str:
    if case.find("skipped") is not None:
        return "skipped"
    return "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"


def traffic_section() -> str:
    """Tabulates the declared and the counted bytes of every op."""
    accounts = json.loads(run("-c", TRAFFIC, TRITON_INTERPRET="1").splitlines()[-1])
    rows = [
        (op, layout, epilogue, f"{declared:g} N", f"{moved:.2f} N")
        for op, layout, epilogue, declared, moved in accounts
    ]
    text = section(
        "Traffic",
        "Bytes that loads and stores touch, in multiples N of the bytes of x, without small tensors.",
        "Command: `make kernels`.",
    )
    return text + table(("op", "layout", "epilogue", "declared", "counted"), rows)


def compiled_section() -> str:
    """Tabulates kernels and targets, over every shape, dtype, layout and epilogue of `tools.compiled`."""
    found: dict[tuple[str, str], list[compiled.Compiled]] = {}
    for c in compiled.compile_all(compiled.variants(compiled.every_call(), compiled.TARGETS)):
        found.setdefault((c.variant.kernel, c.variant.target), []).append(c)
    rows = []
    for (kernel, target), group in sorted(found.items()):
        registers = max(c.resources.registers for c in group)
        spilled = max(c.resources.spilled for c in group)
        widest = max(c.widest_load for c in group)
        rows.append((kernel, target, len(group), registers, spilled, widest, sum(len(c.faults) for c in group)))
    header = ("kernel", "target", "variants", "most registers", "most bytes spilled", "widest load, bytes", "faults")
    text = section(
        "Compiled ahead of time",
        "The variants of each kernel that its launchers choose at realistic sizes; `make kernels` lists them.",
        "A fault is a spill, a narrow access to a large tensor, a maximum that loses NaN, or a 32-bit address.",
    )
    return text + table(header, rows)


def emulation_section() -> str:
    """Tabulates the bytes that the native kernels move in the emulation, or says why nothing was emulated."""
    text = section(
        "The native CUDA kernels, emulated",
        "The GPU's code, run thread by thread on the CPU, on small devices.",
        "Bytes are in multiples of the bytes of x, and include what comes from the L2 cache.",
        "Commands: `python -m tools.emulation`, `pytest tests/cuda/test_cuda_emulation.py`.",
    )
    if why := emulation.why_not():
        return text + f"Not emulated on the machine that wrote this: {why}.\n"
    rows, faults = emulation.counts()
    return text + table(emulation.HEADER, rows) + f"\nFaults (races, reads of unwritten memory, ...): {len(faults)}.\n"


def native_section() -> str:
    """Tabulates the compiled native kernels by kernel, variant and target, or says why nothing was compiled."""
    text = section(
        "The native CUDA kernels, compiled",
        "A fault is a spill, or a map that is not moved 16 bytes at a time.",
        "Command: `python -m tools.cuda_objects`.",
    )
    if why := cuda_objects.why_not():
        return text + f"Not compiled on the machine that wrote this: {why}.\n"
    return text + native_table(cuda_objects.compile_all())


def native_table(kernels: Iterable[cuda_objects.Compiled]) -> str:
    """Tabulates kernels; a row joins the element types, layouts and accesses of a kernel."""
    found: dict[tuple[str, str, str], list[cuda_objects.Compiled]] = {}
    for k in kernels:
        parts = k.variant or (k.name, "", "")
        found.setdefault((" ".join(parts[:2]).strip(), parts[-1], k.target), []).append(k)
    rows = [
        (
            *key,
            len(group),
            max(k.registers for k in group),
            max(k.spilled for k in group),
            sum(len(k.faults) for k in group),
        )
        for key, group in sorted(found.items())
    ]
    return table(("kernel", "variant", "target", "variants", "most registers", "most bytes spilled", "faults"), rows)


def run(*arguments: str, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
