"""Plots against size: the speed-up over each rival, and the rate of each contender beneath that of a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..measure.step import MODES
from .results import Comparison, Report, geometric_mean
from .svg import COLOURS, drawn, grid

_HEIGHT = 3.0
_LINES = dict(zip(MODES, ("-", ":", "--", "-."), strict=True))
_MARKERS = ("o", "s", "^", "D", "v")
_MB = 1e6


def speedups(report: Report, comparisons: Sequence[Comparison], about: str) -> str:
    """Draws the speed-up over each rival against the bytes of x: cases as dots, a line through their geometric means.

    Returns an empty string if nothing was compared.
    """
    modes = [mode for mode in report.modes if any(c.case.mode == mode for c in comparisons)]
    groups = {
        (label, mode): points
        for (label, (ours, rival)), mode in product(report.pairs.items(), modes)
        if (points := _speedups(comparisons, mode, ours, rival))
    }
    if not groups:
        return ""

    def paint(axes: Axes) -> None:
        for (label, mode), points in groups.items():
            ours, rival = report.pairs[label]
            name = label + f", {mode}" * (len(modes) > 1)
            marker = _MARKERS[report.contenders.index(rival)]
            face = COLOURS[rival] if ours == "fused" else "none"
            style: dict[str, Any] = {"facecolors": face, "edgecolors": COLOURS[rival], "marker": marker, "s": 13}
            axes.scatter(*zip(*points, strict=True), alpha=0.55, linewidths=0.7, **style)
            line: dict[str, Any] = {"color": COLOURS[rival], "linestyle": _LINES[mode], "markerfacecolor": face}
            axes.plot(*zip(*_means(points), strict=True), label=name, marker=marker, markersize=4, **line)
        axes.axhline(1, color=COLOURS["spread"], linewidth=0.9)
        _dress(axes, "MB of x", "speed-up of ours")
        axes.yaxis.set_major_locator(LogLocator(2, subs=(1.0,)))
        _legend(axes)

    label = f"{about}: speed-up against the bytes of x"
    return drawn(paint, _HEIGHT, label)


def roofline(report: Report, mode: str) -> str:
    """Draws GB/s against the bytes that a streaming kernel must move, in one mode, beneath the measured copy."""
    rows = [row for row in report.rows if row.mode == mode and row.gb_per_s and row.moved]
    names = [name for name in report.contenders if any(row.contender == name for row in rows)]
    if not names:
        return ""

    def paint(axes: Axes) -> None:
        roof = _means([(r.moved / _MB, r.gb_per_s) for r in rows if r.contender == "copy" and r.moved and r.gb_per_s])
        ends = [max(r.moved or 0 for r in rows) / _MB, min(r.moved or 0 for r in rows) / _MB]
        roof = [(ends[1], roof[0][1]), *roof, (ends[0], roof[-1][1])]
        axes.plot(*zip(*sorted(roof), strict=True), color=COLOURS["spread"], linewidth=1.4, label="copy")
        for name in names:
            points = [(r.moved / _MB, r.gb_per_s) for r in rows if r.contender == name and r.moved]
            marker = _MARKERS[report.contenders.index(name)]
            style: dict[str, Any] = {"color": COLOURS[name], "marker": marker, "s": 15, "alpha": 0.8, "linewidths": 0}
            axes.scatter(*zip(*points, strict=True), label=name, **style)
        _dress(axes, "MB that a streaming kernel must move", "GB/s")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        _legend(axes)

    label = f"{MODES[mode]}: GB/s of {', '.join(names)} against bytes, beneath a copy"
    return drawn(paint, _HEIGHT, label)


def _speedups(comparisons: Iterable[Comparison], mode: str, ours: str, rival: str) -> list[tuple[float, float]]:
    return [
        (next(iter(c.rows.values())).x_bytes / _MB, speedup)
        for c in comparisons
        if c.case.mode == mode and (speedup := c.speedup(rival, ours)) is not None
    ]


def _means(points: Iterable[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """Returns the geometric mean of y at each x, in the order of x."""
    at: dict[float, list[float | None]] = {}
    for x, y in points:
        at.setdefault(x, []).append(y)
    return [(x, geometric_mean(at[x]) or 0.0) for x in sorted(at)]


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(0.08)
    grid(axes)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, borderpad=0)
