"""The tables of the regimes: medians and ranges of the rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TypeVar

from bench.runner import titled_table
from bench.tables import ratio, times
from regimes.latency import CLOSED, Latency
from regimes.rates import Throughput
from regimes.regimes import Regime, Result

BASELINE = "uvloop"

AnyResult = TypeVar("AnyResult", Throughput, Latency)


def of_kind(
    kind: type[AnyResult], results: Sequence[Result], regime: str, receiver: str
) -> list[AnyResult]:
    return [
        result
        for result in results
        if isinstance(result, kind) and result.regime == regime and result.receiver == receiver
    ]


def closed_loops(results: Sequence[Result], regime: str, receiver: str) -> list[Latency]:
    return [run for run in of_kind(Latency, results, regime, receiver) if run.per_second == CLOSED]


def ratio_of(
    results: Sequence[AnyResult], base: Sequence[AnyResult], figure: Callable[[AnyResult], float]
) -> float | None:
    return ratio(
        {result.round: figure(result) for result in results},
        {result.round: figure(result) for result in base},
    )


def table(name: str, regime: Regime, results: Sequence[Result]) -> str:
    if regime.figure == "round trip":
        rows = [_latency_header(regime), *_latency_rows(name, regime, results)]
    else:
        rows = [THROUGHPUT_HEADER, *_throughput_rows(name, regime, results)]
    return titled_table(f"{regime.title} ({name}): {regime.text}", rows)


THROUGHPUT_HEADER = (
    *("receiver", "messages/s (range)", "vs uvloop", "CPU ns/message (range)", "vs uvloop"),
    *("offered", "lost", "busy", "limited by"),
)


def _throughput_rows(
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
            times(ratio_of(runs, base, lambda run: run.rate)),
            f"{median(costs):,.0f} ({min(costs):,.0f}-{max(costs):,.0f})",
            times(ratio_of(runs, base, lambda run: run.cpu_ns)),
            f"{median(run.offered_rate for run in runs) / 1e6:.2f} M",
            f"{median(run.loss for run in runs):.0%}",
            f"{median(run.busy for run in runs):.0%}",
            _limited_by(runs),
        )


def _limited_by(runs: Sequence[Throughput]) -> str:
    (limit, count), *others = Counter(run.limited_by for run in runs).most_common()
    return f"{limit} ({count} of {len(runs)})" if others else limit


def _latency_header(regime: Regime) -> tuple[str, ...]:
    loads = ["closed" if rate == CLOSED else f"{rate:,}/s" for rate in regime.rates]
    return ("server", *loads, f"CPU us/message {loads[0]}", f"at {loads[-1]}", "lost")


def _latency_rows(
    name: str, regime: Regime, results: Sequence[Result]
) -> Iterator[tuple[str, ...]]:
    for receiver, spec in regime.receivers.items():
        runs = of_kind(Latency, results, name, receiver)
        if not runs:
            continue
        by_rate = [[run for run in runs if run.per_second == rate] for rate in regime.rates]
        costs = [f"{median(run.cpu_ns for run in at_rate) / 1e3:.1f}" for at_rate in by_rate]
        round_trips = [
            " / ".join(
                f"{median(figures) / 1e3:.1f}"
                for figures in zip(*((r.p50_ns, r.p99_ns, r.p999_ns) for r in at_rate), strict=True)
            )
            for at_rate in by_rate
        ]
        lost = f"{sum(run.lost for run in runs):,}"
        yield (spec.title, *round_trips, costs[0], costs[-1], lost)


def warnings(results: Sequence[Result]) -> Iterator[str]:
    """Caveats to read before using a figure."""
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
