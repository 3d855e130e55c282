"""Renders the report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from . import tables
from .results import Report
from .whole_model import ModelReport


def render(report: Report) -> str:
    """Renders a report of modules."""
    losses = report.losses
    parts = [
        f"# {tables.TITLE}",
        tables.machine_line(report),
        _table(tables.mean_table(report)),
        f"## Where we lose\n\n{tables.verdict(report)}",
        *[_table(tables.loss_table(losses))] * bool(losses),
        *(_table(table) for table in tables.module_tables(report).values()),
        *_listed("Failed", report.failures),
        *_listed("Left out", report.left_out),
        *_listed("How to read it", tables.notes(report)),
        *_listed("Machine and settings", (f"{name}: {value}" for name, value in report.facts.items())),
    ]
    return "\n\n".join(parts) + "\n"


def render_model(report: ModelReport) -> str:
    """Renders the report of a whole model."""
    facts = (f"{name}: {value}" for name, value in report.facts.items())
    parts = [
        _table(report.table()),
        *_listed("", report.verdicts()),
        f"```\n{report.accelerated}\n```",
        *_listed("Machine and settings", facts),
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: tables.Table) -> str:
    alignment = ["---" if index < table.labels else "---:" for index in range(len(table.columns))]
    cells = [table.columns, alignment, *([_cell(cell) for cell in row] for row in table.rows)]
    title = f"## {table.title}\n\n" if table.title else ""
    return title + "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(cell: tables.Cell) -> str:
    return f"**{cell.text}**" if cell.tone == "loss" else cell.text


def _listed(title: str, items: Iterable[object]) -> list[str]:
    """Builds a list under a heading; nothing if there are no items."""
    lines = "\n".join(f"- {item}" for item in items)
    return [f"## {title}"] * bool(lines and title) + [lines] * bool(lines)
