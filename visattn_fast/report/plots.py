"""The plots of the page, as SVG whose colours are the page's own CSS variables."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import CONTENDERS, MODES
from .results import Comparison, Report
from .tables import number

# Stand-ins for CSS variables: each colour that matplotlib writes becomes var(--name).
_COLOURS = {"eager": "#010101", "compile": "#020202", "fused": "#030303", "spread": "#040404", "rule": "#050505"}
_WIDTH, _BAR = 4.2, 0.15  # inches


def times(report: Report, op: str, mode: str) -> str:
    """Bars of the times of a module in one mode, in multiples of a copy, with the 20th to 80th percentiles."""
    comparisons = [c for c in report.of(op) if c.case.mode == mode]
    names = [name for name in CONTENDERS if any(name in c.rows for c in comparisons)]
    height = _BAR * len(comparisons) * (len(names) + 1) + 0.6
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{op} {mode}", "font.size": 9}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        for index, name in enumerate(names):
            _bars(axes, comparisons, name, index, len(names))
        _dress(axes, comparisons, len(names))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    label = f"{op}, {MODES[mode]}: time in multiples of a copy, of {', '.join(names)}"
    return _inline(out.getvalue(), label)


def _bars(axes: Axes, comparisons: list[Comparison], name: str, index: int, count: int) -> None:
    for place, comparison in enumerate(comparisons):
        row, copy = comparison.rows.get(name), comparison.rows["copy"].p50_ms
        if row is None or row.x_of_copy is None or row.p20_ms is None or row.p80_ms is None or not copy:
            continue
        y, colour = place * (count + 1) + index, _COLOURS[name]
        axes.barh(y, row.x_of_copy, height=0.86, color=colour)
        axes.plot((row.p20_ms / copy, row.p80_ms / copy), (y, y), color=_COLOURS["spread"], linewidth=1)
        end = max(row.x_of_copy, row.p80_ms / copy)
        axes.annotate(number(row.x_of_copy), (end, y), (3, 0), textcoords="offset points", va="center", fontsize=7.5)


def _dress(axes: Axes, comparisons: list[Comparison], count: int) -> None:
    middle = (count - 1) / 2
    labels = [f"{c.case.size}\n{c.case.layout}" for c in comparisons]
    axes.set_yticks([place * (count + 1) + middle for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("x copy (1 = the time of out.copy_(x))")
    axes.margins(x=0.12, y=0.02)
    axes.axvline(1, color=_COLOURS["rule"], linewidth=1, linestyle="--", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["rule"])
    axes.tick_params(length=0)


def _inline(svg: str, label: str) -> str:
    """The svg element alone, as wide as its place; colours and font are left to the page."""
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox
    body = svg[svg.index(">", viewbox.end()) + 1 :]
    return f'<svg {viewbox[0]} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
