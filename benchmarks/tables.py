"""The tables: medians and ranges of the rounds, and what to make of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TypeVar

from latency import CLOSED, Latency
from measurement import Throughput
from regimes import Regime, Result

BASELINE = "uvloop"

AnyResult = TypeVar("AnyResult", Throughput, Latency)


def of_kind(
    kind: type[AnyResult], results: Sequence[Result], regime: str, receiver: str
) -> list[AnyResult]:
    """The results of a receiver in a regime, by round."""
    return [
        result
        for result in results
        if isinstance(result, kind) and result.regime == regime and result.receiver == receiver
    ]


def ratio(
    results: Sequence[AnyResult], base: Sequence[AnyResult], figure: Callable[[AnyResult], float]
) -> float | None:
    """The median of the rounds' ratios: the two of a round met the same machine."""
    of_base = {result.round: result for result in base}
    ratios = [
        figure(result) / figure(of_base[result.round])
        for result in results
        if result.round in of_base
    ]
    return median(ratios) if ratios else None


def table(name: str, regime: Regime, results: Sequence[Result]) -> str:
    lines = [f"{regime.title} ({name}): {regime.text}"]
    if regime.figure == "round trip":
        rows = [latency_header(regime), *latency_rows(name, regime, results)]
    else:
        rows = [THROUGHPUT_HEADER, *throughput_rows(name, regime, results)]
    lines += aligned(rows)
    return "\n".join(lines)


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


THROUGHPUT_HEADER = (
    "receiver",
    "messages/s (range)",
    "vs uvloop",
    "CPU ns/message (range)",
    "vs uvloop",
    "offered",
    "lost",
    "busy",
    "limited by",
)


def throughput_rows(
    name: str, regime: Regime, results: Sequence[Result]
) -> Iterator[tuple[str, ...]]:
    base = of_kind(Throughput, results, name, BASELINE)
    for receiver, spec in regime.receivers.items():
        runs = of_kind(Throughput, results, name, receiver)
        if not runs:
            continue
        rates = [run.rate / 1e6 for run in runs]
        costs = [run.cpu_ns for run in runs]
        mark = " !" if any(run.unaccounted or run.send_errors for run in runs) else ""
        yield (
            spec.title + mark,
            f"{median(rates):.3f} M ({min(rates):.3f}-{max(rates):.3f})",
            times(ratio(runs, base, lambda run: run.rate)),
            f"{median(costs):,.0f} ({min(costs):,.0f}-{max(costs):,.0f})",
            times(ratio(runs, base, lambda run: run.cpu_ns)),
            f"{median(run.offered_rate for run in runs) / 1e6:.2f} M",
            f"{median(run.loss for run in runs):.0%}",
            f"{median(run.busy for run in runs):.0%}",
            limited_by(runs),
        )


def times(value: float | None) -> str:
    return "-" if value is None else f"x {value:.2f}"


def limited_by(runs: Sequence[Throughput]) -> str:
    (limit, count), *others = Counter(run.limited_by for run in runs).most_common()
    return f"{limit} ({count} of {len(runs)})" if others else limit


def latency_header(regime: Regime) -> tuple[str, ...]:
    loads = [load(rate) for rate in regime.rates]
    return ("server", *loads, f"CPU us/message {loads[0]}", f"at {loads[-1]}", "lost")


def load(per_second: int) -> str:
    return "closed" if per_second == CLOSED else f"{per_second:,}/s"


def latency_rows(name: str, regime: Regime, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    for receiver, spec in regime.receivers.items():
        runs = of_kind(Latency, results, name, receiver)
        if not runs:
            continue
        by_rate = {rate: [run for run in runs if run.per_second == rate] for rate in regime.rates}
        yield (
            spec.title,
            *(
                " / ".join(
                    f"{median(figure(run) for run in at_rate) / 1e3:.1f}"
                    for figure in (p50, p99, p999)
                )
                for at_rate in by_rate.values()
            ),
            f"{median(run.cpu_ns for run in by_rate[regime.rates[0]]) / 1e3:.1f}",
            f"{median(run.cpu_ns for run in by_rate[regime.rates[-1]]) / 1e3:.1f}",
            f"{sum(run.lost for run in runs):,}",
        )


def p50(run: Latency) -> float:
    return run.p50_ns


def p99(run: Latency) -> float:
    return run.p99_ns


def p999(run: Latency) -> float:
    return run.p999_ns


def warnings(results: Sequence[Result]) -> Iterator[str]:
    """What must be known before a figure is used."""
    for run in results:
        if not isinstance(run, Throughput):
            continue
        where = f"{run.regime}, {run.receiver}, round {run.round}"
        if run.unaccounted:
            yield (
                f"! {where}: sent {run.sent:,} is not delivered {run.delivered:,} + dropped by the "
                f"kernel {run.kernel_drops:,}: {run.unaccounted:,} unaccounted for"
            )
        if run.send_errors:
            yield f"! {where}: {run.send_errors:,} sends or replies were wrong"
    shares = [run.others for run in results]
    disturbed = sum(run.disturbed for run in results)
    yield (
        f"Others used {median(shares):.0%} of the CPUs in the median measurement, {max(shares):.0%} "
        f"in the worst; {disturbed} of {len(results)} were disturbed (more than a tenth)."
    )
