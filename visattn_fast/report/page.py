"""The report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from html import escape

from . import plots, tables
from .cases import CONTENDERS, MODES
from .results import RIVALS, Mean, Report

_STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --paper: #fcfcfb; --card: #f1f2f0; --ink: #1d2126; --quiet: #5d646d; --rule: #c9cdd1; --spread: #1d2126;
  --eager: #9aa3ad; --compile: #5b8fd6; --fused: #e07b1f; --win: #13713a; --loss: #b3261e; --even: #7a5d00; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1e2226; --ink: #e8eaec; --quiet: #a0a8b0; --rule: #3b4249; --spread: #e8eaec;
  --eager: #77808a; --compile: #5a8cd0; --fused: #f0923c; --win: #6fd394; --loss: #ff8a80; --even: #e3c35a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 var(--font); }
h1 { font-size: clamp(1.4rem, 5vw, 2.1rem); line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 62rem; } ul { padding-left: 1.2rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.win { color: var(--win); } .loss { color: var(--loss); font-weight: 600; } .even { color: var(--even); }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); margin: 1.25rem 0; }
.card { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; }
.card h3 { margin: 0; } .card dl { display: grid; grid-template-columns: auto auto; gap: 0 1rem; margin: .4rem 0 0; }
.card dt { color: var(--quiet); } .card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.card dd.large { font-size: 1.35rem; line-height: 1.4; } .card dt.large { align-self: center; }
.plots { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; max-width: 34rem; } figure svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font-family: var(--font); }
.key span { white-space: nowrap; margin-right: 1rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .35em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--quiet); font-weight: 600; } .label { text-align: left; }
td:first-child, th:first-child { padding-left: 0; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dl.facts dt { color: var(--quiet); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
"""


def render(report: Report) -> str:
    """The page."""
    title = escape(tables.TITLE)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">{escape(tables.machine_line(report))}</p>',
        '<div class="cards">' + "".join(_card(mean) for mean in report.means) + "</div>",
        "<h2>Where fused loses</h2>",
        f'<p class="{"loss" if report.losses else "win"}">{escape(tables.verdict(report))}</p>',
        _list(report.losses),
        *_titled("Failed", report.failures),
        *_titled("Left out", report.left_out),
        *(_module(report, op) for op in report.ops),
        *_titled("How to read it", tables.NOTES),
        "<h2>Machine and settings</h2>",
        _facts(asdict(report.machine) | report.settings | {"seconds": round(report.seconds)}),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _card(mean: Mean) -> str:
    lines = [
        f'<dt class="large">vs {rival}</dt><dd class="large {tables.tone(speedup)}">{tables.factor(speedup)}</dd>'
        for rival in RIVALS
        if (speedup := mean.speedup[rival]) is not None
    ]
    for label, found in (("time, x copy", mean.x_of_copy), ("saved, x", mean.saved), ("peak, x", mean.peak)):
        if any(found.values()):
            lines.append(f"<dt>{label}</dt><dd>{' / '.join(tables.number(found.get(n), 1) for n in CONTENDERS)}</dd>")
    return f'<section class="card"><h3>{escape(mean.op)}: {mean.mode}</h3><dl>{"".join(lines)}</dl></section>'


def _module(report: Report, op: str) -> str:
    modes = [mode for mode in MODES if any(c.case.mode == mode for c in report.of(op))]
    key = "".join(f'<span><i style="background: var(--{n})"></i>{n}: {escape(w)}</span>' for n, w in CONTENDERS.items())
    figures = "".join(
        f"<figure>{plots.times(report, op, mode)}<figcaption>{mode}: {MODES[mode]}</figcaption></figure>"
        for mode in modes
    )
    prefix = f"{op}: "
    found = [_table(t) for t in tables.module_tables(report) if t.title.startswith(prefix)]
    return f'<h2>{escape(op)}</h2><p class="key quiet">{key}</p><div class="plots">{figures}</div>' + "".join(found)


def _table(table: tables.Table) -> str:
    def kind(index: int, tone: str = "") -> str:
        return f' class="{tone or "label"}"' if tone or index < table.labels else ""

    head = "".join(f"<th{kind(i)}>{escape(column)}</th>" for i, column in enumerate(table.columns))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind(i, cell.tone)}>{escape(cell.text)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return f'<h3>{escape(table.title)}</h3><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _facts(facts: dict[str, object]) -> str:
    return (
        '<dl class="facts">'
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
        + "</dl>"
    )


def _titled(title: str, items: Iterable[object]) -> list[str]:
    found = _list(items)
    return [f"<h2>{escape(title)}</h2>", found] if found else []


def _list(items: Iterable[object]) -> str:
    lines = "".join(f"<li>{escape(str(item))}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""
