"""Renders the report as one self-contained HTML page."""

from __future__ import annotations

from html import escape

from ..measure.step import MODES
from . import bars, curves, html, tables
from .cases import CONTENDERS
from .results import Mean, Report
from .whole_model import ModelReport

_LINES = 6  # the most that one plot shows well


def render(report: Report) -> str:
    """Renders a report of modules."""
    losses = report.losses
    found = tables.module_tables(report)
    body = [
        f"<h1>{escape(tables.TITLE)}</h1>",
        f'<p class="quiet">{escape(tables.machine_line(report))}</p>',
        f'<p class="{"loss" if losses else "win"}">{escape(tables.verdict(report))}</p>',
        _contents(report),
        '<div class="cards">' + "".join(_card(mean, report) for mean in report.means) + "</div>",
        '<h2 id="losses">Where we lose</h2>',
        html.table(tables.loss_table(losses)) if losses else "<p>In no case that was measured.</p>",
        *html.titled("Failed", report.failures),
        *html.titled("Left out", report.left_out),
        '<h2 id="overview">All modules</h2>',
        _key(report),
        *(_overview(report, mode) for mode in report.modes),
        "<h3>Peak memory, geometric means</h3>",
        html.figures({f"{mode}: {MODES[mode]}": bars.memory(report, mode) for mode in report.modes}),
        html.table(tables.mean_table(report)),
        *(_module(report, op, [table for key, table in found.items() if key[0] == op]) for op in report.ops),
        '<h2 id="notes">How to read it</h2>',
        html.items(tables.notes(report)),
        '<h2 id="machine">Machine and settings</h2>',
        html.facts(report.facts),
    ]
    return html.document(tables.TITLE, body)


def render_model(report: ModelReport) -> str:
    """Renders the report of a whole model."""
    table = report.table()
    body = [
        f"<h1>{escape(table.title)}</h1>",
        html.table(tables.Table("", table.columns, table.rows, table.labels)),
        html.items(report.verdicts()),
        f'<h2>Modules that accelerate swapped</h2><pre tabindex="0">{escape(report.accelerated)}</pre>',
        "<h2>Machine and settings</h2>",
        html.facts(report.facts),
    ]
    return html.document(table.title, body)


def _contents(report: Report) -> str:
    places = {"losses": "where we lose", "overview": "all modules"} | {op: op for op in report.ops}
    places |= {"notes": "how to read it", "machine": "machine"}
    return "<nav>" + "".join(f'<a href="#{place}">{escape(name)}</a>' for place, name in places.items()) + "</nav>"


def _card(mean: Mean, report: Report) -> str:
    lines = [
        f'<dt class="large">{label}</dt><dd class="large {tables.tone(speedup)}">{tables.factor(speedup)}</dd>'
        for label in report.pairs
        if (speedup := mean.speedup[label]) is not None
    ]
    figures = {"fused: time / copy": mean.x_of_copy, "saved / x": mean.saved, "peak / x": mean.peak}
    for label, found in figures.items():
        if "fused" in found and found["fused"] is not None:
            lines.append(f"<dt>{label}</dt><dd>{tables.number(found['fused'])}</dd>")
    return f'<section class="card"><h3>{escape(mean.title)}</h3><dl>{"".join(lines)}</dl></section>'


def _key(report: Report) -> str:
    names = {name: CONTENDERS[name].about for name in report.contenders}
    spans = (f'<span><i style="background: var(--{n})"></i>{n}: {escape(about)}</span>' for n, about in names.items())
    return f'<p class="key quiet">{" ".join(spans)}</p>'


def _overview(report: Report, mode: str) -> str:
    comparisons = [c for c in report.comparisons if c.case.mode == mode]
    found = {
        "Speed-up against size: dots are cases, lines geometric means": curves.speedups(
            report, comparisons, MODES[mode]
        ),
        "Roofline: bytes that a streaming kernel must move, over the time": curves.roofline(report, mode),
    }
    return f"<h3>{mode}: {MODES[mode]}</h3>{html.figures(found)}"


def _module(report: Report, op: str, found: list[tables.Table]) -> str:
    by_mode = {mode: [c for c in report.of(op) if c.case.mode == mode] for mode in report.modes}
    by_mode = {mode: found for mode, found in by_mode.items() if found}
    plots = {f"{mode}: {MODES[mode]}": bars.times(report, op, mode) for mode in by_mode}
    if len(by_mode) * len(report.pairs) <= _LINES:
        plots["Speed-up against size"] = curves.speedups(report, report.of(op), op)
    else:
        for mode, comparisons in by_mode.items():
            plots[f"Speed-up against size, {mode}"] = curves.speedups(report, comparisons, op)
    return f'<h2 id="{op}">{escape(op)}</h2>{_key(report)}{html.figures(plots)}' + "".join(map(html.table, found))
