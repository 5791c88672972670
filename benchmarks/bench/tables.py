"""Tables, and the figures in their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right; a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def ratio(figures: Mapping[int, float], base: Mapping[int, float]) -> float | None:
    """The median of the ratios within each round, whose two figures met the same machine."""
    ratios = [figure / base[number] for number, figure in figures.items() if number in base]
    return median(ratios) if ratios else None


def times(value: float | None) -> str:
    return "-" if value is None else f"x {value:.2f}"


def mib(count: float, digits: int = 1) -> str:
    return f"{count / 2**20:.{digits}f} MiB"


def spread_ms(seconds: Sequence[float]) -> tuple[str, str, str, str]:
    """Median, minimum, maximum and how many there are."""
    middle, least, most = (f"{f(seconds) * 1e3:,.1f} ms" for f in (median, min, max))
    return middle, least, most, str(len(seconds))
