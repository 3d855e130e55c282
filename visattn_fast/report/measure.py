"""Measures a case: parity first, then memory, then time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import select, use_backend
from ..catalogue import ENTRIES
from .cases import CONTENDERS, Case, Shape
from .subject import Subject
from .timing import Effort, interleaved, quantiles


@dataclass(frozen=True)
class Row:
    """What was found of one contender in one case; ``"copy"`` is ``out.copy_(x)``, timed between the others.

    Attributes:
        p20_ms, p50_ms, p80_ms: percentiles of its times over ``rounds``.
        x_of_copy: its median time, in multiples of the copy's.
        gb_per_s: the bytes that a streaming kernel must move for this module, over the median: the same bytes for
            every contender, so that it compares; the copy's own bytes for the copy.
        percent_of_copy: ``gb_per_s``, in percent of the copy's.
        saved_bytes: kept between forward and backward. peak_bytes: allocated at a time. x_bytes: of the input.
        error: the largest error of any result against float64, relative to that result's largest value.
        compile_s: seconds of its first call.
        failure: why it has no figures; empty if it has.
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
    x_of_copy: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    compile_s: float | None = None
    failure: str = ""

    @property
    def case(self) -> Case:
        """What it belongs to."""
        return Case(self.op, self.shape, self.dtype, self.layout, self.mode)

    @property
    def saved_x(self) -> float | None:
        """``saved_bytes`` in multiples of x."""
        return None if self.saved_bytes is None else self.saved_bytes / self.x_bytes

    @property
    def peak_x(self) -> float | None:
        """``peak_bytes`` in multiples of x."""
        return None if self.peak_bytes is None else self.peak_bytes / self.x_bytes

    def __str__(self) -> str:
        return f"{self.case} {self.contender}" + (f": {self.failure}" if self.failure else "")


@dataclass(frozen=True)
class Measured:
    """Rows of a case, and every single time behind them in seconds, by contender."""

    rows: list[Row]
    seconds: dict[str, list[float]]


def measure(
    case: Case,
    device: torch.device,
    effort: Effort,
    contenders: Iterable[str] = tuple(CONTENDERS),
    backend: str = "auto",
) -> Measured:
    """Measures the contenders of a case. One that fails, or whose results are wrong, gets a row that says so."""
    with use_backend(backend):
        return _measure(Subject(case, device), effort, contenders, backend)


def _measure(subject: Subject, effort: Effort, contenders: Iterable[str], backend: str) -> Measured:
    case, device = subject.case, subject.device
    oracle = subject.oracle()
    runs: dict[str, Callable[[], Any]] = {"copy": subject.run("copy")}
    found: dict[str, dict[str, Any]] = {"copy": {}}
    eager = subject.errors(subject.run("eager")(), oracle)
    for name in contenders:
        try:
            run = subject.run(name)
            start = time.perf_counter()
            results = run()
            first_call = time.perf_counter() - start
            errors = subject.errors(results, oracle)
            del results
            if name == "fused":
                subject.check(errors, eager)
        except Exception as error:  # anything may go wrong in a compiler; the other contenders go on
            found[name] = {"failure": _first_line(error)}
            continue
        runs[name] = run
        found[name] = {
            "error": max(errors.values()),
            "compile_s": first_call if name == "compile" else None,
            "saved_bytes": subject.saved_bytes(name, run),
            "peak_bytes": subject.peak_bytes(run),
        }
    if "fused" in runs:
        found["fused"]["backend"] = select(device.type, subject.dtype, backend)
    del oracle
    seconds = interleaved(runs, device, effort)
    rates = {name: bytes_moved(case, name, subject.x.nbytes) / quantiles(s)[1] for name, s in seconds.items()}
    rows = []
    for name, facts in found.items():
        if name in seconds:
            p20, p50, p80 = quantiles(seconds[name])
            facts |= {"rounds": len(seconds[name]), "p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3}
            facts |= {"x_of_copy": p50 / quantiles(seconds["copy"])[1], "gb_per_s": rates[name] * 1e-9}
            facts |= {"percent_of_copy": 100 * rates[name] / rates["copy"]}
        rows.append(
            Row(case.op, case.shape, case.dtype, case.layout, case.mode, name, x_bytes=subject.x.nbytes, **facts)
        )
    return Measured(rows, seconds)


def bytes_moved(case: Case, contender: str, x_bytes: int) -> int:
    """What a streaming kernel must move in a case, small tensors aside; of ``"copy"``, what it moves itself."""
    entry = ENTRIES[case.op]
    if contender == "copy":
        return 2 * x_bytes
    passes = entry.forward_passes + (entry.backward_passes if case.mode == "both" else 0)
    return round(passes * x_bytes)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
