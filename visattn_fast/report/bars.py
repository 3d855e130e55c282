"""Bar charts: the times of one module, and the memory of all modules."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..measure.step import MODES
from .results import Comparison, Mean, Report
from .svg import COLOURS, drawn
from .tables import number

_BAR = 0.15  # inches


def times(report: Report, op: str, mode: str) -> str:
    """Draws the times of a module in one mode, in multiples of a copy, with their 20th to 80th percentiles."""
    comparisons = [c for c in report.of(op) if c.case.mode == mode]
    names = [name for name in report.contenders if any(name in c.rows for c in comparisons)]

    def paint(axes: Axes) -> None:
        for index, name in enumerate(names):
            for place, comparison in enumerate(comparisons):
                _time(axes, comparison, name, place * (len(names) + 1) + index)
        dtypes = len({c.case.dtype for c in comparisons}) > 1
        labels = [f"{c.case.size}\n{c.case.layout}{f', {c.case.dtype}' * dtypes}" for c in comparisons]
        _dress(axes, labels, len(names), "time / copy (1 = the time of out.copy_(x))")
        axes.axvline(1, color=COLOURS["rule"], linewidth=1, linestyle="--", zorder=0)

    label = f"{op}, {MODES[mode]}: times of {', '.join(names)} in multiples of a copy"
    return drawn(paint, _height(len(comparisons), len(names)), label)


def memory(report: Report, mode: str) -> str:
    """Draws the peak memory of each module in one mode, in multiples of x; empty if no peak is known."""
    return _means(report, mode, attrgetter("peak"), "peak, x (1 = the bytes of x)", "peak memory in multiples of x")


def mean_times(report: Report, mode: str) -> str:
    """Draws the time of each module in one mode, in multiples of a copy; empty if the mode was not measured."""
    title = "time, in multiples of out.copy_(x)"
    return _means(report, mode, attrgetter("x_of_copy"), title, "time in multiples of a copy", key=True)


def _means(
    report: Report,
    mode: str,
    values: Callable[[Mean], dict[str, float | None]],
    title: str,
    what: str,
    key: bool = False,
) -> str:
    """Draws the mean ``values`` of each module in one mode, a bar per contender."""
    means = [mean for mean in report.means if mean.mode == mode and any(values(mean).values())]
    names = [name for name in report.contenders if any(values(mean).get(name) for mean in means)]
    if not names:
        return ""

    def paint(axes: Axes) -> None:
        for index, name in enumerate(names):
            for place, mean in enumerate(means):
                _bar(axes, values(mean).get(name), place * (len(names) + 1) + index, name)
        _dress(axes, [_name(mean, report) for mean in means], len(names), title)
        if key:
            patches = [Patch(color=COLOURS[name], label=name) for name in names]
            axes.legend(handles=patches, frameon=False)

    label = f"{MODES[mode]}: {what} of each module, of {', '.join(names)}"
    return drawn(paint, _height(len(means), len(names)), label)


def _name(mean: Mean, report: Report) -> str:
    return mean.op if len({m.dtype for m in report.means}) == 1 else f"{mean.op}\n{mean.dtype}"


def _height(groups: int, bars: int) -> float:
    return _BAR * groups * (bars + 1) + 0.6


def _time(axes: Axes, comparison: Comparison, name: str, y: float) -> None:
    row, copy = comparison.rows.get(name), comparison.rows["copy"].p50_ms
    if row is None or row.x_of_copy is None or row.p20_ms is None or row.p80_ms is None or not copy:
        return
    _bar(axes, row.x_of_copy, y, name, end=max(row.x_of_copy, row.p80_ms / copy))
    axes.plot((row.p20_ms / copy, row.p80_ms / copy), (y, y), color=COLOURS["spread"], linewidth=1)


def _bar(axes: Axes, value: float | None, y: float, name: str, end: float | None = None) -> None:
    if value is not None:
        axes.barh(y, value, height=0.86, color=COLOURS[name])
        axes.annotate(number(value), (end or value, y), (3, 0), textcoords="offset points", va="center", fontsize=7.5)


def _dress(axes: Axes, labels: list[str], bars: int, title: str) -> None:
    axes.set_yticks([place * (bars + 1) + (bars - 1) / 2 for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.margins(x=0.12, y=0.02)
    axes.spines["left"].set_visible(False)
