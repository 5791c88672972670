"""The chart (PNG) of a run, with a panel per regime. matplotlib is imported only for ``--chart``.

Its background is white, so it is readable on a dark page as well.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import Machine
from regimes.rates import Throughput
from regimes.regime_tables import closed_loops, of_kind
from regimes.regimes import Regime, Result

INK = "#1f2328"
FAINT = "#656d76"
COLOURS = {"peerd": "#0969da", "c": "#8c959f", "other": "#d4a72c"}
MEANINGS = {"peerd": "peerd", "c": "C, the kernel's limit", "other": "other Python stacks"}
COLUMNS = 2
PANEL_INCHES = (6.2, 0.34)  # Width of a panel, and height of a bar in it
MAX_OUTLIER = 3.0  # A bar that is longer than the others by this factor is cut


@dataclass(frozen=True)
class Bar:
    label: str
    kind: str
    value: float
    low: float
    high: float


UNITS = {
    "rate": "million messages/s, more is better",
    "cpu": "CPU microseconds per message, less is better",
    "round trip": "microseconds, one request at a time: p50 (bar) and p99 (line), less is better",
}


def draw(
    file: Path, machine: Machine, regimes: Mapping[str, Regime], results: Sequence[Result]
) -> None:
    """Raises ImportError without matplotlib, OSError when the file cannot be written."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    drawn = ((regime, bars_of(name, regime, results)) for name, regime in regimes.items())
    panels = [(regime, bars) for regime, bars in drawn if bars]
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [max(len(bars) for _, bars in row) + 2.2 for row in rows]
    figure, grid = pyplot.subplots(
        len(rows),
        COLUMNS,
        squeeze=False,
        figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * sum(heights) + 0.9),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for row, axes_row in zip(rows, grid, strict=True):
        for axes in axes_row[len(row) :]:
            axes.axis("off")
        for (regime, bars), axes in zip(row, axes_row, strict=False):
            _panel(axes, regime, bars)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in COLOURS]
    place = {"loc": "outside upper right", "ncols": 3, "frameon": False}
    figure.legend(handles, MEANINGS.values(), labelcolor=INK, **place)
    figure.supxlabel(
        f"{machine.cpu}, {machine.cores} CPUs, Linux {machine.kernel}, Python {platform.python_version()}; "
        "64-byte envelopes over loopback; median and range of the rounds",
        fontsize=9,
        color=FAINT,
    )
    figure.savefig(file, dpi=130, facecolor="white")
    pyplot.close(figure)


def bars_of(name: str, regime: Regime, results: Sequence[Result]) -> list[Bar]:
    bars = []
    for receiver, spec in regime.receivers.items():
        if regime.figure == "round trip":
            if trips := closed_loops(results, name, receiver):
                p50, p99 = (
                    median(getattr(r, f) for r in trips) / 1e3 for f in ("p50_ns", "p99_ns")
                )
                bars.append(Bar(spec.title, spec.kind, p50, p50, p99))
        elif runs := of_kind(Throughput, results, name, receiver):
            figures = [r.rate / 1e6 if regime.figure == "rate" else r.cpu_ns / 1e3 for r in runs]
            bars.append(Bar(spec.title, spec.kind, median(figures), min(figures), max(figures)))
    return bars


def _end_of_axis(bars: Sequence[Bar]) -> float:
    """One bar that is far longer than all others is cut, so that the others differ visibly."""
    *_, second, first = sorted([0.0, *(bar.high for bar in bars)])
    return 1.3 * second if len(bars) > 2 and first > MAX_OUTLIER * second else first


def _panel(axes: Any, regime: Regime, bars: Sequence[Bar]) -> None:
    end = _end_of_axis(bars)
    for position, bar in enumerate(bars):
        axes.barh(position, min(bar.value, end), color=COLOURS[bar.kind], height=0.72)
        text = f"{bar.value:.2f}" if bar.value < 10 else f"{bar.value:.1f}"
        if bar.high <= end:
            axes.plot([bar.low, bar.high], [position, position], color=INK, linewidth=1.2)
        else:
            text = f"\N{RIGHTWARDS ARROW} {text}"
        if regime.figure == "round trip":
            text += f" / {bar.high:.1f}"
        behind = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (min(bar.high, end), position), fontsize=9, color=INK, **behind)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=9, color=INK)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, end * 1.16)
    axes.set_title(f"{regime.title}\n", loc="left", fontsize=11, fontweight="bold", color=INK)
    above = {"transform": axes.transAxes, "va": "bottom"}
    axes.text(0, 1.02, UNITS[regime.figure], fontsize=8.5, color=FAINT, **above)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
