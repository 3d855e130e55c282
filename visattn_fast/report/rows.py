"""Measures the contenders of a case, a row for each: errors first, then memory, then time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import select, use_backend
from ..catalogue import ENTRIES
from ..measure.accuracy import Oracle
from ..measure.step import TRAINING, Results
from ..measure.timing import Effort, interleaved, quantiles
from .cases import CONTENDERS, DEFAULT_CONTENDERS, Case, Shape
from .contest import Contest
from .launch_counts import compiled, dispatched


@dataclass(frozen=True)
class Row:
    """The figures of one contender in one case; ``"copy"`` is ``out.copy_(x)``, timed between the others.

    Attributes:
        x_bytes: bytes of the input.
        backend: the backend that served a fused contender.
        p20_ms, p50_ms, p80_ms: percentiles of the times over ``rounds``.
        bytes: bytes that a streaming kernel must move for this module, the same for every contender, so that rates
            compare; for the copy the bytes that it moves itself; None if PyTorch alone serves the module.
        x_of_copy: the median time, in multiples of the copy's.
        gb_per_s: ``bytes`` over the median time.
        percent_of_copy: ``gb_per_s``, in percent of the copy's.
        saved_bytes: bytes kept between forward and backward.
        peak_bytes: peak of the bytes allocated.
        kernels: ops dispatched; for a compiled contender, calls of kernels and of ops in the generated code.
        error: the largest error of any result against float64, relative to that result's largest value.
        compile_s: seconds of the first call of a compiled contender.
        cold: True if no cache held a part of what that call compiled.
        failure: why the contender has no figures; empty if it has.
    """

    op: str
    shape: Shape
    dtype: str
    layout: str
    mode: str
    contender: str
    x_bytes: int
    backend: str = ""
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    bytes: int | None = None
    x_of_copy: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    kernels: int | None = None
    error: float | None = None
    compile_s: float | None = None
    cold: bool | None = None
    failure: str = ""

    @property
    def case(self) -> Case:
        """The case that was measured."""
        return Case(self.op, self.shape, self.dtype, self.layout, self.mode)

    @property
    def moved(self) -> float | None:
        """``bytes``, or the same from rate and time: the first format of the report did not hold ``bytes``."""
        if self.bytes is None and self.gb_per_s and self.p50_ms:
            return self.gb_per_s * self.p50_ms * 1e6
        return self.bytes

    @property
    def saved_x(self) -> float | None:
        """``saved_bytes`` in multiples of the bytes of x."""
        return None if self.saved_bytes is None else self.saved_bytes / self.x_bytes

    @property
    def peak_x(self) -> float | None:
        """``peak_bytes`` in multiples of the bytes of x."""
        return None if self.peak_bytes is None else self.peak_bytes / self.x_bytes

    def __str__(self) -> str:
        return f"{self.case} {self.contender}" + (f": {self.failure}" if self.failure else "")


@dataclass(frozen=True)
class Measured:
    """The rows of a case, and every time behind them, in seconds, by contender."""

    rows: list[Row]
    seconds: dict[str, list[float]]


def measure(
    case: Case,
    device: torch.device,
    effort: Effort,
    contenders: Iterable[str] = DEFAULT_CONTENDERS,
    backend: str = "auto",
    cold: bool = False,
) -> Measured:
    """Measures the contenders of a case. A contender that fails, or whose results are wrong, gets a row that says so.

    Args:
        contenders: names of `CONTENDERS`; another library's contender is left out if `Contest.has` is false.
        cold: compile without on-disk caches.
    """
    with use_backend(backend):
        contest = Contest(case, device)
        runs: dict[str, Callable[[], Results]] = {"copy": contest.run("copy")}
        found: dict[str, dict[str, Any]] = {"copy": {}}
        oracle = contest.oracle()
        eager = contest.errors(contest.run("eager")(), oracle)
        for name in filter(contest.has, contenders):
            try:
                run = contest.run(name)
                alone = not any(CONTENDERS[other].compiled for other in runs if other in CONTENDERS)
                found[name] = _facts(contest, name, run, oracle, eager, cold, alone)
                if CONTENDERS[name].fused:
                    found[name]["backend"] = select(device.type, contest.dtype, backend)
                runs[name] = run
            except Exception as error:  # anything may go wrong in a compiler; the other contenders go on
                found[name] = {"failure": first_line(error)}
        del oracle
        seconds = interleaved(runs, device, effort)
    return Measured([_row(contest, name, facts, seconds) for name, facts in found.items()], seconds)


def _facts(
    contest: Contest,
    name: str,
    run: Callable[[], Results],
    oracle: Oracle,
    eager: dict[str, float],
    cold: bool,
    alone: bool,
) -> dict[str, Any]:
    """Returns the fields of a contender's row except its times.

    Args:
        alone: True if nothing was compiled for this case before, whose parts the compiler could reuse.

    Raises:
        AssertionError: a fused contender is above the error budget.
    """
    facts: dict[str, Any] = {}
    if CONTENDERS[name].compiled:
        results, first = compiled(run, cold, backward_alone=contest.case.mode == "backward")
        facts = {"compile_s": first.seconds, "cold": cold or (first.cold and alone), "kernels": first.calls}
    else:
        results = run()
    errors = contest.errors(results, oracle)
    del results
    if CONTENDERS[name].fused:
        oracle.check(errors, eager, contest.dtype)
    if not CONTENDERS[name].compiled:
        facts["kernels"] = dispatched(run)
    return facts | {
        "error": max(errors.values()),
        "saved_bytes": contest.saved_bytes(name, run),
        "peak_bytes": contest.peak_bytes(run),
    }


def _row(contest: Contest, name: str, facts: dict[str, Any], seconds: dict[str, list[float]]) -> Row:
    case, x_bytes = contest.case, contest.x.nbytes
    if name in seconds:
        p20, p50, p80 = quantiles(seconds[name])
        copy, moved = quantiles(seconds["copy"])[1], bytes_moved(case, name, x_bytes)
        facts |= {"rounds": len(seconds[name]), "p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3}
        facts |= {"x_of_copy": p50 / copy, "bytes": moved}
        if moved:
            facts |= {"gb_per_s": moved / p50 * 1e-9, "percent_of_copy": copy_share(moved, p50, x_bytes, copy)}
    return Row(case.op, case.shape, case.dtype, case.layout, case.mode, name, x_bytes=x_bytes, **facts)


def bytes_moved(case: Case, contender: str, x_bytes: int) -> int | None:
    """Returns the bytes that a streaming kernel must move, without small tensors; for ``"copy"``, its own bytes."""
    if contender == "copy":
        return 2 * x_bytes
    entry = ENTRIES[case.op]
    if case.mode == "inference":
        entry = ENTRIES.get(f"{case.op}_eval", entry)
    passes = entry.forward_passes * (case.mode != "backward") + entry.backward_passes * (case.mode in TRAINING)
    return round(passes * x_bytes) or None


def copy_share(moved: int, seconds: float, x_bytes: int, copy_seconds: float) -> float:
    """Returns the rate of ``moved`` bytes in percent of the rate of a copy of x, which moves each byte twice."""
    return 100 * (moved / seconds) / (2 * x_bytes / copy_seconds)


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
