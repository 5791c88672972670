"""Tables: aligned columns for people, and as wide as they need to be when piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Numbers to the right, text to the left, None as a dash."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    body = [tuple(row) for row in rows]
    for index, title in enumerate(head):
        numeric = all(isinstance(row[index], int | float) for row in body)
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    # Piped, rich would fold at 80 columns, and a script would see torn words.
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, markup=False, highlight=False, emoji=False).print(table)
