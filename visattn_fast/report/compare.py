"""Compares two reports case by case: regressions and improvements in time and memory, and cases of one report alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .results import OURS, Report, geometric_mean, overlap
from .rows import Row
from .tables import Cell, Table, number

_BYTES = {"peak memory": "peak_bytes", "saved memory": "saved_bytes"}


@dataclass(frozen=True)
class Change:
    """A figure that both reports have for one of our contenders in one case.

    Attributes:
        what: the name of the figure.
        old, new: its values; None for a failure.
        doubt: True if the two times overlap between their 20th and 80th percentiles.
    """

    row: Row
    what: str
    old: float | None
    new: float | None
    doubt: bool = False

    @property
    def ratio(self) -> float:
        """New over old; infinite if the contender fails now, 0 if it no longer fails."""
        if self.new is None or self.old is None:
            return float("inf") if self.new is None else 0.0
        return self.new / self.old


@dataclass(frozen=True)
class Changes:
    """The comparison of two reports.

    Attributes:
        threshold: a figure that changed by at most this factor counts as unchanged.
        changes: every figure that both reports have for our contenders.
        only_old, only_new: rows of our contenders that only one report has.
        drift: new over old time of the copy and of each rival, geometric means: how much the machine changed.
        differing: differences between machines, versions and settings, in words.
    """

    threshold: float
    changes: list[Change]
    only_old: list[Row]
    only_new: list[Row]
    drift: dict[str, float]
    differing: list[str]

    @property
    def regressions(self) -> list[Change]:
        """Changes for the worse past the threshold, the worst first."""
        return sorted((c for c in self.changes if c.ratio > self.threshold), key=lambda c: -c.ratio)

    @property
    def improvements(self) -> list[Change]:
        """Changes for the better past the threshold, the best first."""
        return sorted((c for c in self.changes if c.ratio < 1 / self.threshold), key=lambda c: c.ratio)

    @property
    def verdict(self) -> str:
        """Sums up the comparison in one sentence."""
        times = geometric_mean([c.ratio for c in self.changes if c.what.startswith("time")])
        mean = f"; geometric mean of new / old time: {times:.2f}x" if times else ""
        found = f"{len(self.regressions)} regressions and {len(self.improvements)} improvements"
        return f"Fused: {found} past {self.threshold:g}x among {len(self.changes)} figures{mean}."


def compare(old: Report, new: Report, threshold: float = 1.1, in_copies: bool = False) -> Changes:
    """Compares our contenders in two reports.

    Args:
        threshold: at least 1; a time or an amount of memory that grew by a larger factor is a regression.
        in_copies: compare times in multiples of each report's own copy, for machines that are not equally fast.
    """
    before, after = ({(r.case, r.contender): r for r in report.rows} for report in (old, new))
    shared = [key for key in before if key in after]
    changes = [change for key in shared if key[1] in OURS for change in _changes(before[key], after[key], in_copies)]
    pairs = {
        name: [_ratio(before[key].p50_ms, after[key].p50_ms) for key in shared if key[1] == name]
        for name in dict.fromkeys(name for _, name in shared if name not in OURS)
    }
    return Changes(
        threshold,
        changes,
        [row for key, row in before.items() if key not in after and key[1] in OURS],
        [row for key, row in after.items() if key not in before and key[1] in OURS],
        {name: mean for name, ratios in pairs.items() if (mean := geometric_mean(ratios))},
        _differing(old, new),
    )


def table(title: str, changes: list[Change]) -> Table:
    """Returns a table with a row for each change."""
    columns = ("module", "size", "layout", "dtype", "mode", "ours", "figure", "old", "new", "new / old")
    return Table(f"{title}: {len(changes)}", columns, [_cells(change) for change in changes], 7)


def _changes(old: Row, new: Row, in_copies: bool) -> list[Change]:
    if old.failure or new.failure:
        both = bool(old.failure and new.failure)
        return [] if both else [Change(new, "failure", None if old.failure else 1.0, None if new.failure else 1.0)]
    what, attribute = ("time / copy", "x_of_copy") if in_copies else ("time", "p50_ms")
    figures = {what: attribute} | _BYTES
    found = []
    for name, attribute in figures.items():
        a, b = getattr(old, attribute), getattr(new, attribute)
        if a and b:
            found.append(Change(new, name, a, b, name == what and overlap(old, new)))
    return found


def _ratio(old: float | None, new: float | None) -> float | None:
    return new / old if old and new else None


def _differing(old: Report, new: Report) -> list[str]:
    a, b = (asdict(r.machine) | {"backend": r.settings.get("backend"), "served": r.serving} for r in (old, new))
    return [f"{name}: {a[name]} -> {b[name]}" for name in a if a[name] != b[name]]


def _cells(change: Change) -> list[Cell]:
    row = change.row
    if change.what == "failure":
        figures = [*("failed" if value is None else "ran" for value in (change.old, change.new)), row.failure or "-"]
    else:
        scale, unit = (2**-20, " MB") if change.what in _BYTES else (1.0, " ms" if change.what == "time" else "")
        figures = [number(value * scale) + unit for value in (change.old, change.new) if value is not None]
        figures.append(f"{change.ratio:.2f}x" + " ~" * change.doubt)
    tone = "even" if change.doubt else "loss" if change.ratio > 1 else "win"
    texts = (row.op, row.case.size, row.layout, row.dtype, row.mode, row.contender, change.what, *figures[:2])
    return [*map(Cell, texts), Cell(figures[2], tone)]
