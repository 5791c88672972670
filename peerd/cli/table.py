"""Tables: aligned columns for people, and as wide as they need to be when piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

# What box.SIMPLE_HEAD puts between two columns.
SEPARATOR = 3


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Numbers to the right, text to the left, None as a dash.

    On a terminal that is too narrow, the last columns are left out, and that is said.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    body = [tuple(row) for row in rows]
    # Piped, rich would fold at 80 columns, and a script would see torn words.
    console = Console(
        width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False, emoji=False
    )
    shown = _columns_that_fit(head, body, console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, title in enumerate(head[:shown]):
        numeric = all(isinstance(row[index], int | float) for row in body)
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for row in body:
        table.add_row(*(_text(cell) for cell in row[:shown]))
    console.print(table)
    if shown < len(head):
        console.print(
            f"(left out: {', '.join(head[shown:])}; a wider terminal or --json shows all)"
        )


def _columns_that_fit(head: Sequence[str], body: Sequence[Sequence[object]], width: int) -> int:
    used = 0
    for index, title in enumerate(head):
        used += max(len(title), *(len(_text(row[index])) for row in body), 0) + SEPARATOR
        if used - SEPARATOR > width:
            return max(index, 1)
    return len(head)


def _text(cell: object) -> str:
    return "-" if cell is None else str(cell)
