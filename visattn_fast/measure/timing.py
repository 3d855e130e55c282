"""Timing: runs interleaved in one process, on the clock of their device."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
_LARGEST_CACHE = 256 * 2**20  # bytes; more than any GPU's L2
_MOST_FLUSHES = 50


@dataclass(frozen=True)
class Prepared:
    """A run in two halves: ``prepare`` runs off the clock and returns the half that is timed."""

    prepare: Callable[[], Run]

    def __call__(self) -> Any:
        return self.prepare()()


def ready(run: Run) -> Run:
    """Runs the half that is off the clock, if there is one; returns the half that is timed."""
    return run.prepare() if isinstance(run, Prepared) else run


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``seconds``, but at least ``fewest`` rounds and at most ``most``."""

    seconds: float = 2.0
    fewest: int = 15
    most: int = 200


def interleaved(runs: dict[str, Run], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Times every run once per round, in an order shuffled each round. Returns the seconds of each run, by name.

    The results of a run are freed after the clock has stopped; what the run itself frees is on the clock.
    """
    clock = WallClock() if device.type == "cpu" else EventClock(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(2):
        for run in runs.values():
            clock(run)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + effort.seconds
        while len(seconds[order[0]]) < effort.fewest or (
            time.perf_counter() < end and len(seconds[order[0]]) < effort.most
        ):
            shuffle(order)
            for name in order:
                seconds[name].append(clock(runs[name]))
    finally:
        if collecting:
            gc.enable()
    return seconds


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Returns the 20th, 50th and 80th percentiles."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


class WallClock:
    """Times a run on the CPU."""

    def __call__(self, run: Run) -> float:
        timed = ready(run)
        start = time.perf_counter()
        result = timed()
        seconds = time.perf_counter() - start
        del result
        return seconds


class EventClock:
    """Times a run by device events, from a cold L2 cache.

    Before the run it writes a buffer larger than any L2, often enough to keep the device busy while the host launches
    the run: the events then enclose the work of the device, not the launches of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.module = torch.get_device_module(device)
        self.buffer = torch.empty(_LARGEST_CACHE, dtype=torch.int8, device=device)
        self.launch_seconds: dict[Run, float] = {}  # the host's time to launch each run, the last one
        self.buffer.zero_()
        self.flush_seconds = self._between_events(self.buffer.zero_)[0]

    def __call__(self, run: Run) -> float:
        timed = ready(run)
        flushes = 1 + math.ceil(self.launch_seconds.get(run, 0.0) / self.flush_seconds)
        for _ in range(min(flushes, _MOST_FLUSHES)):
            self.buffer.zero_()
        seconds, self.launch_seconds[run] = self._between_events(timed)
        return seconds

    def _between_events(self, run: Run) -> tuple[float, float]:
        """Returns the seconds on the device, and on the host until everything was launched."""
        start, end = (self.module.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        result = run()
        launched = time.perf_counter() - began
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) * 1e-3, launched
