"""Everything that a GPU can show, in under ten minutes, as one JSON in bench/results/: ``make gpu-check``.

The parity tests of every kernel on the device, the tests that need one (repeatability, graphs, streams, training,
memory), compute-sanitizer on a small run where it is installed, then the benchmarks against eager and torch.compile. A
failure of a test does not keep the rest from running; the exit status is that of the tests.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from visattn_fast import catalogue
from visattn_fast.backends import backends
from visattn_fast.report.cases import matrix
from visattn_fast.report.machine import describe
from visattn_fast.report.measure import measure
from visattn_fast.report.timing import Effort

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SHAPES = ((64, 256, 56, 56), (64, 64, 112, 112), (32, 512, 28, 28))  # 103 MB of bfloat16 and less
BUDGET = 570.0  # seconds
SMALL_RUN = """
import torch, visattn_fast as vf
from visattn_fast import catalogue
native = [("cuda", catalogue.ENTRIES[name]) for name in ("se", "eca", "cbam") if vf.backends("cuda")["cuda"].available]
for backend, entry in [*(("triton", entry) for entry in catalogue.ENTRIES.values()), *native]:
    with vf.use_backend(backend):
        for layout in catalogue.LAYOUTS:
            fast = entry.pair(24)[0].cuda()
            x = catalogue.feature_map((2, 24, 9, 7), layout, device="cuda").requires_grad_()
            fast(x).sum().backward()
torch.cuda.synchronize()
"""


def main() -> int:
    parser = argparse.ArgumentParser("python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA or ROCm device here", file=sys.stderr)
        return 2
    start, device = time.perf_counter(), torch.device(args.device)
    tests = run_tests()
    sanitizer = run_sanitizer()
    rows, left_out = benchmark(device, start + BUDGET)
    native, without = native_benchmark(device, start + BUDGET)
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe(device)),
        "tests": tests,
        "sanitizer": sanitizer,
        "rows": rows,
        "native_cuda": native,
        "left_out": left_out + without,
        "seconds": round(time.perf_counter() - start),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
    path = args.out / f"{found['date'][:10]}-{card}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path} in {found['seconds']} s; tests: {tests['summary']}; compute-sanitizer: {sanitizer}")
    return tests["status"]


def run_tests() -> dict[str, Any]:
    """Parity on the device, and the tests that need one; in parallel processes where pytest-xdist is there."""
    files = ("tests/test_parity.py", "tests/test_gpu.py", "tests/test_cuda_kernels.py")
    command = [sys.executable, "-m", "pytest", *files, "-k", "cuda or test_gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "auto"]
    done = subprocess.run([*command, "-q"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "failed": failed}


def run_sanitizer() -> str:
    """What compute-sanitizer's memcheck says of one small call of every op."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-c", SMALL_RUN]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "not finished in 120 s"
    lines = [line for line in done.stdout.splitlines() if "ERROR" in line or "Error" in line]
    return lines[-1].strip("= ") if lines else f"no summary, exit status {done.returncode}"


def native_benchmark(device: torch.device, end: float) -> tuple[list[dict[str, object]], list[str]]:
    """The same of the modules with native CUDA kernels, or why there are none: `make ext-cuda` builds them."""
    native = backends("cuda")["cuda"]
    if not native.available:
        return [], [f"native CUDA kernels: {'; '.join(native.missing)}"]
    return benchmark(device, end, ("se", "eca", "cbam"), "cuda")


def benchmark(
    device: torch.device, end: float, modules: Sequence[str] = (), backend: str = "triton"
) -> tuple[list[dict[str, object]], list[str]]:
    """The rows of every gated module, in bfloat16, until ``end``; and the cases for which no time was left."""
    gated = modules or [name for name, entry in catalogue.ENTRIES.items() if entry.epilogue]
    rows: list[dict[str, object]] = []
    left_out: list[str] = []
    for case in matrix(gated, SHAPES, dtypes=("bfloat16",)):
        if time.perf_counter() > end:
            left_out.append(str(case))
            continue
        measured = measure(case, device, Effort(seconds=0.5, fewest=20), backend=backend)
        rows += [asdict(row) for row in measured.rows]
        for row in measured.rows:
            percent = f"{row.percent_of_copy:.0f} % of copy" if row.percent_of_copy else row.failure
            print(f"{case} {row.contender}: {row.p50_ms or float('nan'):.3f} ms, {percent}", flush=True)
    return rows, left_out


if __name__ == "__main__":
    sys.exit(main())
