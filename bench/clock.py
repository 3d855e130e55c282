"""Times benchmarks with the report's clock: wall time on a CPU, device time with a cold L2 elsewhere.

`measure` also records what puts a time in context: device, versions, the time of a copy, and bytes if known.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from visattn_fast.measure.timing import Effort, EventClock, Run, WallClock, interleaved, quantiles
from visattn_fast.report.machine import describe
from visattn_fast.report.rows import copy_share

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, WARMUP = (15, 2) if DEVICE.type == "cpu" else (50, 3)
_COPY_EFFORT = Effort(seconds=0.2, fewest=5, most=20)


class Timer:
    """A timer for pytest-benchmark that advances only by the time of `timed` runs, by the report's clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = WallClock() if DEVICE.type == "cpu" else EventClock(DEVICE)

    def __call__(self) -> float:
        return self.now

    def timed(self, run: Run) -> None:
        """Runs and advances by the time that it took."""
        self.now += self.clock(run)


TIMER = Timer()
timed = pytest.mark.benchmark(timer=TIMER)


def measure(benchmark: Any, run: Run, group: str, x: Tensor, moved: int | None = None, **facts: Any) -> None:
    """Times ``run`` in a test marked as `timed`.

    Args:
        group: name shared by the benchmarks to compare with each other.
        x: the input; a copy of it is timed as well.
        moved: bytes that ``run`` must move, if known.
        facts: more entries for ``extra_info``.
    """
    benchmark.group = group
    copy = copy_seconds(x.detach())
    benchmark.extra_info.update(machine(), copy_ms=copy * 1e3, x_bytes=x.nbytes, bytes=moved, **facts)
    benchmark.pedantic(TIMER.timed, args=(run,), rounds=ROUNDS, iterations=1, warmup_rounds=WARMUP)
    if benchmark.stats is not None:  # it is None under --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info["x_of_copy"] = median / copy
        if moved:
            benchmark.extra_info["percent_of_copy"] = copy_share(moved, median, x.nbytes, copy)


def copy_seconds(x: Tensor) -> float:
    """Measures the median time of a copy of x, in seconds."""
    out = torch.empty_like(x)
    return quantiles(interleaved({"copy": lambda: out.copy_(x)}, DEVICE, _COPY_EFFORT)["copy"])[1]


@functools.cache
def machine() -> dict[str, Any]:
    """Describes the device and the versions."""
    return dataclasses.asdict(describe(DEVICE))
