"""The results of a report: rows, comparisons, losses and means. Every output is made from them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..measure.step import MODES
from .cases import CONTENDERS, Case
from .machine import Machine
from .rows import Row

FORMAT = 2  # version of the JSON; the first did not name its version

# Heading -> the two contenders that it compares, ours and the rival.
PAIRS = {
    "vs eager": ("fused", "eager"),
    "vs compile": ("fused", "compile"),
    "vs max-autotune": ("fused", "compile-max-autotune"),
    "vs timm": ("fused", "timm"),
    "vs timm compile": ("fused", "timm-compile"),
    "compiled, vs compile": ("fused-compile", "compile"),
    "compiled, vs max-autotune": ("fused-compile", "compile-max-autotune"),
}
OURS = tuple(name for name, contender in CONTENDERS.items() if contender.fused)
EVEN = 1.02  # memory up to this factor counts as equal: small maps and weights


@dataclass(frozen=True)
class Comparison:
    """The rows of one case, by contender."""

    case: Case
    rows: dict[str, Row]

    def speedup(self, rival: str, ours: str = "fused") -> float | None:
        """Returns the rival's median time over ours; None if either has no time."""
        mine, other = self._median(ours), self._median(rival)
        return other / mine if mine and other else None

    def _median(self, contender: str) -> float | None:
        row = self.rows.get(contender)
        return row.p50_ms if row else None

    def within_spread(self, rival: str, ours: str = "fused") -> bool:
        """True if the times of ours and of the rival overlap between their 20th and 80th percentiles."""
        return overlap(self.rows[ours], self.rows[rival])


def overlap(a: Row, b: Row) -> bool:
    """True if the times of two rows overlap between their 20th and 80th percentiles; False if a row has no times."""
    if a.p20_ms is None or a.p80_ms is None or b.p20_ms is None or b.p80_ms is None:
        return False
    return a.p20_ms <= b.p80_ms and b.p20_ms <= a.p80_ms


@dataclass(frozen=True)
class Loss:
    """A case in which ours is slower than a rival, has a higher memory peak, or failed.

    Attributes:
        what: ``"time"``, ``"peak memory"`` or ``"failure"``.
        ratio: ours over the rival's; infinite for a failure.
        within_spread: True if the two times overlap, so that the loss may be noise.
        failure: why ours failed.
    """

    case: Case
    ours: str
    rival: str
    what: str
    ratio: float
    within_spread: bool = False
    failure: str = ""

    def __str__(self) -> str:
        who = f"{self.case} {self.ours}" if self.ours != "fused" else str(self.case)
        if self.failure:
            return f"{who}: {self.failure}"
        doubt = " (within the spread)" if self.within_spread else ""
        return f"{who}: {self.ratio:.2f} x the {self.what} of {self.rival}{doubt}"


@dataclass(frozen=True)
class Mean:
    """Geometric means over the cases of a module in one mode and dtype; None if there is nothing to average."""

    op: str
    mode: str
    dtype: str
    cases: int
    speedup: dict[str, float | None]  # for each of `PAIRS` that was measured
    x_of_copy: dict[str, float | None]  # for each contender
    percent_of_copy: dict[str, float | None]
    saved: dict[str, float | None]  # in multiples of x
    peak: dict[str, float | None]
    kernels: dict[str, float | None]
    compile_s: dict[str, float | None]

    @property
    def title(self) -> str:
        """Module, mode and dtype, as ``se, both, float32``."""
        return f"{self.op}, {self.mode}, {self.dtype}"


@dataclass(frozen=True)
class Report:
    """A report of modules.

    Attributes:
        machine: the machine that it was measured on.
        settings: the options of the run.
        left_out: sentences that name cases not measured, and say why.
        rows: one row for each case and contender.
        seconds: how long the run took.
    """

    machine: Machine
    settings: dict[str, Any]
    left_out: list[str]
    rows: list[Row]
    seconds: float

    @property
    def comparisons(self) -> list[Comparison]:
        """The cases, in the order in which they were measured."""
        found: dict[Case, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.case, {})[row.contender] = row
        return [Comparison(case, rows) for case, rows in found.items()]

    def of(self, op: str) -> list[Comparison]:
        """The comparisons of one module."""
        return [c for c in self.comparisons if c.case.op == op]

    @property
    def ops(self) -> list[str]:
        """The modules that were measured."""
        return list(dict.fromkeys(row.op for row in self.rows))

    @property
    def serving(self) -> list[str]:
        """The backends that served the fused modules."""
        return list(dict.fromkeys(row.backend for row in self.rows if row.backend))

    @property
    def contenders(self) -> list[str]:
        """The contenders that were measured, without the copy."""
        measured = {row.contender for row in self.rows}
        return [name for name in CONTENDERS if name in measured]

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """The entries of `PAIRS` whose two contenders were both measured."""
        return {label: pair for label, pair in PAIRS.items() if set(pair) <= set(self.contenders)}

    @property
    def modes(self) -> list[str]:
        """The modes that were measured."""
        measured = {row.mode for row in self.rows}
        return [mode for mode in MODES if mode in measured]

    @property
    def compared(self) -> int:
        """The number of comparisons of ours with a rival."""
        return sum(c.speedup(rival, ours) is not None for c in self.comparisons for ours, rival in self.pairs.values())

    @property
    def failures(self) -> list[Row]:
        """The rows of contenders that failed."""
        return [row for row in self.rows if row.failure]

    @property
    def losses(self) -> list[Loss]:
        """The losses of ours: failures, then times, then memory peaks, each with the worst first."""
        found = [
            Loss(row.case, row.contender, "", "failure", math.inf, failure=row.failure)
            for row in self.failures
            if row.contender in OURS
        ]
        for comparison in self.comparisons:
            for ours in OURS:
                found += _losses(comparison, ours, [rival for mine, rival in self.pairs.values() if mine == ours])
        return sorted(found, key=lambda loss: (("failure", "time", "peak memory").index(loss.what), -loss.ratio))

    @property
    def means(self) -> list[Mean]:
        """The geometric means, by module, mode and dtype."""
        groups: dict[tuple[str, str, str], list[Comparison]] = {}
        for comparison in self.comparisons:
            case = comparison.case
            groups.setdefault((case.op, case.mode, case.dtype), []).append(comparison)
        return [self._mean(*key, comparisons) for key, comparisons in groups.items()]

    def _mean(self, op: str, mode: str, dtype: str, comparisons: list[Comparison]) -> Mean:
        def over(attribute: str) -> dict[str, float | None]:
            found = {n: [getattr(c.rows[n], attribute) for c in comparisons if n in c.rows] for n in self.contenders}
            return {name: geometric_mean(values) for name, values in found.items()}

        return Mean(
            op,
            mode,
            dtype,
            len(comparisons),
            {
                label: geometric_mean([c.speedup(rival, ours) for c in comparisons])
                for label, (ours, rival) in self.pairs.items()
            },
            over("x_of_copy"),
            over("percent_of_copy"),
            over("saved_x"),
            over("peak_x"),
            over("kernels"),
            over("compile_s"),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The machine, the versions and the settings."""
        return asdict(self.machine) | self.settings | {"seconds": round(self.seconds)}

    def to_json(self) -> str:
        """Writes the report as JSON, with means and losses."""
        losses = [asdict(loss) | {"ratio": None if loss.failure else loss.ratio} for loss in self.losses]
        derived = {"means": [asdict(mean) for mean in self.means], "losses": losses}
        return json.dumps({"format": FORMAT} | asdict(self) | derived, indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads a file written by `to_json`, in this format or the first, or by ``make gpu-check``.

        Raises:
            ReportError: there is no such file, or it holds no report.
        """
        return cls.parse(read(path), path)

    @classmethod
    def parse(cls, data: dict[str, Any], path: str | Path) -> Report:
        """Reads the report from the JSON that ``path`` holds. Raises ReportError if there is no report in it."""
        try:
            rows = [Row(**row | {"shape": tuple(row["shape"])}) for row in data["rows"]]
            return cls(Machine(**data["machine"]), data.get("settings", {}), data["left_out"], rows, data["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{path} holds no report of modules: {type(error).__name__}: {error}") from error


class ReportError(ValueError):
    """A file that holds no report."""


def read(path: str | Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises ReportError if it cannot be read, or comes from a later version."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ReportError(f"{path} holds no report, but a {type(data).__name__}")
    if data.get("format", 1) not in (1, FORMAT):
        raise ReportError(f"{path} has format {data['format']}; this version reads 1 and {FORMAT}")
    return data


def _losses(comparison: Comparison, ours: str, rivals: list[str]) -> list[Loss]:
    """Lists the losses of ours in time to every faster rival, and in memory to the rival with the lowest peak."""
    case, rows = comparison.case, comparison.rows
    speedups = {rival: comparison.speedup(rival, ours) for rival in rivals}
    found = [
        Loss(case, ours, rival, "time", 1 / speedup, comparison.within_spread(rival, ours))
        for rival, speedup in speedups.items()
        if speedup is not None and speedup < 1
    ]
    peaks = {name: peak for name in rivals if name in rows and (peak := rows[name].peak_bytes)}
    mine = rows[ours].peak_bytes if ours in rows else None
    if mine and peaks and mine > EVEN * min(peaks.values()):
        lowest = min(peaks, key=lambda name: peaks[name])
        found.append(Loss(case, ours, lowest, "peak memory", mine / peaks[lowest]))
    return found


def geometric_mean(values: list[float | None]) -> float | None:
    """Returns the geometric mean of the positive values, without None; None if there are none."""
    logarithms = [math.log(value) for value in values if value]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
