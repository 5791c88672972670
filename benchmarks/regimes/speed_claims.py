"""The claims of the project about its speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.verdicts import Verdict, at_least, at_most
from regimes.latency import CLOSED, Latency
from regimes.rates import Throughput
from regimes.regime_tables import of_kind, ratio_of
from regimes.regimes import Result


def verdicts(results: Sequence[Result]) -> Iterator[Verdict]:
    def rates(regime: str, one: str, other: str) -> float | None:
        return throughput(regime, one, other, lambda run: run.rate)

    def costs(regime: str, one: str, other: str) -> float | None:
        return throughput(regime, one, other, lambda run: run.cpu_ns)

    def throughput(
        regime: str, one: str, other: str, figure: Callable[[Throughput], float]
    ) -> float | None:
        ones, others = (of_kind(Throughput, results, regime, name) for name in (one, other))
        return ratio_of(ones, others, figure)

    def round_trips(one: str, other: str, figure: Callable[[Latency], float]) -> float | None:
        ones, others = (
            [
                run
                for run in of_kind(Latency, results, "echo-latency", name)
                if run.per_second == CLOSED
            ]
            for name in (one, other)
        )
        return ratio_of(ones, others, figure)

    def p50(run: Latency) -> float:
        return run.p50_ns

    def p99(run: Latency) -> float:
        return run.p99_ns

    stream, plain, thin, full = "stream", "plain-stream", "interleaved", "interleaved-full"
    yield from at_least("1 stream, rate : uvloop", rates(stream, "peerd", "uvloop"), 12)
    yield from at_least("1 stream, rate : rloop", rates(stream, "peerd", "rloop"), 8)
    yield from at_least("1 stream, rate : C with GRO", rates(stream, "peerd", "c-gro"), 0.6)
    yield from at_least("2 no GRO, rate : rloop", rates(plain, "peerd", "rloop"), 1.25)
    yield from at_most("2 no GRO, CPU : C recvmmsg", costs(plain, "peerd", "c"), 1.3)
    thin_cost, full_cost = (costs(regime, "peerd", "uvloop") for regime in (thin, full))
    yield from at_most("3 8 peers, 200,000/s, CPU : uvloop", thin_cost, 0.5)
    yield from at_most("3 8 peers, full speed, CPU : uvloop", full_cost, 0.5)
    for other, name, p50_bound, p99_bound in (("c", "C", 1.2, 1.5), ("uvloop", "uvloop", 1, 1)):
        claim = "4 echo, closed loop"
        yield from at_most(f"{claim}, p50 : {name}", round_trips("peerd", other, p50), p50_bound)
        yield from at_most(f"{claim}, p99 : {name}", round_trips("peerd", other, p99), p99_bound)
    echo = rates("echo-saturation", "peerd-async", "uvloop")
    yield from at_least("5 async def echo, rate : uvloop", echo, 2)
