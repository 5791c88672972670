"""The claims of the project about its supervisor. A claim that cannot be judged does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from bench.tables import mib
from bench.verdicts import Verdict, at_most, equal, failed
from contenders.contender import PEERD, SUPERVISORD, Contender
from contenders.deaths import Orphans, Recovery
from contenders.memory import MANY_PEERS, of_peers
from contenders.side_by_side import PEERS, of
from contenders.starts import Help, Start, times_circus

MAX_RECOVERY_MS = 20.0
MAX_HELP_MS = 200.0
MAX_TIMES_CIRCUS = 0.5
MAX_MANY_S = 5.0
MAX_WORKER_MIB = 3.0


def verdicts(results: Sequence[object]) -> Iterator[Verdict]:
    recovery = [result.seconds * 1e3 for result in of(Recovery, results, PEERD)]
    if recovery:
        yield from at_most("recovery", median(recovery), MAX_RECOVERY_MS, " ms")
    if of(Start, results, PEERD):
        times = times_circus(results, Start)
        yield from at_most("start : circus", times, MAX_TIMES_CIRCUS)
        if times is None:
            yield from failed("start : circus", "not judged: there is no circus")
    helps = [result.seconds * 1e3 for result in of(Help, results, PEERD)]
    if helps:
        yield from at_most("peerd --help", median(helps), MAX_HELP_MS, " ms")
    yield from _of_memory(results)
    many = of_peers(results, PEERD, MANY_PEERS)
    if many:
        seconds = median(result.start_s for result in many)
        yield from at_most(f"many: {MANY_PEERS} peers answer", seconds, MAX_MANY_S, " s")
        largest = max(max(result.workers) for result in many) / 2**20
        yield from at_most("many: USS of a worker", largest, MAX_WORKER_MIB, " MiB")
    for orphans in of(Orphans, results, PEERD):
        yield from equal("orphans", orphans.left, 0)


def _of_memory(results: Sequence[object]) -> Iterator[Verdict]:
    claim = f"memory: USS with {PEERS} peers : supervisord"
    memory = of_peers(results, PEERD, PEERS) + of_peers(results, SUPERVISORD, PEERS)
    files = sorted({file for result in memory for file in result.shared_outside})
    ours, theirs = (_total_uss(results, contender) for contender in (PEERD, SUPERVISORD))
    if ours is None:
        return
    if theirs is None:
        yield from failed(claim, "not judged: there is no supervisord")
    elif files:
        yield from failed(claim, f"not judged: stop the programs that use {', '.join(files)}")
    else:
        yield Verdict(claim, f"<= {mib(theirs)}", mib(ours), ours <= theirs)


def _total_uss(results: Sequence[object], contender: Contender) -> float | None:
    totals = [result.uss for result in of_peers(results, contender, PEERS)]
    return median(totals) if totals else None
