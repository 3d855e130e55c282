"""Prints tables on the terminal, with rich if it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; columns that hold only numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = range(len(header))
    numeric = [all(row[i].replace(".", "", 1).isdigit() for row in cells) for i in columns]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in columns]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in [header, *cells]:
            print("  ".join(row[i].rjust(widths[i]) if numeric[i] else row[i].ljust(widths[i]) for i in columns))
        return
    table = Table(title=title, title_justify="left")
    for i in columns:
        table.add_column(header[i], justify="right" if numeric[i] else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    Console(width=sum(widths) + 3 * len(header) + 1).print(table)
