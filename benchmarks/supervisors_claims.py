"""What the project says of its supervisor, held against what was measured (``--check``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TypeVar

from supervisors_contenders import CIRCUS, PEERD, SUPERVISORD, Contender
from supervisors_trials import MANY_PEERS, PEERS, Memory, Orphans, Recovery, Result, Start

MOST_RECOVERY_S = 0.020
MOST_TIMES_CIRCUS = 0.5
MOST_MANY_S = 5.0
MOST_WORKER_BYTES = 3 << 20

AnyResult = TypeVar("AnyResult", Recovery, Start, Memory, Orphans)


def failures(results: Sequence[Result]) -> Iterator[str]:
    """A sentence for each claim that does not hold. What was not measured is not judged."""
    seconds = [result.seconds for result in of(Recovery, results, PEERD)]
    if seconds and median(seconds) > MOST_RECOVERY_S:
        yield f"recovery: {median(seconds) * 1e3:.1f} ms, not within {MOST_RECOVERY_S * 1e3:g} ms"
    times = times_circus(results)
    if times is not None and times > MOST_TIMES_CIRCUS:
        yield f"start: {times:.2f} times circus's, not at most {MOST_TIMES_CIRCUS:g}"
    ours, theirs = (total_uss(results, one) for one in (PEERD, SUPERVISORD))
    if ours is not None and theirs is not None and ours > theirs and not shared(results):
        yield f"memory: {mib(ours)} with {PEERS} peers, not at most supervisord's {mib(theirs)}"
    yield from _of_many(of_peers(results, PEERD, MANY_PEERS))
    for result in of(Orphans, results, PEERD):
        if result.left:
            yield f"orphans: {result.left} processes outlive the supervisor"


def unjudged(results: Sequence[Result]) -> Iterator[str]:
    """Why a claim could not be judged although peerd was measured."""
    if of(Start, results, PEERD) and times_circus(results) is None:
        yield "start: there is no circus to hold it against"
    if of_peers(results, PEERD, PEERS) and total_uss(results, SUPERVISORD) is None:
        yield "memory: there is no supervisord to hold it against"
    if files := shared(results):
        yield f"memory: other programs use {', '.join(files)}, too: run it without them"


def times_circus(results: Sequence[Result]) -> float | None:
    """The median of the rounds' ratios: the two of a round met the same machine."""
    circus = {result.round: result.seconds for result in of(Start, results, CIRCUS)}
    ratios = [
        result.seconds / circus[result.round]
        for result in of(Start, results, PEERD)
        if result.round in circus
    ]
    return median(ratios) if ratios else None


def total_uss(results: Sequence[Result], contender: Contender) -> float | None:
    totals = [result.uss for result in of_peers(results, contender, PEERS)]
    return median(totals) if totals else None


def shared(results: Sequence[Result]) -> list[str]:
    """What makes the USS of one of the two look better than it is."""
    memory = of_peers(results, PEERD, PEERS) + of_peers(results, SUPERVISORD, PEERS)
    return sorted({file for result in memory for file in result.shared_outside})


def of(kind: type[AnyResult], results: Sequence[Result], contender: Contender) -> list[AnyResult]:
    return [
        result
        for result in results
        if isinstance(result, kind) and result.contender == contender.name
    ]


def of_peers(results: Sequence[Result], contender: Contender, peers: int) -> list[Memory]:
    return [result for result in of(Memory, results, contender) if len(result.workers) == peers]


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def _of_many(results: Sequence[Memory]) -> Iterator[str]:
    if not results:
        return
    seconds = median(result.start_s for result in results)
    if seconds > MOST_MANY_S:
        yield f"many: {MANY_PEERS} peers answer after {seconds:.2f} s, not within {MOST_MANY_S:g} s"
    most = max(max(result.workers) for result in results)
    if most > MOST_WORKER_BYTES:
        yield f"many: a worker has {most / 2**20:.2f} MiB, not at most {mib(MOST_WORKER_BYTES)}"
