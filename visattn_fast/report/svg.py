"""Turns matplotlib's figures into SVG with the colours and font of the page, so that light and dark mode apply."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import CONTENDERS

# Stand-ins for CSS variables: each colour that matplotlib writes becomes var(--name).
COLOURS = {name: f"#{index:02x}{index:02x}01" for index, name in enumerate((*CONTENDERS, "spread", "rule"), 1)}
WIDTH = 4.2  # inches


def drawn(paint: Callable[[Axes], None], height: float, label: str) -> str:
    """Returns the drawing of ``paint`` as an svg element; ``label`` describes it in words."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(COLOURS["rule"])
        axes.tick_params(which="both", length=0)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), label)


def grid(axes: Axes) -> None:
    """Draws a faint grid behind a plot."""
    axes.grid(color=COLOURS["rule"], linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)


def _inline(svg: str, label: str) -> str:
    """Returns the svg element alone, as wide as its container, with colours and font left to the page."""
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox
    body = svg[svg.index(">", viewbox.end()) + 1 :]
    head = f'<svg {viewbox[0]} role="img" aria-label="{escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + body
