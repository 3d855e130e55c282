"""Runs thousands of random cases of modules, accelerated gates and raw ops: ``make fuzz``.

Each chunk of cases runs in a process of its own, so that a crash costs that chunk alone, and names its case. Finished
chunks are kept in build/fuzz.json: an interrupted run goes on where it stopped, with the same seeds. A failure is
printed as the smallest case that fails; it belongs into ``FAILED`` in tests/fuzz/test_fuzz.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STATE = ROOT / "build" / "fuzz.json"
SHARES = {"modules": 0.6, "accelerated": 0.1, "raw": 0.3}
CHUNK = 250
HOURS = 0.5  # most time for a chunk


def main() -> int:
    parser = argparse.ArgumentParser(description="Random cases against float64.")
    parser.add_argument("--examples", type=int, default=20_000, help="number of cases (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first chunk (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="forget the finished chunks")
    parser.add_argument("--chunk", nargs=3, metavar=("KIND", "SEED", "COUNT"), help="run one chunk in this process")
    args = parser.parse_args()
    if args.chunk:
        return run_chunk(args.chunk[0], int(args.chunk[1]), int(args.chunk[2]))
    return run_all(args.examples, args.seed, args.again)


def chunks(examples: int, seed: int) -> list[tuple[str, int]]:
    """Returns the kind and the seed of each chunk. Kinds take turns, so that an early stop has seen all of them."""
    wanted = {kind: -(-int(examples * share) // CHUNK) for kind, share in SHARES.items()}
    listed = [((i + 0.5) / count, kind, seed + i) for kind, count in wanted.items() for i in range(count)]
    return [(kind, number) for _, kind, number in sorted(listed)]


def run_all(examples: int, seed: int, again: bool) -> int:
    from rich.progress import Progress

    state: dict[str, Any] = {} if again or not STATE.exists() else json.loads(STATE.read_text(encoding="utf-8"))
    listed = chunks(examples, seed)
    STATE.parent.mkdir(exist_ok=True)
    with Progress() as progress:
        task = progress.add_task("cases", total=len(listed) * CHUNK)
        for kind, number in listed:
            key = f"{kind} {number}"
            if key not in state:
                state[key] = in_child(kind, number)
                STATE.write_text(json.dumps(state, indent=1), encoding="utf-8")
                for failure in state[key]["failures"]:
                    progress.print(f"{key}: {failure}", markup=False)
            progress.advance(task, CHUNK)
    ran, failed = Counter[str](), 0
    for kind, number in listed:
        ran[kind] += state[f"{kind} {number}"]["ran"]
        failed += len(state[f"{kind} {number}"]["failures"])
    print(
        ", ".join(f"{count} {kind}" for kind, count in ran.items()), f"= {sum(ran.values())} cases, {failed} failures"
    )
    print(f"seeds {seed} to {max(number for _, number in listed)}; {STATE.relative_to(ROOT)}")
    return 1 if failed else 0


def in_child(kind: str, seed: int) -> dict[str, Any]:
    """Runs a chunk in a process of its own. After a crash the rest of the chunk is left out."""
    command = [sys.executable, "-m", "tools.fuzz", "--chunk", kind, str(seed), str(CHUNK)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HOURS * 3600)
    except subprocess.TimeoutExpired as late:
        return {"ran": 0, "failures": [f"no end after {HOURS} hours: {last(late.stdout)}"]}
    lines = done.stdout.splitlines()
    failures = [line.removeprefix("failed: ") for line in lines if line.startswith("failed: ")]
    if done.returncode not in (0, 1):
        failures.append(f"the process ended with {done.returncode} at {last(done.stdout)} {done.stderr[-2000:]}")
    return {"ran": sum(line.startswith("case: ") for line in lines), "failures": failures}


def last(output: Any) -> str:
    text = output.decode() if isinstance(output, bytes) else output or ""
    return next((line for line in reversed(text.splitlines()) if line.startswith("case: ")), "the start")


def run_chunk(kind: str, seed: int, count: int) -> int:
    """Draws and checks ``count`` cases. Prints each before it runs, and those that fail."""
    import warnings

    import hypothesis
    from hypothesis import strategies as st

    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    warnings.simplefilter("ignore")
    import fuzzing
    from known_modules import MODULES
    from visattn_fast import catalogue
    from visattn_fast.backends import backends
    from visattn_fast.ops.library import OPS

    backends("cpu")
    drawn = {
        "modules": fuzzing.cases(list(catalogue.ENTRIES)),
        "accelerated": fuzzing.cases([name for name in MODULES if name not in catalogue.ENTRIES], st.just(32)),
        "raw": st.tuples(st.sampled_from(list(OPS)), st.integers(0, 1 << 30)),
    }[kind]
    check = {
        "modules": fuzzing.check_module,
        "accelerated": fuzzing.check_accelerated,
        "raw": lambda drawn: fuzzing.check_raw(*drawn),
    }[kind]
    failing: list[Any] = []

    def checked(case: Any) -> None:
        print(f"case: {case}", flush=True)
        failing[:] = [case]
        check(case)

    settings = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(drawn)(checked)))()
    except Exception as error:
        print(f"failed: {failing[0]} {type(error).__name__}: {str(error)[:500]!r}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
