"""What the project says of its registry, held against what was measured (``--check``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from registry_clients import BARE, CACHE
from registry_failover import FailoverResult
from registry_fork import ForkResult
from registry_leases import LeasesResult
from registry_listing import ListingResult, ratio
from registry_watch import PUTS, WatchResult

Result = WatchResult | FailoverResult | ListingResult | LeasesResult | ForkResult

MOST_FAILOVER_S = 3.0
ELECTION_S = 2.0
"""etcd's, which nobody can read during."""

MOST_TIMES_BARE = 1.5
MOST_CACHE_S = 0.005
MOST_CPU = 0.05
MANY_RECORDS = 10_000


def failures(results: Sequence[Result]) -> Iterator[str]:
    """A sentence for each claim that does not hold for peerd. What was not measured is not judged."""
    for result in results:
        if isinstance(result, WatchResult) and result.client == "peerd":
            yield from _of_watch(result)
        elif isinstance(result, FailoverResult) and result.client == "peerd":
            yield from _of_failover(result)
        elif isinstance(result, LeasesResult) and result.client == "peerd":
            yield from _of_leases(result)
    yield from _of_listings([result for result in results if isinstance(result, ListingResult)])


def _of_watch(result: WatchResult) -> Iterator[str]:
    if result.seen != PUTS or result.doubles:
        yield f"watch: {result.seen} of {PUTS} events, {result.doubles} twice ({result.told})"
    if result.afterwards != "it goes on":
        yield f"watch: afterwards {result.afterwards}"


def _of_failover(result: FailoverResult) -> Iterator[str]:
    limit_s = MOST_FAILOVER_S + (ELECTION_S if result.case.startswith("leader") else 0.0)
    if result.seconds is None:
        yield f"failover, {result.case}: {result.error}"
    elif result.seconds > limit_s:
        yield f"failover, {result.case}: {result.seconds:.2f} s, not within {limit_s:g} s"


def _of_leases(result: LeasesResult) -> Iterator[str]:
    if result.error:
        yield f"leases: {result.error}"
        return
    if result.lost:
        yield f"leases: {result.lost} lost"
    if result.connections != 1:
        yield f"leases: {result.connections} connections, not one"
    if result.cpu >= MOST_CPU:
        yield f"leases: {result.cpu:.1%} of a core, not less than {MOST_CPU:.0%}"


def _of_listings(results: Sequence[ListingResult]) -> Iterator[str]:
    for result in results:
        if result.client in ("peerd", CACHE) and result.error:
            yield f"listing of {result.records:,}, {result.client}: {result.error}"
        median_s = result.median_s or 0.0
        if (result.client, result.records) == (CACHE, MANY_RECORDS) and median_s >= MOST_CACHE_S:
            yield f"listing: cache.nodes() takes {median_s * 1e3:.1f} ms, not less than 5"
    times = ratio(results, "peerd", BARE, MANY_RECORDS)
    if times is not None and times > MOST_TIMES_BARE:
        yield f"listing: nodes() takes {times:.2f} times a bare stub call, not {MOST_TIMES_BARE}"
