"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from . import tables
from .results import Report
from .whole_model import ModelReport


def render(report: Report) -> str:
    """The whole of it."""
    parts = [
        f"# {tables.TITLE}",
        tables.machine_line(report),
        _table(tables.mean_table(report)),
        f"## Where fused loses\n\n{tables.verdict(report)}",
        *_listed("", report.losses),
        *(_table(table) for table in tables.module_tables(report)),
        *_listed("Failed", report.failures),
        *_listed("Left out", report.left_out),
        *_listed("How to read it", tables.NOTES),
    ]
    return "\n\n".join(parts) + "\n"


def render_model(report: ModelReport) -> str:
    """A model's report."""
    parts = [_table(report.table()), *_listed("", report.verdicts()), f"```\n{report.accelerated}\n```"]
    return "\n\n".join(parts) + "\n"


def _table(table: tables.Table) -> str:
    alignment = ["---" if index < table.labels else "---:" for index in range(len(table.columns))]
    cells = [table.columns, alignment, *([_cell(cell) for cell in row] for row in table.rows)]
    return f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(cell: tables.Cell) -> str:
    return f"**{cell.text}**" if cell.tone == "loss" else cell.text


def _listed(title: str, items: Iterable[object]) -> list[str]:
    """A list under its title; nothing where there are no items."""
    lines = "\n".join(f"- {item}" for item in items)
    return [f"## {title}"] * bool(lines and title) + [lines] * bool(lines)
