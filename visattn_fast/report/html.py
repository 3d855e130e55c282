"""The parts of an HTML page: the frame and its style, tables, figures, lists and facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from .tables import Table

# Colours in light and dark, and what drawings need beside them.
_DRAWING_STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --paper: #fcfcfb; --card: #f1f2f0; --ink: #1d2126; --quiet: #5d646d; --rule: #c9cdd1; --spread: #1d2126;
  --eager: #858e98; --compile: #3f7cc9; --compile-max-autotune: #8a5fc4;
  --timm: #3d8f5f; --timm-compile: #1f8f96; --fused: #d96f14; --fused-compile: #b5386b;
  --win: #13713a; --loss: #b3261e; --even: #7a5d00; --link: #1f5fae; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1e2226; --ink: #e8eaec; --quiet: #a0a8b0; --rule: #3b4249; --spread: #e8eaec;
  --eager: #8b949e; --compile: #5f97dc; --compile-max-autotune: #a987e0;
  --timm: #62b586; --timm-compile: #45b6bd; --fused: #f0923c; --fused-compile: #e0709c;
  --win: #6fd394; --loss: #ff8a80; --even: #e3c35a; --link: #8ab8f0; } }
svg text { fill: var(--ink); font-family: var(--font); }
"""
_STYLE = (
    _DRAWING_STYLE
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 var(--font); }
h1 { font-size: clamp(1.4rem, 5vw, 2.1rem); line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; scroll-margin-top: .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 62rem; overflow-wrap: anywhere; } ul { padding-left: 1.2rem; }
a { color: var(--link); } nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: .9rem 0; font-size: .95rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.win { color: var(--win); } .loss { color: var(--loss); font-weight: 600; } .even { color: var(--even); }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); margin: 1.25rem 0; }
.card { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; }
.card h3 { margin: 0; }
.card dl { display: grid; grid-template-columns: auto auto; gap: 0 1rem; align-items: baseline; margin: .4rem 0 0; }
.card dt { color: var(--quiet); } .card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.card dd.large { font-size: 1.35rem; line-height: 1.4; }
.plots { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; max-width: 34rem; } figure svg { width: 100%; height: auto; display: block; }
.key span { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .35em; }
.scroll { overflow: auto; max-height: 34rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .28rem .45rem; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--quiet); font-weight: 600; position: sticky; top: 0; background: var(--paper); }
.label { text-align: left; }
td:first-child, th:first-child { padding-left: 0; }
pre { overflow-x: auto; background: var(--card); border-radius: .6rem; padding: .8rem 1rem; font-size: .86rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dl.facts dt { color: var(--quiet); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
"""
)


def document(title: str, body: Iterable[str]) -> str:
    """Builds a whole page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def drawing(svg: str) -> str:
    """An SVG file of its own, 480 pixels wide, with the colours of a page."""
    head, tag, rest = svg.partition(">")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="480" ', 1)
    return f"{head}{tag}<style>{_DRAWING_STYLE}</style>{rest}"


def table(found: Table) -> str:
    """Builds a table in a box that scrolls if the table is too wide, with its title above."""

    def kind(index: int, tone: str = "") -> str:
        return f' class="{tone or "label"}"' if tone or index < found.labels else ""

    head = "".join(f"<th{kind(i)}>{escape(column)}</th>" for i, column in enumerate(found.columns))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind(i, cell.tone)}>{escape(cell.text)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in found.rows
    )
    title = f"<h3>{escape(found.title)}</h3>" if found.title else ""
    return f'{title}<div class="scroll" tabindex="0"><table><tr>{head}</tr>{rows}</table></div>'


def figures(found: Mapping[str, str]) -> str:
    """Puts pictures, given by caption, side by side as far as there is room; leaves empty ones out."""
    shown = (f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for text, svg in found.items() if svg)
    return f'<div class="plots">{"".join(shown)}</div>'


def facts(found: Mapping[str, object]) -> str:
    """Lists names and values."""
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in found.items())
    return f'<dl class="facts">{"".join(lines)}</dl>'


def items(found: Iterable[object]) -> str:
    """Builds a list; empty if there are no items."""
    lines = "".join(f"<li>{escape(str(item))}</li>" for item in found)
    return f"<ul>{lines}</ul>" if lines else ""


def titled(title: str, found: Iterable[object]) -> list[str]:
    """Builds a list under a heading; nothing if there are no items."""
    lines = items(found)
    return [f"<h2>{escape(title)}</h2>", lines] if lines else []
