"""The tables of the report as plain cells: the terminal, Markdown and the page print the same ones."""

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
    """A cell; ``tone`` is ``"win"``, ``"loss"``, ``"even"`` or empty."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under ``columns``; the first ``labels`` columns are text, the rest numbers.

    Attributes:
        details: columns that a narrow terminal leaves out.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    labels: int
    details: tuple[str, ...] = ()


_DETAILS = ("GB/s", "kernels", "compile s", "error")


def notes(report: Report) -> list[str]:
    """How to read the figures."""
    return [
        "Times are medians. vs eager, vs compile, vs max-autotune, vs timm: the rival's time over that of fused;"
        f" compiled, vs ...: over that of fused-compile. Above 1 ours is faster; {SLOWER} marks where it is slower, ~"
        " where the 20th to 80th percentiles of the two overlap.",
        f"Figures with a slash are of {' / '.join(report.contenders)}: "
        + "; ".join(f"{name} is {CONTENDERS[name].about}" for name in report.contenders)
        + ".",
        *(f"{mode}: {MODES[mode]}." for mode in report.modes),
        "time: in multiples of out.copy_(x) of the same tensor, timed between the others. GB/s: what a streaming kernel"
        " must move for this module, over the time of fused; % of copy: the same in percent of the copy's.",
        "saved: kept from forward to backward; peak: allocated at a time, results included. Both in multiples of the"
        " bytes of x.",
        "kernels: ops dispatched; of what is compiled, calls of kernels and ops in the generated code. compile s:"
        " seconds of the first call of each that is compiled; with + a cache on disk had a part of it (--cold"
        " takes it away).",
        "error: the largest of any result against float64, relative to that result's largest value.",
    ]


def module_tables(report: Report) -> dict[tuple[str, str, str], Table]:
    """By module, mode and dtype a table: a row for each size and layout."""
    columns = (
        "size",
        "layout",
        "copy ms",
        "time, x copy",
        *report.pairs,
        "GB/s",
        "% of copy",
        "saved, x",
        "peak, x",
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
    """Geometric means: a row for each module, mode and dtype."""
    columns = (
        "module",
        "mode",
        "dtype",
        "cases",
        *report.pairs,
        "time, x copy",
        "% of copy",
        "saved, x",
        "peak, x",
        "kernels",
        "compile s",
    )
    return Table("geometric means", columns, [_mean_row(m, report) for m in report.means], 3, _DETAILS)


def loss_table(losses: Iterable[Loss]) -> Table:
    """Where ours loses, the worst first."""
    columns = ("module", "size", "layout", "dtype", "mode", "ours", "rival", "what", "ours / rival")
    return Table("", columns, [_loss_row(loss) for loss in losses], len(columns) - 1)


def _loss_row(loss: Loss) -> list[Cell]:
    case = loss.case
    found = loss.failure or f"{loss.ratio:.2f}x" + " ~" * loss.within_spread
    texts = (case.op, case.size, case.layout, case.dtype, case.mode, loss.ours, loss.rival or "-", loss.what)
    return [*map(Cell, texts), Cell(found, "even" if loss.within_spread else "loss")]


def machine_line(report: Report) -> str:
    """Where it was measured and what served."""
    machine = report.machine
    commit = f" ({machine.commit})" if machine.commit else ""
    return (
        f"{machine.device_name}, {machine.cores} cores, {machine.threads} threads; torch {machine.torch}, visattn_fast"
        f" {machine.package}{commit}; fused is served by {', '.join(report.serving) or 'nothing'}."
    )


def verdict(report: Report) -> str:
    """The losses in a few sentences."""
    losses = report.losses
    failed = sum(loss.what == "failure" for loss in losses)
    failures = f" It failed in {failed} cases." if failed else ""
    hungry = len({loss.case for loss in losses if loss.what == "peak memory"})
    memory = (
        f" It allocates more at a time than a rival in {hungry} of {len(report.comparisons)} cases." if hungry else ""
    )
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
    """The contenders that were compiled."""
    return [name for name in report.contenders if CONTENDERS[name].compiled]


def _speedup(comparison: Comparison, ours: str, rival: str) -> Cell:
    speedup = comparison.speedup(rival, ours)
    if speedup is None:
        return Cell("-")
    if comparison.within_spread(rival, ours):
        return Cell(f"{factor(speedup)} ~", "even" if speedup >= 1 else "loss")
    return Cell(factor(speedup), tone(speedup))


def _memory(values: dict[str, float | None]) -> Cell:
    """Multiples of x, of each contender."""
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
    """Numbers with slashes between; a dash where there is none."""
    values = list(values)
    return (
        "/".join((form or number)(value, digits) for value in values)
        if any(value is not None for value in values)
        else "-"
    )


def _scientific(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.0e}".replace("e-0", "e-")


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
    return f"{value:.0f}" if value >= 100 else f"{value:.{min(digits, 1) if value >= 10 else digits}f}"
