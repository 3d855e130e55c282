"""Shows the report on a terminal, and the progress while it is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from . import compare as comparing
from . import tables
from .cases import Case
from .compare import Changes
from .results import Report
from .whole_model import ModelReport

_STYLES = {"win": "green", "loss": "bold red", "even": "yellow", "": ""}
_WIDTH = 240  # columns without a terminal to ask
_DETAILED = 150  # columns from which on the details fit


def console() -> Console:
    """Returns a console that keeps wide tables whole if the output is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH)


def tracked(cases: Iterable[Case], out: Console) -> Iterator[Case]:
    """Yields the cases and shows a progress bar; without a terminal, prints a line for each case."""
    cases = list(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for index, case in enumerate(cases, 1):
            progress.update(task, description=str(case))
            if not out.is_terminal:
                out.print(f"[{index}/{len(cases)}] {case}", markup=False, highlight=False)
            yield case
            progress.advance(task)


def show(report: Report, out: Console) -> None:
    """Prints the tables, the cases left out, the failures, and the losses last, where they are seen."""
    for table in (*tables.module_tables(report).values(), tables.mean_table(report)):
        show_table(table, out)
    for note in tables.notes(report):
        out.print(note, style="dim", highlight=False)
    for line in report.left_out:
        out.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    for row in report.failures:
        out.print(f"failed: {row}", style="red", highlight=False, markup=False)
    out.print(tables.verdict(report), style="bold red" if report.losses else "green", highlight=False)
    if report.losses:
        show_table(tables.loss_table(report.losses), out)


def show_model(report: ModelReport, out: Console) -> None:
    """Prints what `accelerate` swapped, the figures, and what attention costs."""
    out.print(report.accelerated, highlight=False, markup=False)
    show_table(report.table(), out)
    for line in report.verdicts():
        out.print(line, highlight=False, markup=False)


def show_comparison(found: Changes, out: Console) -> None:
    """Prints what differs beside the figures, then improvements, and regressions last, where they are seen."""
    for line in found.differing:
        out.print(f"differs: {line}", style="yellow", highlight=False, markup=False)
    if found.drift:
        drift = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found.drift.items())
        out.print(f"copy and rivals in the same cases, new / old time: {drift}", highlight=False)
    for name, rows in (("old", found.only_old), ("new", found.only_new)):
        for row in rows:
            out.print(f"only in {name}: {row}", style="yellow", highlight=False, markup=False)
    for title, changes in (("improvements", found.improvements), ("regressions", found.regressions)):
        if changes:
            show_table(comparing.table(title, changes), out)
    out.print(found.verdict, style="bold red" if found.regressions else "green", highlight=False)


def show_table(table: tables.Table, out: Console) -> None:
    """Prints a table; on a narrow terminal it leaves out the details."""
    kept = [i for i, column in enumerate(table.columns) if out.width >= _DETAILED or column not in table.details]
    title = table.title or None
    found = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index in kept:
        label = index < table.labels
        found.add_column(table.columns[index], justify="left" if label else "right", no_wrap=label, overflow="fold")
    for row in table.rows:
        found.add_row(*(Text(row[index].text, _STYLES[row[index].tone]) for index in kept))
    out.print(found)
