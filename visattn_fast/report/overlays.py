"""Draws the gates of attention modules for a photograph: maps over it, channel gates as bars."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

_LABELS, _MARGIN, _GAP, _COLOURS = 2.2, 0.25, 0.34, 0.66  # inches: left column, borders, between lines, a colour bar
_BARS = 0.55  # inches: height of bars
_SPAN = 0.1  # least range of the colours, as a share of a map's largest value: a constant map looks flat
_SHOWN = (1, 99)  # percentiles at the ends of the colours: one bright pixel must not leave the rest dark
_SHADES = ("#4c6a92", "#d8973c", "#7a9e7e", "#a05a6b")


@dataclass(frozen=True)
class View:
    """The effect of one attention module on one image.

    Attributes:
        gates: the gates by name, as the module's ``attention`` returns them.
        gain: ``[H, W]``, the norm of a pixel's features after the module over the norm before it.
    """

    gates: dict[str, Tensor]
    gain: Tensor


@dataclass(frozen=True)
class Network:
    """A network: its name, a note about it, and a view for each of its blocks."""

    name: str
    note: str
    views: list[View]


@dataclass(frozen=True)
class Line:
    """A row of panels, one per block: maps ``[H, W]``, or the bars of M branches ``[M, C]``."""

    label: str
    is_map: bool
    panels: list[np.ndarray]


def file_types() -> dict[str, str]:
    """Returns the file types that a figure can be written as, by suffix."""
    return Figure().canvas.get_supported_filetypes()


def lines(views: list[View]) -> list[Line]:
    """Returns the lines to draw for a network: first its maps, then its gates with one value per channel.

    A network without maps shows its gain instead: what a channel gate does at a pixel depends on the features there.
    """
    found: dict[str, Line] = {}

    def add(label: str, is_map: bool, panel: np.ndarray) -> None:
        found.setdefault(label, Line(label, is_map, [])).panels.append(panel)

    for view in views:
        gates = {kind: gate[0].float().numpy() for kind, gate in view.gates.items()}
        if {"height", "width"} <= gates.keys():
            gates["height x width"] = gates.pop("height") * gates.pop("width")
        for kind, gate in gates.items():
            if gate.shape[-2:] != (1, 1):  # [1, H, W] or [C, H, W]; along one axis [C, H, 1] or [C, 1, W]
                panel = np.broadcast_to(gate.mean(0), view.gain.shape)
                add(f"{kind} gate" + (", mean over channels" if len(gate) > 1 else ""), True, panel)
                continue
            branches = gate.reshape(-1, gate.shape[-3])  # of [C, 1, 1], or [M, C, 1, 1]
            label = f"{kind} gate, sorted" if len(branches) == 1 else f"{kind} gates, sorted by the first"
            add(label, False, branches[:, branches[0].argsort()[::-1]])
    if not any(line.is_map for line in found.values()):
        gains = [view.gain.float().numpy() for view in views]
        return [Line("gain at a pixel: |output| / |input|", True, gains), *found.values()]
    return sorted(found.values(), key=lambda line: not line.is_map)


def draw(photograph: Tensor, networks: list[Network], caption: str) -> Figure:
    """Draws the photograph ``[H, W, 3]`` beside the caption, and below it, for each network, a line for each gate."""
    cell = 3.6 if len(networks) == 1 else 2.8
    tall = cell * photograph.shape[0] / photograph.shape[1]
    groups = [(network, lines(network.views)) for network in networks]
    columns = max(len(network.views) for network in networks)
    width = 2 * _MARGIN + _LABELS + columns * (cell + _COLOURS)
    below = [_GAP + sum(_GAP + (tall if line.is_map else _BARS) for line in group) for _, group in groups]
    page = _Page(width, 2 * _MARGIN + tall + sum(below))

    axes = page.axes(_MARGIN, _MARGIN, cell, tall)
    axes.imshow(photograph.numpy())
    axes.axis("off")
    page.text(2 * _MARGIN + cell, _MARGIN, caption, (width - cell - 3 * _MARGIN) * 13, fontsize=10)
    top = _MARGIN + tall
    for network, group in groups:
        top += _GAP
        page.text(_MARGIN, top + _GAP, network.name, 27, fontsize=13, fontweight="bold")
        page.text(_MARGIN, top + _GAP + 0.26, network.note, 29, fontsize=8.5, color="#666666")
        for index, line in enumerate(group):
            top += _GAP
            high = tall if line.is_map else _BARS
            page.text(_MARGIN, top + (0.75 if index == 0 else 0), line.label, 28, fontsize=9.5)
            for block, panel in enumerate(line.panels):
                left = _MARGIN + _LABELS + block * (cell + _COLOURS)
                axes = page.axes(left, top, cell, high)
                if line.is_map:
                    title = f"block {block + 1}: {panel.shape[1]} x {panel.shape[0]}"
                    _overlay(axes, page.axes(left + cell + 0.06, top, 0.09, high), panel, photograph)
                else:
                    title = f"block {block + 1}: {panel.shape[1]} channels"
                    _bars(axes, panel)
                axes.set_title(title, fontsize=8.5, pad=3)
            top += high
    return page.figure


class _Page:
    """A figure with positions in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=110)

    def axes(self, left: float, top: float, wide: float, high: float) -> Any:
        place = left / self.width, 1 - (top + high) / self.height, wide / self.width, high / self.height
        return self.figure.add_axes(place)

    def text(self, left: float, top: float, text: str, letters: float, **style: Any) -> None:
        filled = "\n".join(textwrap.fill(part, int(letters)) for part in text.splitlines())
        self.figure.text(left / self.width, 1 - top / self.height, filled, va="top", linespacing=1.35, **style)


def _overlay(axes: Any, colours: Any, values: np.ndarray, photograph: Tensor) -> None:
    height, width = photograph.shape[:2]
    frame = (-0.5, width - 0.5, height - 0.5, -0.5)
    low, high = np.percentile(values, _SHOWN).tolist()
    span = _SPAN * max(abs(low), abs(high))
    spare = max(0.0, span - (high - low)) / 2
    axes.imshow(photograph.float().mean(2).numpy(), cmap="gray", extent=frame)
    drawn = axes.imshow(
        values, "inferno", alpha=0.65, extent=frame, interpolation="bilinear", vmin=low - spare, vmax=high + spare
    )
    axes.axis("off")
    bar = axes.figure.colorbar(drawn, cax=colours, ticks=[low, high] if high - low > 0.2 * span else [(low + high) / 2])
    bar.ax.set_yticklabels([f"{t if abs(t) > 0.01 * span else 0:.2g}" for t in bar.get_ticks()], fontsize=7.5)
    bar.outline.set_visible(False)


def _bars(axes: Any, values: np.ndarray) -> None:
    below = np.zeros(values.shape[1])
    for branch, shade in zip(values, _SHADES, strict=False):
        axes.bar(range(len(branch)), branch, bottom=below, width=0.85, color=shade)
        below = below + branch
    axes.set(xticks=[], xlim=(-0.6, values.shape[1] - 0.4), ylim=(min(0.0, below.min()), max(1.0, below.max())))
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
