"""Runs the tests on every supported pair of Python and torch: ``make matrix``.

Each cell of `CELLS` has a virtual environment in build/matrix/, made once: the cell's torch and triton with what they
need, and all other pins of constraints.txt. Every cell loads the native library of the development environment. The
suite runs as in ``make test``: plain, then under Triton's interpreter. Each run is written to bench/results/matrix.json
as soon as it ends, and the table in README.md is made of that file.

Arguments after ``--`` go to pytest. Such a run is of a part of the tests, and not recorded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visattn_fast.report.machine import Machine, describe

from . import ledger

ROOT = ledger.ROOT
RESULTS = ledger.RESULTS / "matrix.json"
README = ROOT / "README.md"
ENVIRONMENTS = ROOT / "build" / "matrix"
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
BEGIN, END = "<!-- make matrix -->\n", "<!-- end of make matrix -->\n"


class Cell(NamedTuple):
    """The releases of one environment."""

    python: str
    torch: str
    triton: str
    torchvision: str

    @property
    def name(self) -> str:
        return f"py{self.python}-torch{self.torch}"


# torchvision 0.29.2 is the newest. Beside torch 2.15 its operators do not load: tests/support/outside.py declares them.
CELLS = {
    cell.name: cell
    for cell in (
        Cell("3.10", "2.11.0", "3.6.0", "0.26.0"),
        Cell("3.11", "2.13.0", "3.7.1", "0.28.0"),
        Cell("3.12", "2.14.1", "3.8.0", "0.29.1"),
        Cell("3.13", "2.15.0", "3.9.0", "0.29.2"),
    )
}


class Suite(NamedTuple):
    """A run of the tests, as the Makefile's target ``test`` runs it."""

    environment: Mapping[str, str]
    arguments: tuple[str, ...]


SUITES = {
    "plain": Suite({"OMP_WAIT_POLICY": "passive"}, ()),
    "interpreted": Suite({"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}, ("-m", "interpreted", "tests")),
}
# A test that hangs for so many seconds ends its process, and fails.
HANGS = ("-o", "faulthandler_timeout=1200", "-o", "faulthandler_exit_on_timeout=true")
# What every cell must have: the native library, and the native check of layers.
LOADS = """
from visattn_fast import native
from visattn_fast.reference import as_built
raise SystemExit(native.load() or (as_built._native is None and "reference/_layers.so does not load") or None)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.matrix", description=__doc__)
    parser.add_argument("--cell", action="append", choices=CELLS, help="run this cell alone; may be repeated")
    parser.add_argument("--only", choices=SUITES, help="run this suite alone")
    parser.add_argument("--processes", default="2", metavar="N", help="test processes (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table in README.md")
    parser.add_argument("tests", nargs="*", metavar="-- ARGUMENT", help="arguments of pytest, for a part of the tests")
    args = parser.parse_args(arguments)
    failed: list[str] = []
    machine = describe(torch.device("cpu"))  # before results change files of the commit
    for cell in [] if args.table else [CELLS[name] for name in args.cell or CELLS]:
        found = run_cell(cell, machine, args.only, [*args.tests, "--numprocesses", args.processes], not args.tests)
        failed += [f"{cell.name}: {test}" for test in found]
    write_table()
    if failed:
        print("failed:", *failed, sep="\n")
    return int(bool(failed))


def run_cell(cell: Cell, machine: Machine, only: str | None, arguments: Sequence[str], whole: bool) -> list[str]:
    """Runs the suites of a cell, and records them if they are ``whole``.

    Returns what failed: nothing if the machine lacks the interpreter.
    """
    interpreter = find_interpreter(cell.python)
    if interpreter is None:
        say(cell, f"left out: no Python {cell.python} on PATH or in {PYENV}")
        return []
    python = environment(cell, interpreter)
    loads = subprocess.run([python, "-c", LOADS], cwd=ROOT, env=path_of_the_tree(), capture_output=True, text=True)
    if loads.returncode:
        reason = loads.stderr.strip().rpartition("\n")[2]
        say(cell, reason)
        return [reason]
    failed: list[str] = []
    for suite in [only] if only else SUITES:
        found = run_suite(python, SUITES[suite], arguments)
        say(cell, f"{suite}: {summary(found)}, {found['skipped']:,} skipped in {found['seconds'] / 60:.0f} min")
        if whole:
            record(cell, version_of(python), suite, machine, found)
        failed += [f"{suite}: {test}" for test in found["failed"]]
    return failed


def say(cell: Cell, words: str) -> None:
    print(f"{cell.name}: {words}", flush=True)


def find_interpreter(version: str) -> str | None:
    """Returns Python ``version`` from PATH, or the newest such of pyenv; None if there is none that runs."""
    installed = sorted(PYENV.glob(f"{version}.*/bin/python"), key=lambda path: int(path.parts[-3].rpartition(".")[2]))
    for found in (shutil.which(f"python{version}"), *map(str, reversed(installed))):
        # pyenv's shims are on PATH, too. They fail if another version is chosen.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


def requirements(cell: Cell) -> str:
    """Returns the pins that a cell takes from constraints.txt, and its torchvision."""
    own = ("torch", "triton", "torchvision")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [pin for pin in pins if not pin.startswith("#") and pin.partition("==")[0] not in own]
    return "\n".join([*kept, f"torchvision=={cell.torchvision}", ""])


def environment(cell: Cell, interpreter: str) -> str:
    """Makes the virtual environment of a cell, unless it is there with the same pins. Returns its interpreter."""
    folder, pins = ENVIRONMENTS / cell.name, requirements(cell)
    python, done = str(folder / "bin" / "python"), folder / "requirements.txt"
    base = f"torch=={cell.torch}", f"triton=={cell.triton}"
    wanted = "\n".join([*base, pins])
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    say(cell, f"installing into {folder.relative_to(ROOT)}")
    subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *base], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(pins)
        file.flush()
        subprocess.run([*install, "--no-deps", "--requirement", file.name], check=True)
    done.write_text(wanted, encoding="utf-8")
    return python


def path_of_the_tree(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def version_of(python: str) -> str:
    command = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_suite(python: str, suite: Suite, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the tests. Returns their counts by outcome, and the names of those that failed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *HANGS, *suite.arguments, *arguments]
        status = subprocess.run(command, cwd=ROOT, env=path_of_the_tree(**suite.environment)).returncode
        found = outcomes(report)
    if status not in (0, 1) or (status and not found["failed"]):
        found["failed"].append(f"pytest ended with exit status {status}")
    return {**found, "seconds": round(time.perf_counter() - start)}


def outcomes(report: Path) -> dict[str, Any]:
    """Counts the tests of a JUnit report by outcome, and names those that failed."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    found = [(ledger.outcome(case), case) for case in cases]
    counts = {outcome: sum(o == outcome for o, _ in found) for outcome in ("passed", "skipped")}
    return {**counts, "failed": [name_of(case) for outcome, case in found if outcome == "failed"]}


def name_of(case: ElementTree.Element) -> str:
    return f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}"


def summary(found: Mapping[str, Any]) -> str:
    """Sums up a suite: what passed, and what failed if anything did."""
    failed = f", **{len(found['failed'])} failed**" if found["failed"] else ""
    return f"{found['passed']:,} passed{failed}"


def results() -> dict[str, Any]:
    """Reads the cells that have run, by name."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def record(cell: Cell, python: str, suite: str, machine: Machine, found: Mapping[str, Any]) -> None:
    """Writes the run of a suite beside what is known of all cells."""
    known = results()
    suites = known.get(cell.name, {}).get("suites", {})
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    suites[suite] = {"date": now, "commit": machine.commit, "system": machine.system, "cpu": machine.cpu, **found}
    known[cell.name] = {**cell._asdict(), "python": python, "suites": suites}
    ledger.write_result(RESULTS, {name: known[name] for name in CELLS if name in known})
    write_table()


def table() -> str:
    """Tabulates all cells; of those that have run, what passed."""
    known, rows = results(), []
    for cell in CELLS.values():
        suites = (known.get(cell.name, {}).get("suites", {}).get(name) for name in SUITES)
        rows.append((*cell[:3], *(summary(s) if s else "not run yet" for s in suites)))
    return ledger.table(("Python", "torch", "triton", "tests", "under Triton's interpreter"), rows)


def write_table() -> None:
    """Writes the table in README.md."""
    text = README.read_text(encoding="utf-8")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    README.write_text(re.sub(pattern, lambda _: BEGIN + table() + END, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
