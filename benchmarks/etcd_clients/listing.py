"""Trial ``listing``: how long it takes to list 1,000 and 10,000 records.

All clients are started first and take turns, so that a slow moment affects all of them. Each round
starts with another client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from bench.progress import Progress
from bench.runner import Trial, titled_table
from bench.tables import ratio, times
from bench.verdicts import Verdict, at_most, failed
from etcd_clients.client_process import Bench, Child, started, title
from etcd_clients.clients import BARE, BARE_AND_JSON, CACHE
from etcd_clients.etcd import RecordGateway, loopback
from peerd.registry.embedded_etcd import EmbeddedEtcd

SIZES = (1_000, 10_000)
ROUNDS = 15
TITLE = f"listing: ms to list all records, the first time and in the median of {ROUNDS} (range)"
MAX_TIMES_BARE = 1.5
MAX_CACHE_MS = 5.0

_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class ListingResult:
    client: str
    records: int
    first_s: float | None  # Includes connecting, and filling the cache
    rounds_s: tuple[float, ...]
    error: str = ""

    @property
    def median_s(self) -> float | None:
        return median(self.rounds_s) if self.rounds_s and not self.error else None


def trial(bench: Bench) -> Trial:
    caches = [CACHE] if "peerd" in bench.clients else []
    names = [*caches, *bench.clients, BARE, BARE_AND_JSON]

    def measure(progress: Progress) -> list[ListingResult]:
        with contextlib.ExitStack() as stack:
            etcd = stack.enter_context(EmbeddedEtcd())
            gateway = RecordGateway.of(etcd.endpoint)
            for size in SIZES:
                gateway.put_records(_prefix(size), range(size))
            children = [
                stack.enter_context(started(bench, name, [loopback(etcd.endpoint)]))
                for name in names
            ]
            return [result for size in SIZES for result in _measure(progress, children, size)]

    def table(results: Sequence[ListingResult]) -> str:
        columns = [(f"{size:,}: first", "median (range)", "vs bare call") for size in SIZES]
        rows = [("client", *(cell for three in columns for cell in three))]
        for name in names:
            of_client = [result for result in results if result.client == name]
            rows.append(
                (title(name), *(cell for result in of_client for cell in _cells(results, result)))
            )
        return titled_table(TITLE, rows)

    return Trial(len(SIZES), measure, table, _judge)


def _judge(results: Sequence[ListingResult]) -> Iterator[Verdict]:
    for result in results:
        if result.client in ("peerd", CACHE) and result.error:
            yield from failed(f"listing of {result.records:,}, {result.client}", result.error)
        if (result.client, result.records) == (CACHE, SIZES[-1]) and result.median_s:
            yield from at_most("listing: cache.nodes()", result.median_s * 1e3, MAX_CACHE_MS, " ms")
    bare = _times_bare(results, "peerd", SIZES[-1])
    yield from at_most("listing: nodes() : bare stub call", bare, MAX_TIMES_BARE)


def _prefix(size: int) -> str:
    return f"list-{size}"


def _measure(progress: Progress, children: Sequence[Child], size: int) -> Iterator[ListingResult]:
    answers: dict[str, list[dict[str, float]]] = {child.name: [] for child in children}
    errors: dict[str, str] = {}
    with progress.step("listing", f"{size:,} records, {ROUNDS} rounds"):
        for number in range(1 + ROUNDS):
            first = number % len(children)
            for child in (*children[first:], *children[:first]):  # the order has an effect
                answer = child.ask("listing", _TIMEOUT_S, prefix=_prefix(size))
                if "error" in answer:
                    errors[child.name] = answer["error"]
                elif answer["records"] != size:
                    errors[child.name] = f"{answer['records']:,} records"
                else:
                    answers[child.name].append(answer)
    for name, of_client in answers.items():
        seconds = [answer["seconds"] for answer in of_client]
        first_s = seconds[0] if seconds else None
        yield ListingResult(name, size, first_s, tuple(seconds[1:]), errors.get(name, ""))


def _times_bare(results: Sequence[ListingResult], client: str, records: int) -> float | None:
    found = {
        result.client: dict(enumerate(result.rounds_s))
        for result in results
        if result.records == records and not result.error
    }
    return ratio(found.get(client, {}), found.get(BARE, {}))


def _cells(results: Sequence[ListingResult], result: ListingResult) -> tuple[str, str, str]:
    if result.error or result.first_s is None or result.median_s is None:
        return (result.error, "-", "-")
    low_s, high_s = min(result.rounds_s), max(result.rounds_s)
    return (
        f"{result.first_s * 1e3:.1f}",
        f"{result.median_s * 1e3:.2f} ({low_s * 1e3:.2f}-{high_s * 1e3:.2f})",
        times(_times_bare(results, result.client, result.records)),
    )
