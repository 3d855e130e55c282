"""The clock of the benchmarks: wall time on a CPU, and elsewhere the time of the device, with a cold L2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from visattn_fast.report.timing import EventClock, Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class DeviceTimer:
    """A timer that stands still but for the device time of what `timed` runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = EventClock(DEVICE) if DEVICE.type != "cpu" else None

    def __call__(self) -> float:
        return self.now

    def timed(self, run: Run) -> None:
        assert self.clock is not None
        self.now += self.clock(run)


TIMER = DeviceTimer()
timed = pytest.mark.benchmark(**({} if DEVICE.type == "cpu" else {"timer": TIMER}))


def measure(benchmark: Any, run: Run) -> None:
    """Times ``run`` in a test that is marked as `timed`."""
    if DEVICE.type == "cpu":
        benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=2)
    else:
        benchmark.pedantic(TIMER.timed, args=(run,), rounds=50, iterations=1, warmup_rounds=3)
