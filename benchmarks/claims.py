"""What the project claims of its speed, held against the results of a run (--check)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latency import CLOSED, Latency
from measurement import Throughput
from regimes import Result
from tables import aligned, of_kind, p50, p99, ratio


@dataclass(frozen=True)
class Claim:
    text: str
    is_most: bool
    """The bound is the most that may be measured; else the least."""

    bound: float
    measured: Callable[[Sequence[Result]], float | None]

    def holds(self, measured: float) -> bool:
        return measured <= self.bound if self.is_most else measured >= self.bound


def check(results: Sequence[Result]) -> str:
    """The table; claims about what was not measured are left out."""
    rows = [("claim", "bound", "measured", "holds")]
    for claim in CLAIMS:
        measured = claim.measured(results)
        if measured is not None:
            sign = "<=" if claim.is_most else ">="
            holds = "yes" if claim.holds(measured) else "NO"
            rows.append((claim.text, f"{sign} {claim.bound:.2f}", f"{measured:.2f}", holds))
    return "\n".join(aligned(rows))


def _rates(regime: str, one: str, other: str) -> Callable[[Sequence[Result]], float | None]:
    return _throughput(regime, one, other, lambda run: run.rate)


def _costs(regime: str, one: str, other: str) -> Callable[[Sequence[Result]], float | None]:
    return _throughput(regime, one, other, lambda run: run.cpu_ns)


def _throughput(
    regime: str, one: str, other: str, figure: Callable[[Throughput], float]
) -> Callable[[Sequence[Result]], float | None]:
    return lambda results: ratio(
        of_kind(Throughput, results, regime, one),
        of_kind(Throughput, results, regime, other),
        figure,
    )


def _round_trips(
    one: str, other: str, figure: Callable[[Latency], float]
) -> Callable[[Sequence[Result]], float | None]:
    def closed(results: Sequence[Result], receiver: str) -> list[Latency]:
        runs = of_kind(Latency, results, "echo-latency", receiver)
        return [run for run in runs if run.per_second == CLOSED]

    return lambda results: ratio(closed(results, one), closed(results, other), figure)


_STREAM, _PLAIN, _ECHO = "stream", "plain-stream", "echo-saturation"
_THIN, _FULL = "interleaved", "interleaved-full"

CLAIMS = (
    Claim("1 stream, rate : uvloop", False, 12, _rates(_STREAM, "peerd", "uvloop")),
    Claim("1 stream, rate : rloop", False, 8, _rates(_STREAM, "peerd", "rloop")),
    Claim("1 stream, rate : C with GRO", False, 0.6, _rates(_STREAM, "peerd", "c-gro")),
    Claim("2 no GRO, rate : rloop", False, 1.25, _rates(_PLAIN, "peerd", "rloop")),
    Claim("2 no GRO, CPU : C recvmmsg", True, 1.3, _costs(_PLAIN, "peerd", "c")),
    Claim("3 8 peers, 200,000/s, CPU : uvloop", True, 0.5, _costs(_THIN, "peerd", "uvloop")),
    Claim("3 8 peers, full speed, CPU : uvloop", True, 0.5, _costs(_FULL, "peerd", "uvloop")),
    Claim("4 echo, closed loop, p50 : C", True, 1.2, _round_trips("peerd", "c", p50)),
    Claim("4 echo, closed loop, p99 : C", True, 1.5, _round_trips("peerd", "c", p99)),
    Claim("4 echo, closed loop, p50 : uvloop", True, 1.0, _round_trips("peerd", "uvloop", p50)),
    Claim("4 echo, closed loop, p99 : uvloop", True, 1.0, _round_trips("peerd", "uvloop", p99)),
    Claim("5 async def echo, rate : uvloop", False, 2, _rates(_ECHO, "peerd-async", "uvloop")),
)
