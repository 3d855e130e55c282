"""Writes docs/evidence.md, what is proven of each Triton kernel and where: ``make evidence``.

It runs the parity tests under the interpreter, counts the traffic, compiles every kernel, and reads what ``make
gpu-check`` left in bench/results/. Nothing in the file comes from elsewhere. It takes some ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from visattn_fast import catalogue
from visattn_fast.report.measure import Row
from visattn_fast.report.results import Comparison, geometric_mean

from . import compiled
from .launches import on_triton

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "docs" / "evidence.md"
RESULTS = ROOT / "bench" / "results"
TRAFFIC = """
import json
from tools import launches, traffic
from visattn_fast import catalogue
entries = [e for e in catalogue.ENTRIES.values() if launches.on_triton(e)] + list(catalogue.INFERENCE.values())
accounts = [(c, a) for e in entries for c in traffic.calls(e) for a in traffic.accounts(c)]
print(json.dumps([(a.op, c.layout, c.epilogue, a.declared, a.streamed) for c, a in accounts if not c.sliced]))
"""
INTRODUCTION = """# What is proven of the Triton kernels, and where

Written by `make evidence` from the tests, the tools and `bench/results/`; not edited by hand.
"""


def main() -> int:
    parts = [INTRODUCTION, gpu_section(gpu_results()), parity_section(), traffic_section(), compiled_section()]
    LEDGER.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {LEDGER}")
    return 0


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def gpu_results() -> list[dict[str, Any]]:
    """What GPU checks have found, the oldest first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def gpu_section(results: list[dict[str, Any]]) -> str:
    """Tests and speed on each card, or that there are none yet."""
    text = "\n## On a GPU\n\n`make gpu-check` writes one result per run.\n\n"
    if not results:
        return (
            text + '**Not yet run on a GPU.** No kernel is chosen by itself there; `use_backend("triton")` opts in.\n'
        )
    for result in results:
        machine, tests = result["machine"], result["tests"]
        text += f"### {machine['device_name']}, {result['date'][:10]}, commit {machine['commit']}\n\n"
        text += f"torch {machine['torch']}, triton {machine['triton']}. Tests: {tests['summary']}. "
        text += f"compute-sanitizer: {result['sanitizer']}.\n\n"
        text += table(("module", "mode", "x of copy", "against eager", "against compile"), speeds(result["rows"]))
    return text


def speeds(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Geometric means over sizes and layouts, by module and mode."""
    cases: dict[tuple[str, str], dict[Any, dict[str, Row]]] = {}
    for row in (Row(**r | {"shape": tuple(r["shape"])}) for r in rows):
        cases.setdefault((row.op, row.mode), {}).setdefault(row.case, {})[row.contender] = row
    found = []
    for (op, mode), group in cases.items():
        comparisons = [Comparison(case, contenders) for case, contenders in group.items()]
        means = [geometric_mean([c.rows["fused"].x_of_copy for c in comparisons])]
        means += [geometric_mean([c.speedup(rival) for c in comparisons]) for rival in ("eager", "compile")]
        found.append([op, mode, *("failed" if m is None else f"{m:.2f}" for m in means)])
    return found


def parity_section() -> str:
    """The parity tests under the interpreter, counted by module."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "parity.xml"
        run("-m", "pytest", "tests/test_parity.py", "-q", f"--junitxml={report}", TRITON_INTERPRET="1")
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts = {name: Counter[str]() for name in catalogue.ENTRIES}
    for case in cases:
        module = next(name for name in sorted(counts, key=len, reverse=True) if name in case.attrib["name"])
        counts[module][outcome(case)] += 1
    return parity_table(counts)


def parity_table(counts: dict[str, Counter[str]]) -> str:
    """Of the modules that have kernels; what the tests find of the others says nothing of Triton."""
    without = [name for name in counts if not on_triton(catalogue.ENTRIES[name])]
    rows = [
        (name, *(count[o] for o in ("passed", "failed", "skipped")))
        for name, count in counts.items()
        if name not in without
    ]
    text = "\n## Under Triton's interpreter\n\nValues, every gradient, ties, NaN, strides, determinism: "
    text += "`TRITON_INTERPRET=1 pytest tests/test_parity.py`.\n\n"
    text += table(("module", "passed", "failed", "skipped"), rows)
    return text + (f"\nWithout Triton kernels, and served by PyTorch: {', '.join(without)}.\n" if without else "")


def outcome(case: ElementTree.Element) -> str:
    if case.find("skipped") is not None:
        return "skipped"
    return "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"


def traffic_section() -> str:
    """Declared and counted bytes."""
    accounts = json.loads(run("-c", TRAFFIC, TRITON_INTERPRET="1").splitlines()[-1])
    rows = [
        (op, layout, epilogue, f"{declared:g} N", f"{moved:.2f} N")
        for op, layout, epilogue, declared, moved in accounts
    ]
    text = "\n## Traffic\n\nBytes that loads and stores touch, in multiples N of the bytes of x, small tensors aside: "
    return text + "`make kernels`.\n\n" + table(("op", "layout", "epilogue", "declared", "counted"), rows)


def compiled_section() -> str:
    """By kernel and target, over every shape, dtype, layout and epilogue of `tools.compiled`."""
    found: dict[tuple[str, str], list[compiled.Compiled]] = {}
    for c in compiled.compile_all(compiled.variants(compiled.calls(), compiled.TARGETS)):
        found.setdefault((c.variant.kernel, c.variant.target), []).append(c)
    rows = []
    for (kernel, target), group in sorted(found.items()):
        registers = max(c.resources.registers for c in group)
        spilled = max(c.resources.spilled for c in group)
        widest = max(c.widest_load for c in group)
        rows.append((kernel, target, len(group), registers, spilled, widest, sum(len(c.faults) for c in group)))
    header = ("kernel", "target", "variants", "most registers", "most bytes spilled", "widest load, bytes", "faults")
    text = "\n## Compiled ahead of time\n\nFor each kernel the variants that its launchers choose at realistic sizes: "
    text += "`make kernels` lists them. A fault is a spill, a narrow access to a large tensor, a maximum that loses "
    return text + "NaN, or a 32-bit address.\n\n" + table(header, rows)


def run(*arguments: str, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
