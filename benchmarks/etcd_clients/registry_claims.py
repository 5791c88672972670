"""The claims of the project about its registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.verdicts import Verdict, at_most, equal, failed
from etcd_clients.clients import BARE, CACHE
from etcd_clients.failover import FailoverResult
from etcd_clients.fork import ForkResult
from etcd_clients.leases import LeasesResult
from etcd_clients.listing import ListingResult, ratio_of
from etcd_clients.watch import PUTS, WatchResult

Result = WatchResult | FailoverResult | ListingResult | LeasesResult | ForkResult

MAX_FAILOVER_S = 3.0
ELECTION_S = 2.0
"""The time of an election, in which no client can read."""

MAX_TIMES_BARE = 1.5
MAX_CACHE_MS = 5.0
MAX_CPU_PERCENT = 5.0
MANY_RECORDS = 10_000


def verdicts(results: Sequence[Result]) -> Iterator[Verdict]:
    for result in results:
        match result:
            case WatchResult(client="peerd"):
                yield from _of_watch(result)
            case FailoverResult(client="peerd"):
                yield from _of_failover(result)
            case LeasesResult(client="peerd"):
                yield from _of_leases(result)
    yield from _of_listings([result for result in results if isinstance(result, ListingResult)])


def _of_watch(result: WatchResult) -> Iterator[Verdict]:
    yield from equal("watch: events", result.seen, PUTS)
    yield from equal("watch: doubled events", result.doubles, 0)
    yield from equal("watch: afterwards", result.afterwards, "it continues")


def _of_failover(result: FailoverResult) -> Iterator[Verdict]:
    claim = f"failover, {result.case}"
    if result.seconds is None:
        yield from failed(claim, result.error)
    bound_s = MAX_FAILOVER_S + (ELECTION_S if result.case.startswith("leader") else 0.0)
    yield from at_most(claim, result.seconds, bound_s, " s")


def _of_leases(result: LeasesResult) -> Iterator[Verdict]:
    if result.error:
        yield from failed("leases", result.error)
        return
    yield from equal("leases: lost", result.lost, 0)
    yield from equal("leases: connections", result.connections, 1)
    yield from at_most("leases: CPU of a core", result.cpu * 100, MAX_CPU_PERCENT, " %")


def _of_listings(results: Sequence[ListingResult]) -> Iterator[Verdict]:
    for result in results:
        if result.client in ("peerd", CACHE) and result.error:
            yield from failed(f"listing of {result.records:,}, {result.client}", result.error)
        if (result.client, result.records) == (CACHE, MANY_RECORDS) and result.median_s:
            yield from at_most("listing: cache.nodes()", result.median_s * 1e3, MAX_CACHE_MS, " ms")
    bare = ratio_of(results, "peerd", BARE, MANY_RECORDS)
    yield from at_most("listing: nodes() : bare stub call", bare, MAX_TIMES_BARE)
