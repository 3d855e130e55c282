"""Times small maps, on which the host's overhead dominates: microseconds a call, eager and fused blocks in turn.

``python -m bench.small_maps`` prints a table for SE, ECA and CBAM at [1, 64, 7, 7], on one thread and on two.
``--ops``, ``--shape`` and ``--threads`` choose others; ``--least`` suits a busy machine. ``--device cuda`` also uses
the host's clock, and stops it when the device has finished a block. ``--backend`` selects the backend of the fused
modules.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import torch

from visattn_fast.backends import use_backend
from visattn_fast.measure.step import DEFAULT_MODES
from visattn_fast.measure.timing import Effort, Run, interleaved
from visattn_fast.report.cases import Case, parse_shape
from visattn_fast.report.contest import Contest

CONTENDERS = ("eager", "fused")
CALLS = 20  # calls in a block
Summary = Callable[[list[float]], float]


def least(seconds: list[float]) -> float:
    """The 5th percentile: on a busy machine, the time of a block that nothing interrupted."""
    return statistics.quantiles(seconds, n=20, method="inclusive")[0]


def block(contest: Contest, contender: str) -> Run:
    """Makes a run of ``CALLS`` calls. It enters ``no_grad`` once, as a model does, not once for each call."""
    wait = torch.cuda.synchronize if contest.device.type == "cuda" else int
    run: Run = contest.run(contender)
    if contest.case.mode == "forward":
        run = functools.partial(contest.fast if contender == "fused" else contest.plain, contest.x)

    def calls() -> None:
        with torch.set_grad_enabled(contest.case.mode == "both"):
            for _ in range(CALLS):
                run()
        wait()

    return calls


def microseconds(case: Case, seconds: float, summary: Summary, device: str = "cpu") -> dict[str, float]:
    """Measures a call of each contender by the host's clock."""
    contest = Contest(case, torch.device(device))
    runs = {name: block(contest, name) for name in CONTENDERS}
    times = interleaved(runs, torch.device("cpu"), Effort(seconds, fewest=50, most=100_000))
    return {name: 1e6 * summary(found) / CALLS for name, found in times.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Microseconds a call on small maps.")
    parser.add_argument("--ops", default="se,eca,cbam", help="modules of the catalogue (default %(default)s)")
    parser.add_argument("--shape", type=parse_shape, default="1x64x7x7", help="NxCxHxW (default %(default)s)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row (default %(default)s)")
    parser.add_argument("--least", action="store_true", help="5th percentiles instead of medians, for a busy machine")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--backend", default="auto", help="backend of the fused modules (default %(default)s)")
    args = parser.parse_args()
    summary: Summary = least if args.least else statistics.median
    print("| module | threads | mode | eager us | fused us | fused / eager |\n|---|---|---|---|---|---|")
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for op in args.ops.split(","):
            for mode in DEFAULT_MODES:
                with use_backend(args.backend):
                    found = microseconds(Case(op, args.shape, mode=mode), args.seconds, summary, args.device)
                eager, fused = (found[name] for name in CONTENDERS)
                print(f"| {op} | {threads} | {mode} | {eager:.1f} | {fused:.1f} | {fused / eager:.2f} |", flush=True)


if __name__ == "__main__":
    main()
