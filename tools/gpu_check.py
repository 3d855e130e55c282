"""Checks in under ten minutes everything that needs a GPU, and writes a JSON to bench/results/: ``make gpu-check``.

It runs the tests that need a GPU or also run on one, then compute-sanitizer, if installed, on small calls, and then
measures speed: eager, torch.compile, Triton, the native CUDA kernels and Triton's resident kernels. What matters most
comes first. Every step has a time limit, and the JSON is written after each step, so that a run that is cut short keeps
its results. A failed test does not stop the other steps; the exit status is that of the tests.

``--rehearse`` takes the same steps without a GPU, on a handful of elements, to show that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from visattn_fast import catalogue
from visattn_fast.backends import backends
from visattn_fast.measure.timing import Effort
from visattn_fast.report import contest
from visattn_fast.report.cases import DEFAULT_CONTENDERS, Case, Shape, matrix
from visattn_fast.report.machine import describe
from visattn_fast.report.rows import Measured, measure

from . import ledger, teams

ROOT = Path(__file__).parents[1]
SHAPES = ((64, 256, 56, 56), (64, 64, 112, 112), (32, 512, 28, 28))  # 103 MB of bfloat16 and less
FIRST = ("se", "eca", "cbam")  # the most common gates; the native kernels serve them
BUDGET = 530.0  # seconds of all steps together; each process may take its grace on top
SHARES = {"tests": 0.5, "sanitizer": 0.1, "rows": 0.4}  # of the time; the last step gets the rest
GRACE = 15.0  # seconds for a process told to stop to print its results
# Groups of tests in the order in which they run, each with its share of the step's time. Tests that need most of a
# card's memory run alone.
ON_GPU = ("-k", "(cuda or test_gpu) and not more_than_2_to")
TESTS = {
    "on a GPU": (
        0.25,
        ("tests/cuda/test_gpu.py", "tests/kernels/test_resident.py", "tests/kernels/test_launches.py", *ON_GPU),
    ),
    "parity": (0.3, ("tests/modules/test_parity.py", "-k", "cuda and not fuzz")),
    "native CUDA": (0.12, ("tests/cuda/test_cuda_kernels.py",)),
    "more of the kernels": (
        0.18,
        (
            "tests/kernels/test_kernels_interpreter.py",
            "tests/ops/test_custom_gates.py",
            "tests/ops/test_gate_ops.py",
            "tests/modules/test_activations_and_biases.py",
            "tests/modules/test_gam.py",
            "tests/kernels/test_flash_attention.py",
            "tests/modules/test_window_attention.py",
            *("-k", "cuda and not fuzz"),
        ),
    ),
    "over 2^31 elements": (0.15, ("tests/cuda/test_gpu.py", "-k", "more_than_2_to")),
}
PYTEST = ("-m", "pytest", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider")
PROCESSES = 14  # share a card's memory
MOST_NAMED = 50  # failures listed for a group
SMALL_RUN = """
import contextlib, sys, torch, visattn_fast as vf
from tools import teams
from visattn_fast import catalogue
device, names = sys.argv[1], sys.argv[2].split(",")
first, rest = names[:3], names[3:]
runs = [("triton", name, False) for name in first]
runs += [("triton", name, True) for name in first if catalogue.ENTRIES[name].resident]
runs += [("cuda", name, False) for name in first if vf.backends(device)["cuda"].available]
runs += [("triton", name, False) for name in rest]
for backend, name, resident in runs:
    entry = catalogue.ENTRIES[name]
    try:
        for layout in catalogue.LAYOUTS:
            with vf.use_backend(backend), teams.resident(device) if resident else contextlib.nullcontext():
                fast = entry.pair(24)[0].to(device)
                x = catalogue.feature_map((2, 24, 9, 7), layout, device=device).requires_grad_()
                fast(x).sum().backward()
                if device != "cpu":
                    torch.cuda.synchronize()
    except Exception as error:
        print("failed", backend, name, "resident" * resident, type(error).__name__, str(error)[:100], flush=True)
    else:
        print("ran", backend, name, "resident" * resident, flush=True)
"""


@dataclass
class Plan:
    """The steps to run, the device, and the cases to measure."""

    device: torch.device
    shapes: Sequence[Shape] = SHAPES
    modules: Sequence[str] = tuple(name for name, entry in catalogue.ENTRIES.items() if entry.epilogue)
    contenders: Sequence[str] = DEFAULT_CONTENDERS
    backend: str = "triton"
    dtype: str = "bfloat16"
    effort: Effort = field(default_factory=lambda: Effort(seconds=0.3, fewest=20))
    steps: Sequence[str] = ("tests", "sanitizer", "rows")
    seconds: float = BUDGET
    rehearsal: bool = False

    def cases(self) -> list[Case]:
        """Lists the cases: the first shape before the others, and for each shape the modules of `FIRST` first."""
        first = [name for name in self.modules if name in FIRST]
        rest = [name for name in self.modules if name not in FIRST]
        order = [(first, self.shapes[:1]), (rest, self.shapes[:1]), (first, self.shapes[1:]), (rest, self.shapes[1:])]
        return [case for names, shapes in order for case in matrix(names, shapes, dtypes=(self.dtype,))]


class Record:
    """The results so far, written to disk after every step."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.start = time.perf_counter()
        now = datetime.datetime.now(datetime.timezone.utc)
        machine = describe(plan.device)
        card = re.sub(r"\W+", "-", machine.device_name).strip("-").lower()
        self.path = folder / f"{now:%Y-%m-%d-%H%M%S}-{card}.json"
        self.found: dict[str, Any] = {
            "date": now.isoformat(timespec="seconds"),
            "machine": asdict(machine),
            "rehearsal": plan.rehearsal,
            "complete": False,
            "tests": {"status": 0, "summary": "not run", "failed": [], "groups": {}},
            "sanitizer": "not run",
            **{key: [] for key in ("rows", *ledger.BESIDE, "left_out")},
        }
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def write(self) -> None:
        self.found["seconds"] = round(self.seconds)
        ledger.write_result(self.path, self.found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", help="device to check (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results; to rehearse, a new one)")
    parser.add_argument("--steps", default="tests,sanitizer,rows", help="steps to run (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="limit of all steps (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="take the steps on the CPU, on a handful of elements")
    args = parser.parse_args(arguments)
    steps = tuple(args.steps.split(","))
    if unknown := set(steps) - set(STEPS):
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; known are {', '.join(STEPS)}")
    if args.rehearse:
        plan = rehearsal(steps, args.seconds)
        return run(plan, args.out or Path(tempfile.mkdtemp(prefix="gpu_check_")))
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA or ROCm device; --rehearse needs none", file=sys.stderr)
        return 2
    return run(Plan(torch.device(args.device), steps=steps, seconds=args.seconds), args.out or ledger.RESULTS)


def rehearsal(steps: Sequence[str], seconds: float = BUDGET) -> Plan:
    """Plans a rehearsal: tests are collected, not run; one module runs on the CPU, without torch.compile."""
    return Plan(
        torch.device("cpu"), ((1, 8, 6, 5),), ("se",), ("eager", "fused"), "auto", "float32", Effort(0.02, 3, 3),
        steps, seconds, rehearsal=True,
    )  # fmt: skip


def run(plan: Plan, folder: Path) -> int:
    """Runs the steps and writes the JSON to ``folder``. Returns the exit status of the tests."""
    record = Record(folder, plan)
    record.write()
    for step in plan.steps:
        left = plan.seconds - record.seconds
        try:
            STEPS[step](record, plan, left if step == plan.steps[-1] else min(SHARES[step] * plan.seconds, left))
        except Exception as error:  # the other steps may go on
            record.found["left_out"].append(f"the rest of {step}: {type(error).__name__}: {str(error)[:200]}")
            record.found["tests"]["status"] = record.found["tests"]["status"] or int(step == "tests")
        record.write()
    record.found["complete"] = True
    record.write()
    tests, sanitizer = (record.found[step] for step in ("tests", "sanitizer"))
    print(ledger.result_section(json.loads(record.path.read_text(encoding="utf-8"))))
    print(f"wrote {record.path} in {record.found['seconds']} s; tests: {tests['summary']}; {sanitizer}")
    return tests["status"]


def run_tests(record: Record, plan: Plan, limit: float) -> None:
    """Runs the groups of `TESTS` in processes of their own. A group may also use the time that earlier groups left."""
    found, end = record.found["tests"], time.perf_counter()
    for name, (share, chosen) in TESTS.items():
        end += share * limit
        command = [sys.executable, *PYTEST, *chosen]
        if plan.rehearsal:
            command.append("--collect-only")
        elif importlib.util.find_spec("xdist") and "2^31" not in name:
            command += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
        status, text = bounded(command, end - time.perf_counter())
        lines = text.strip().splitlines()
        print(*lines[-25:], sep="\n", flush=True)
        ended = next((line.strip("= ") for line in reversed(lines) if re.search(r" in [\d.]+ ?s\b", line)), "")
        summary = (ended or f"no summary, exit status {status}") + (" (cut short)" if status is None else "")
        failed = _failed(lines)
        found["groups"][name] = {"status": status, "summary": summary, "failed": failed}
        found["failed"] += failed
        found["summary"] = "; ".join(f"{group}: {result['summary']}" for group, result in found["groups"].items())
        # 5: no test was collected. A group that was cut short fails if a test had failed by then.
        found["status"] = found["status"] or (int(bool(failed)) if status in (None, 5) else status)
        record.write()


def _failed(lines: Sequence[str]) -> list[str]:
    """Lists the failed tests that pytest's summary names; without a summary, those named while it ran."""
    named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    under_way = (re.search(r"\b(FAILED|ERROR)\b.*?(tests/\S+)|(tests/\S.*) (FAILED|ERROR)\b", line) for line in lines)
    return (named or [" ".join(filter(None, f.groups())) for f in under_way if f])[:MOST_NAMED]


def run_sanitizer(record: Record, plan: Plan, limit: float) -> None:
    """Runs one small call of every op under compute-sanitizer's memcheck."""
    names = plan.modules if plan.rehearsal else [*FIRST, *(n for n in catalogue.ENTRIES if n not in FIRST)]
    command = [sys.executable, "-c", SMALL_RUN, plan.device.type, ",".join(names)]
    tool, environment = _sanitizer(), {}
    if plan.rehearsal:
        environment = {"TRITON_INTERPRET": "1"}
    elif tool is None:
        record.found["sanitizer"] = "compute-sanitizer: not installed"
        return
    else:
        options = ("--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "1")
        command = [tool, *options, *command]
    status, text = bounded(command, limit, **environment)
    record.found["sanitizer"] = f"compute-sanitizer, {_sanitizer_says(status, text)}"


def _sanitizer() -> str | None:
    """Finds compute-sanitizer on the path or beside nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [None, *(os.path.join(home, folder) for home in homes if home for folder in ("bin", "compute-sanitizer"))]
    return next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in places)), None)


def _sanitizer_says(status: int | None, text: str) -> str:
    """Sums up the output: how many small runs ended, the number of errors, and the first errors."""
    lines = text.splitlines()
    ran, failed = (sum(line.startswith(word) for line in lines) for word in ("ran ", "failed "))
    summary = re.search(r"^=+ ERROR SUMMARY: (\d+) error", text, re.MULTILINE)
    first = [line.strip("= ") for line in lines if re.match(r"(=+ .*(Invalid|Error|error:)|failed )", line)][:3]
    count = int(summary[1]) if summary else 0
    said = f"{count} errors" if count else "no error" if status in (0, None) else f"exit status {status}: {lines[-1:]}"
    told = f"{f', {failed} failed' if failed else ''}{', cut short' if status is None else ''}"
    return "; ".join([f"{ran} small runs{told}: {said}", *first])


def bounded(command: Sequence[str], limit: float, **environment: str) -> tuple[int | None, str]:
    """Runs a process. Past its limit it is interrupted, so that it prints its results, and after `GRACE` killed.

    Returns exit status and output; the status is None if the process was cut short. Only this process and its children
    are stopped.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        status: int | None = None
        try:
            status = process.wait(timeout=max(limit, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read()


def run_rows(record: Record, plan: Plan, limit: float) -> None:
    """Measures cases until the time is over, and lists the cases for which none was left."""
    end, native = time.perf_counter() + limit, backends(plan.device)["cuda"]
    if not native.available:
        record.found["left_out"].append(f"native CUDA kernels: {'; '.join(native.missing)}")
    longest = 0.0  # seconds of a case: another as long must end in time
    with _drawn_once(), _given_up_after(limit + 2 * GRACE):
        for case in plan.cases():
            start = time.perf_counter()
            if start + longest > end:
                record.found["left_out"].append(str(case))
                continue
            _measure(record, "rows", case, plan, plan.contenders, plan.backend)
            if native.available and case.op in FIRST:
                _measure(record, "native_cuda", case, plan, ("fused",), "cuda")
            if catalogue.ENTRIES[case.op].resident and (plan.rehearsal or _kept_on_chip(case, plan.device)):
                with teams.resident(plan.device.type):
                    _measure(record, "triton_resident", case, plan, ("fused",), plan.backend)
            longest = max(longest, time.perf_counter() - start)
            record.write()


def _measure(record: Record, key: str, case: Case, plan: Plan, contenders: Iterable[str], backend: str) -> None:
    """Adds the rows of a case, or the error among the cases left out."""
    try:
        measured: Measured = measure(case, plan.device, plan.effort, contenders, backend)
    except Exception as error:  # such as too little memory: the other cases go on
        record.found["left_out"].append(f"{key}: {case}: {type(error).__name__}: {str(error)[:200]}")
        return
    record.found[key] += [asdict(row) for row in measured.rows]
    for row in measured.rows:
        percent = f"{row.percent_of_copy:.0f} % of copy" if row.percent_of_copy else row.failure
        print(f"{key}: {case} {row.contender}: {row.p50_ms or float('nan'):.3f} ms, {percent}", flush=True)


def _kept_on_chip(case: Case, device: torch.device) -> bool:
    """True if a resident kernel takes the case; otherwise the streaming kernel would be measured twice."""
    names = ("experimental.team", "core.layout")
    team, layout = (importlib.import_module(f"visattn_fast.kernels.{name}") for name in names)
    dtype, memory_format = getattr(torch, case.dtype), catalogue.LAYOUTS[case.layout]
    x = torch.empty(case.shape, dtype=dtype, device="meta", memory_format=memory_format)
    return bool(team.fitting_team(layout.canonical(x)[1], x.element_size(), team.multiprocessors(device)))


@contextlib.contextmanager
def _given_up_after(seconds: float) -> Iterator[None]:
    """Prints a traceback and ends the process if the context takes longer: a hanging kernel cannot be interrupted."""
    faulthandler.dump_traceback_later(max(seconds, 1.0), exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _drawn_once() -> Iterator[None]:
    """Draws each map once within the context: drawing on the CPU, in float64, takes longer than the rest of a case."""
    draw = functools.lru_cache(maxsize=2)(
        lambda shape, seed: catalogue.feature_map(shape, dtype=torch.float64, seed=seed)
    )

    def feature_map(shape: Shape, layout: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
        return draw(shape, seed).to(device, dtype).contiguous(memory_format=catalogue.LAYOUTS[layout])

    with mock.patch.object(contest, "feature_map", feature_map):
        yield


STEPS = {"tests": run_tests, "sanitizer": run_sanitizer, "rows": run_rows}


if __name__ == "__main__":
    sys.exit(main())
