"""The claims of the project about its speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter

from bench.verdicts import Verdict, at_least, at_most
from regimes.rates import Throughput
from regimes.regime_tables import closed_loops, of_kind, ratio_of
from regimes.regimes import Result


def verdicts(results: Sequence[Result]) -> Iterator[Verdict]:
    def throughput(regime: str, one: str, other: str, figure: str) -> float | None:
        ones, others = (of_kind(Throughput, results, regime, name) for name in (one, other))
        return ratio_of(ones, others, attrgetter(figure))

    rates, costs = (partial(throughput, figure=figure) for figure in ("rate", "cpu_ns"))

    def round_trips(one: str, other: str, figure: str) -> float | None:
        ones, others = (closed_loops(results, "echo-latency", name) for name in (one, other))
        return ratio_of(ones, others, attrgetter(figure))

    stream, plain, thin, full = "stream", "plain-stream", "interleaved", "interleaved-full"
    yield from at_least("1 stream, rate : uvloop", rates(stream, "peerd", "uvloop"), 12)
    yield from at_least("1 stream, rate : rloop", rates(stream, "peerd", "rloop"), 8)
    yield from at_least("1 stream, rate : C with GRO", rates(stream, "peerd", "c-gro"), 0.6)
    yield from at_least("2 no GRO, rate : rloop", rates(plain, "peerd", "rloop"), 1.25)
    yield from at_most("2 no GRO, CPU : C recvmmsg", costs(plain, "peerd", "c"), 1.3)
    thin_cost, full_cost = (costs(regime, "peerd", "uvloop") for regime in (thin, full))
    yield from at_most("3 8 peers, 200,000/s, CPU : uvloop", thin_cost, 0.5)
    yield from at_most("3 8 peers, full speed, CPU : uvloop", full_cost, 0.5)
    for other, name, bounds in (("c", "C", (1.2, 1.5)), ("uvloop", "uvloop", (1, 1))):
        for figure, bound in zip(("p50", "p99"), bounds, strict=True):
            claim = f"4 echo, closed loop, {figure} : {name}"
            yield from at_most(claim, round_trips("peerd", other, f"{figure}_ns"), bound)
    echo = rates("echo-saturation", "peerd-async", "uvloop")
    yield from at_least("5 async def echo, rate : uvloop", echo, 2)
