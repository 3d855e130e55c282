"""The report on a terminal, and the progress while it is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from . import tables
from .cases import Case
from .results import Report
from .whole_model import ModelReport

_STYLES = {"win": "green", "loss": "bold red", "even": "yellow", "": ""}
_WIDTH = 140  # where there is no terminal to ask


def console() -> Console:
    """A console that does not fold wide tables where it is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH)


def tracked(cases: Iterable[Case], out: Console) -> Iterator[Case]:
    """The cases, with a progress bar; where there is no terminal, a line for each."""
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
    """Prints the tables, what was left out, and the losses last, where they are seen."""
    for table in (*tables.module_tables(report), tables.mean_table(report)):
        out.print(_rich(table))
    for note in tables.NOTES:
        out.print(note, style="dim", highlight=False)
    for line in report.left_out:
        out.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    for row in report.failures:
        out.print(f"failed: {row}", style="red", highlight=False, markup=False)
    out.print(tables.verdict(report), style="bold red" if report.losses else "green", highlight=False)
    for loss in report.losses:
        out.print(f"  {loss}", style="red", highlight=False, markup=False)


def show_model(report: ModelReport, out: Console) -> None:
    """Prints what was swapped, the figures, and what attention costs."""
    out.print(report.accelerated, highlight=False, markup=False)
    out.print(_rich(report.table()))
    for line in report.verdicts():
        out.print(line, highlight=False, markup=False)


def _rich(table: tables.Table) -> RichTable:
    found = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        label = index < table.labels
        found.add_column(column, justify="left" if label else "right", no_wrap=label)
    for row in table.rows:
        found.add_row(*(Text(cell.text, _STYLES[cell.tone]) for cell in row))
    return found
