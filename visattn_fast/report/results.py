"""What a run of the report found: rows, comparisons, losses and means. Every output is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .cases import Case
from .machine import Machine
from .measure import Row

RIVALS = ("eager", "compile")


@dataclass(frozen=True)
class Comparison:
    """The rows of one case, by contender."""

    case: Case
    rows: dict[str, Row]

    def speedup(self, rival: str) -> float | None:
        """The rival's median time over that of fused; None where either has none."""
        fused, other = self._median("fused"), self._median(rival)
        return other / fused if fused and other else None

    def _median(self, contender: str) -> float | None:
        row = self.rows.get(contender)
        return row.p50_ms if row else None

    def within_spread(self, rival: str) -> bool:
        """Whether the times of fused and the rival overlap between their 20th and 80th percentiles."""
        fused, other = self.rows["fused"], self.rows[rival]
        assert fused.p20_ms is not None
        assert fused.p80_ms is not None
        assert other.p20_ms is not None
        assert other.p80_ms is not None
        return fused.p20_ms <= other.p80_ms and other.p20_ms <= fused.p80_ms


@dataclass(frozen=True)
class Loss:
    """A case in which fused is slower than a rival, or failed.

    Attributes:
        slowdown: the time of fused over the rival's; None where fused failed.
        within_spread: the two times overlap: it may be noise.
    """

    case: Case
    rival: str
    slowdown: float | None
    within_spread: bool
    failure: str = ""

    def __str__(self) -> str:
        if self.slowdown is None:
            return f"{self.case}: {self.failure}"
        doubt = " (within the spread)" if self.within_spread else ""
        return f"{self.case}: {self.slowdown:.2f} x the time of {self.rival}{doubt}"


@dataclass(frozen=True)
class Mean:
    """Geometric means over the cases of a module in one mode; None where there is nothing to average."""

    op: str
    mode: str
    cases: int
    speedup: dict[str, float | None]  # against each rival
    x_of_copy: dict[str, float | None]  # of each contender
    saved: dict[str, float | None]  # of each contender, in multiples of x
    peak: dict[str, float | None]


@dataclass(frozen=True)
class Report:
    """Attributes:
    machine: where it was measured.
    settings: the options of the run.
    left_out: what was not measured, and why, in words.
    rows: one per case and contender.
    seconds: how long it took.
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
        """The backends that served fused."""
        return list(dict.fromkeys(row.backend for row in self.rows if row.backend))

    @property
    def compared(self) -> int:
        """How many times fused was held against a rival."""
        return sum(c.speedup(rival) is not None for c in self.comparisons for rival in RIVALS)

    @property
    def failures(self) -> list[Row]:
        """The rows without figures."""
        return [row for row in self.rows if row.failure]

    @property
    def losses(self) -> list[Loss]:
        """Where fused is slower than a rival, or failed; the worst first."""
        found = []
        for comparison in self.comparisons:
            fused = comparison.rows.get("fused")
            if fused and fused.failure:
                found.append(Loss(comparison.case, "", None, False, fused.failure))
            for rival in RIVALS:
                speedup = comparison.speedup(rival)
                if speedup is not None and speedup < 1:
                    found.append(Loss(comparison.case, rival, 1 / speedup, comparison.within_spread(rival)))
        return sorted(found, key=lambda loss: -(loss.slowdown or math.inf))

    @property
    def means(self) -> list[Mean]:
        """By module and mode."""
        keys = dict.fromkeys((row.op, row.mode) for row in self.rows)
        return [self._mean(op, mode) for op, mode in keys]

    def _mean(self, op: str, mode: str) -> Mean:
        comparisons = [c for c in self.of(op) if c.case.mode == mode]
        contenders = dict.fromkeys(name for c in comparisons for name in c.rows if name != "copy")

        def over(value: Callable[[Row], float | None]) -> dict[str, float | None]:
            return {n: geometric_mean([value(c.rows[n]) for c in comparisons if n in c.rows]) for n in contenders}

        return Mean(
            op,
            mode,
            len(comparisons),
            {rival: geometric_mean([c.speedup(rival) for c in comparisons]) for rival in RIVALS},
            over(lambda row: row.x_of_copy),
            over(lambda row: row.saved_x),
            over(lambda row: row.peak_x),
        )

    def to_json(self) -> str:
        """The whole of it, means and losses included."""
        derived = {"means": [asdict(m) for m in self.means], "losses": [asdict(loss) for loss in self.losses]}
        return json.dumps(asdict(self) | derived, indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what `to_json` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {field.name for field in fields(cls)}
        data = {key: value for key, value in data.items() if key in known}
        data["machine"] = Machine(**data["machine"])
        data["rows"] = [Row(**row | {"shape": tuple(row["shape"])}) for row in data["rows"]]
        return cls(**data)


def geometric_mean(values: list[float | None]) -> float | None:
    """Of those that are there and positive."""
    logarithms = [math.log(value) for value in values if value]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
