"""The tables of the report as plain cells: the terminal, Markdown and the page print the same ones."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import CONTENDERS, MODES
from .results import RIVALS, Comparison, Mean, Report

TITLE = "visattn_fast against eager and torch.compile"
SLOWER = "▼"
NOTES = (
    f"Times are medians. vs eager, vs compile: the rival's time over that of fused. Above 1 fused is faster; {SLOWER}"
    " marks where it is slower, ~ where the 20th to 80th percentiles of the two overlap.",
    f"Figures with a slash are of {' / '.join(CONTENDERS)}.",
    "time: in multiples of out.copy_(x) of the same tensor, timed between the others. GB/s: what a streaming kernel"
    " must move for this module, over the time of fused.",
    "saved: kept from forward to backward; peak: allocated at a time, results included. Both in multiples of the bytes"
    " of x.",
    "error: the largest of any result against float64, relative to that result's largest value.",
)


@dataclass(frozen=True)
class Cell:
    """A cell; ``tone`` is ``"win"``, ``"loss"``, ``"even"`` or empty."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under ``columns``; the first ``labels`` columns are text, the rest numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    labels: int


def module_tables(report: Report) -> list[Table]:
    """A table for each module and mode: a row for each size and layout."""
    columns = (
        "size",
        "layout",
        "copy ms",
        "time, x copy",
        *(f"vs {rival}" for rival in RIVALS),
        "GB/s",
        "saved, x",
        "peak, x",
        "error",
    )
    return [
        Table(
            f"{mean.op}: {MODES[mean.mode]}",
            columns,
            [_case_row(c) for c in report.of(mean.op) if c.case.mode == mean.mode],
            2,
        )
        for mean in report.means
    ]


def mean_table(report: Report) -> Table:
    """Geometric means: a row for each module and mode."""
    columns = (
        "module",
        "mode",
        "cases",
        *(f"vs {rival}" for rival in RIVALS),
        "time, x copy",
        "saved, x",
        "peak, x",
    )
    return Table("geometric means", columns, [_mean_row(mean) for mean in report.means], 2)


def machine_line(report: Report) -> str:
    """Where it was measured and what served."""
    machine = report.machine
    commit = f" ({machine.commit})" if machine.commit else ""
    return (
        f"{machine.device_name}, {machine.cores} cores, {machine.threads} threads; torch {machine.torch}, visattn_fast"
        f" {machine.package}{commit}; fused is served by {', '.join(report.serving) or 'nothing'}."
    )


def verdict(report: Report) -> str:
    """One sentence on the losses."""
    failed = sum(row.contender == "fused" for row in report.failures)
    failures = f" It failed in {failed} cases." if failed else ""
    slower = [loss for loss in report.losses if loss.slowdown]
    if not slower:
        return f"Fused is slower in none of {report.compared} comparisons.{failures}"
    doubtful = sum(loss.within_spread for loss in slower)
    count = f"{len(slower)} of {report.compared} comparisons, {doubtful} of them within the spread"
    return f"Fused is slower in {count}.{failures}"


def _case_row(comparison: Comparison) -> list[Cell]:
    case, rows = comparison.case, comparison.rows
    fused = rows.get("fused")

    def each(attribute: str) -> list[float | None]:
        return [getattr(rows[name], attribute) if name in rows else None for name in CONTENDERS]

    return [
        Cell(case.size),
        Cell(case.layout),
        Cell(number(rows["copy"].p50_ms)),
        Cell(_joined(each("x_of_copy"))),
        *(_speedup(comparison, rival) for rival in RIVALS),
        Cell(number(fused.gb_per_s if fused else None)),
        _memory(each("saved_x")),
        _memory(each("peak_x")),
        Cell("/".join("-" if e is None else f"{e:.0e}".replace("e-0", "e-") for e in each("error"))),
    ]


def _mean_row(mean: Mean) -> list[Cell]:
    return [
        Cell(mean.op),
        Cell(mean.mode),
        Cell(str(mean.cases)),
        *(Cell(factor(mean.speedup[rival]), tone(mean.speedup[rival])) for rival in RIVALS),
        Cell(_joined([mean.x_of_copy.get(name) for name in CONTENDERS])),
        _memory([mean.saved.get(name) for name in CONTENDERS]),
        _memory([mean.peak.get(name) for name in CONTENDERS]),
    ]


def _speedup(comparison: Comparison, rival: str) -> Cell:
    speedup = comparison.speedup(rival)
    if speedup is None:
        return Cell("-")
    if comparison.within_spread(rival):
        return Cell(f"{factor(speedup)} ~", "even" if speedup >= 1 else "loss")
    return Cell(factor(speedup), tone(speedup))


def _memory(values: list[float | None]) -> Cell:
    """Multiples of x of the contenders; ``values[-1]`` is that of fused."""
    rivals = [value for value in values[:-1] if value is not None]
    return Cell(_joined(values, 1), tone(min(rivals) / values[-1], 0.02) if rivals and values[-1] else "")


def _joined(values: list[float | None], digits: int = 2) -> str:
    return "/".join(number(value, digits) for value in values) if any(values) else "-"


def factor(speedup: float | None) -> str:
    """``1.53x``, with a mark where it is a loss."""
    if speedup is None:
        return "-"
    return f"{speedup:.2f}x" + (f" {SLOWER}" if speedup < 1 else "")


def tone(ratio: float | None, tolerance: float = 0.0) -> str:
    """Of a ratio that is better the larger it is; within the tolerance of one it is even."""
    if ratio is None:
        return ""
    if abs(ratio - 1) <= tolerance:
        return "even"
    return "win" if ratio > 1 else "loss"


def number(value: float | None, digits: int = 2) -> str:
    """A number of about three figures, or a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else digits}f}"
