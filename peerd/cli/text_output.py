"""Text for people: tables, which are as wide as they need to be when piped, and counted nouns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SEPARATOR = 2  # Spaces between two columns
UNLIMITED_WIDTH = 10_000
"""The width of a pipe or a file. rich would assume 80 and wrap there, which splits words for scripts."""


@dataclass(frozen=True)
class Column:
    title: str
    cells: Sequence[object]  # None is shown as a dash. Numbers are aligned right, text left.
    style: Callable[[str], str] | None = None
    """Returns the style of a cell's text, in the terms of rich, for terminals."""

    @property
    def width(self) -> int:
        return max(len(self.title), *(len(as_text(cell)) for cell in self.cells), 0)


def counted(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"


def time_text(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns that do not fit the terminal are left out, the last ones first, and named below the table."""
    body = [tuple(row) for row in rows]
    columns = [Column(title, [row[index] for row in body]) for index, title in enumerate(head)]
    print_columns(columns)


def print_columns(columns: Sequence[Column], console: Console | None = None) -> None:
    console = console or make_console()
    shown = columns_that_fit(columns, console.width)
    console.print(build_table(shown))
    if note := left_out(columns, shown):
        console.print(note, soft_wrap=True)


def make_console() -> Console:
    """Standard output, as wide as the terminal."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            """rich would exit with 1."""
            raise BrokenPipeError

    width = None if sys.stdout.isatty() else UNLIMITED_WIDTH
    return PipeConsole(width=width, markup=False, highlight=False, emoji=False)


def columns_that_fit(columns: Sequence[Column], width: int) -> list[Column]:
    """The first column, and each further one that has room beside those chosen before it."""
    shown, used = list(columns[:1]), columns[0].width
    for column in columns[1:]:
        if used + SEPARATOR + column.width <= width:
            shown.append(column)
            used += SEPARATOR + column.width
    return shown


def left_out(columns: Sequence[Column], shown: Sequence[Column]) -> str:
    titles = [column.title for column in columns if column not in shown]
    return (
        f"(left out: {', '.join(titles)}; a wider terminal or --json shows all)" if titles else ""
    )


def build_table(columns: Sequence[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, SEPARATOR - 1, 0, 0)
    )
    for column in columns:
        some = [cell for cell in column.cells if cell is not None]
        numeric = bool(some) and all(isinstance(cell, int | float) for cell in some)
        table.add_column(column.title, justify="right" if numeric else "left", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        cells = []
        for column, cell in zip(columns, row, strict=True):
            text = as_text(cell)
            cells.append(Text(text, style=column.style(text) if column.style else ""))
        table.add_row(*cells)
    return table


def as_text(cell: object) -> str:
    return "-" if cell is None else str(cell)
