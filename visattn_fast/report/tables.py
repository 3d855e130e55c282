"""The tables of the report as plain cells: terminal, Markdown and page print the same tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..measure.step import MODES
from .cases import CONTENDERS
from .results import EVEN, OURS, Comparison, Loss, Mean, Report

TITLE = "visattn_fast against eager and torch.compile"
SLOWER = "▼"


@dataclass(frozen=True)
class Cell:
    """A cell of a table; ``tone`` is ``"win"``, ``"loss"``, ``"even"`` or empty."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: the headings.
        labels: how many of the first columns are text; the others are numbers.
        details: headings of columns that a narrow terminal leaves out.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    labels: int
    details: tuple[str, ...] = ()


_DETAILS = ("GB/s", "kernels", "compile s", "error")


def notes(report: Report) -> list[str]:
    """Explains the columns, a sentence or two for each."""
    about = "; ".join(f"{name} is {CONTENDERS[name].about}" for name in report.contenders)
    return [
        "Times are medians. vs eager, vs compile, vs max-autotune, vs timm: the rival's time over that of fused;"
        f" compiled, vs ...: over that of fused-compile. Above 1 ours is faster. {SLOWER} marks a loss; ~ marks times"
        " that overlap between their 20th and 80th percentiles.",
        f"Figures with a slash stand for {' / '.join(report.contenders)}: {about}.",
        *(f"{mode}: {MODES[mode]}." for mode in report.modes),
        "time / copy: the time in multiples of out.copy_(x) on the same tensor, timed between the others. GB/s: bytes"
        " that a streaming kernel must move for this module, over the time of fused; % of copy: that rate in percent of"
        " the copy's.",
        "saved / x: bytes kept from forward to backward; peak / x: the peak of the bytes allocated, results included."
        " Both are in multiples of the bytes of x.",
        "kernels: ops dispatched; for a compiled contender, calls of kernels and ops in the generated code. compile s:"
        " seconds of the first call of each compiled contender; + marks a call for which a cache on disk held a part"
        " (--cold compiles without these caches).",
        "error: the largest error of any result against float64, relative to that result's largest value.",
    ]


def module_tables(report: Report) -> dict[tuple[str, str, str], Table]:
    """Returns a table for each module, mode and dtype, with a row for each size and layout."""
    columns = (
        "size",
        "layout",
        "copy ms",
        "time / copy",
        *report.pairs,
        "GB/s",
        "% of copy",
        "saved / x",
        "peak / x",
        "kernels",
        "compile s",
        "error",
    )
    groups: dict[tuple[str, str, str], list[list[Cell]]] = {}
    for c in report.comparisons:
        groups.setdefault((c.case.op, c.case.mode, c.case.dtype), []).append(_case_row(c, report))
    return {
        key: Table(f"{', '.join(key)}: {MODES[key[1]]}", columns, rows, 2, _DETAILS) for key, rows in groups.items()
    }


def mean_table(report: Report) -> Table:
    """Returns the geometric means, with a row for each module, mode and dtype."""
    columns = (
        "module",
        "mode",
        "dtype",
        "cases",
        *report.pairs,
        "time / copy",
        "% of copy",
        "saved / x",
        "peak / x",
        "kernels",
        "compile s",
    )
    return Table("geometric means", columns, [_mean_row(m, report) for m in report.means], 3, _DETAILS)


def loss_table(losses: Iterable[Loss]) -> Table:
    """Returns a row for each loss, in the order given."""
    columns = ("module", "size", "layout", "dtype", "mode", "ours", "rival", "figure", "ours / rival")
    return Table("", columns, [_loss_row(loss) for loss in losses], len(columns) - 1)


def _loss_row(loss: Loss) -> list[Cell]:
    case = loss.case
    found = loss.failure or f"{loss.ratio:.2f}x" + " ~" * loss.within_spread
    texts = (case.op, case.size, case.layout, case.dtype, case.mode, loss.ours, loss.rival or "-", loss.what)
    return [*map(Cell, texts), Cell(found, "even" if loss.within_spread else "loss")]


def machine_line(report: Report) -> str:
    """Names the machine, the versions and the backends that served fused."""
    machine = report.machine
    commit = f" ({machine.commit})" if machine.commit else ""
    return (
        f"{machine.device_name}, {machine.cores} cores, {machine.threads} threads; torch {machine.torch}, visattn_fast"
        f" {machine.package}{commit}; fused is served by {', '.join(report.serving) or 'nothing'}."
    )


def verdict(report: Report) -> str:
    """Sums up the losses in a few sentences."""
    losses = report.losses
    failed = sum(loss.what == "failure" for loss in losses)
    failures = f" It failed in {failed} cases." if failed else ""
    higher = len({loss.case for loss in losses if loss.what == "peak memory"})
    memory = f" Its memory peak is above a rival's in {higher} of {len(report.comparisons)} cases." if higher else ""
    slower = [loss for loss in losses if loss.what == "time"]
    if not slower:
        return f"Fused is slower in none of {report.compared} comparisons.{memory}{failures}"
    doubtful = sum(loss.within_spread for loss in slower)
    count = f"{len(slower)} of {report.compared} comparisons, {doubtful} of them within the spread"
    return f"Fused is slower in {count}.{memory}{failures}"


def _case_row(comparison: Comparison, report: Report) -> list[Cell]:
    case, rows = comparison.case, comparison.rows
    fused = rows.get("fused")

    def each(attribute: str) -> dict[str, float | None]:
        return {name: getattr(rows[name], attribute) if name in rows else None for name in report.contenders}

    return [
        Cell(case.size),
        Cell(case.layout),
        Cell(number(rows["copy"].p50_ms)),
        Cell(joined(each("x_of_copy").values())),
        *(_speedup(comparison, *pair) for pair in report.pairs.values()),
        Cell(number(fused.gb_per_s if fused else None)),
        Cell(number(fused.percent_of_copy if fused else None, 0)),
        _memory(each("saved_x")),
        _memory(each("peak_x")),
        Cell(joined(each("kernels").values(), 0)),
        _compile_time(comparison, report),
        Cell(joined(each("error").values(), form=_scientific)),
    ]


def _mean_row(mean: Mean, report: Report) -> list[Cell]:
    return [
        Cell(mean.op),
        Cell(mean.mode),
        Cell(mean.dtype),
        Cell(str(mean.cases)),
        *(Cell(factor(mean.speedup[label]), tone(mean.speedup[label])) for label in report.pairs),
        Cell(joined(mean.x_of_copy.values())),
        Cell(number(mean.percent_of_copy.get("fused"), 0)),
        _memory(mean.saved),
        _memory(mean.peak),
        Cell(joined(mean.kernels.values(), 0)),
        Cell(joined((mean.compile_s[name] for name in compiled(report)), 1)),
    ]


def compiled(report: Report) -> list[str]:
    """Returns the contenders that torch.compile compiles."""
    return [name for name in report.contenders if CONTENDERS[name].compiled]


def _speedup(comparison: Comparison, ours: str, rival: str) -> Cell:
    speedup = comparison.speedup(rival, ours)
    if speedup is None:
        return Cell("-")
    if comparison.within_spread(rival, ours):
        return Cell(f"{factor(speedup)} ~", "even" if speedup >= 1 else "loss")
    return Cell(factor(speedup), tone(speedup))


def _memory(values: dict[str, float | None]) -> Cell:
    """Returns the cell of each contender's memory, in multiples of x."""
    fused = values.get("fused")
    rivals = [value for name, value in values.items() if name not in OURS and value is not None]
    return Cell(joined(values.values(), 1), tone(min(rivals) / fused, EVEN - 1) if rivals and fused else "")


def _compile_time(comparison: Comparison, report: Report) -> Cell:
    rows = [comparison.rows.get(name) for name in compiled(report)]
    texts = [number(row.compile_s if row else None, 1) + "+" * bool(row and row.cold is False) for row in rows]
    return Cell("/".join(texts) or "-")


def joined(
    values: Iterable[float | None], digits: int = 2, form: Callable[[float | None, int], str] | None = None
) -> str:
    """Joins numbers with slashes; a dash stands for a missing number."""
    values = list(values)
    return (
        "/".join((form or number)(value, digits) for value in values)
        if any(value is not None for value in values)
        else "-"
    )


def _scientific(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.0e}".replace("e-0", "e-")


def factor(speedup: float | None) -> str:
    """Formats a speed-up as ``1.53x``, with a mark if it is a loss."""
    if speedup is None:
        return "-"
    return f"{speedup:.2f}x" + (f" {SLOWER}" if speedup < 1 else "")


def tone(ratio: float | None, tolerance: float = 0.0) -> str:
    """Returns the tone of a ratio that is better the larger it is; within ``tolerance`` of 1 it is even."""
    if ratio is None:
        return ""
    if abs(ratio - 1) <= tolerance:
        return "even"
    return "win" if ratio > 1 else "loss"


def number(value: float | None, digits: int = 2) -> str:
    """Formats a number with about three digits; None as a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.{min(digits, 1) if value >= 10 else digits}f}"
