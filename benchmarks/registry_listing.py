"""Trial ``listing``: how long it takes to list 1,000 and 10,000 records.

All clients are there all the time and take turns, so that a slow moment hits all of them, and each
round begins with another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from peerd.registry.embedded_etcd import EmbeddedEtcd
from registry_clients import BARE, BARE_AND_JSON, CACHE
from registry_etcd import Gateway, loopback, port_of
from registry_trials import Bench, Child, started, title

SIZES = (1_000, 10_000)
ROUNDS = 15
TITLE = f"listing: ms to list all records, the first time and in the median of {ROUNDS} (range)"

_LIMIT_S = 20.0


@dataclass(frozen=True)
class ListingResult:
    client: str
    records: int
    first_s: float | None
    """With connecting, and for the cache with filling it."""

    rounds_s: tuple[float, ...]
    error: str = ""

    @property
    def median_s(self) -> float | None:
        return median(self.rounds_s) if self.rounds_s and not self.error else None


def steps(clients: Sequence[str]) -> int:
    return len(SIZES)


def run(bench: Bench, clients: Sequence[str]) -> list[ListingResult]:
    names = with_references(clients)
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(EmbeddedEtcd())
        gateway = Gateway(port_of(etcd.endpoint))
        for size in SIZES:
            gateway.put(_prefix(size), range(size))
        children = [
            stack.enter_context(started(bench, name, [loopback(etcd.endpoint)])) for name in names
        ]
        return [result for size in SIZES for result in _measure(bench, children, size)]


def with_references(clients: Sequence[str]) -> list[str]:
    """peerd's cache beside peerd, and below all what a listing costs at least."""
    caches = [CACHE] if "peerd" in clients else []
    return [*caches, *clients, BARE, BARE_AND_JSON]


def _prefix(size: int) -> str:
    return f"list-{size}"


def _measure(bench: Bench, children: Sequence[Child], size: int) -> Iterator[ListingResult]:
    answers: dict[str, list[dict[str, float]]] = {child.name: [] for child in children}
    errors: dict[str, str] = {}
    for number in range(1 + ROUNDS):
        bench.progress.begin("listing", f"{size:,} records, round {number} of {ROUNDS}")
        first = number % len(children)
        for child in (*children[first:], *children[:first]):  # what went before has an effect
            answer = child.ask("listing", _LIMIT_S, prefix=_prefix(size))
            if "error" in answer:
                errors[child.name] = answer["error"]
            elif answer["records"] != size:
                errors[child.name] = f"{answer['records']:,} records"
            else:
                answers[child.name].append(answer)
    bench.progress.end()
    for name, of_client in answers.items():
        seconds = [answer["seconds"] for answer in of_client]
        first_s = seconds[0] if seconds else None
        yield ListingResult(name, size, first_s, tuple(seconds[1:]), errors.get(name, ""))


def ratio(results: Sequence[ListingResult], client: str, base: str, records: int) -> float | None:
    """The median of the rounds' ratios: the two of a round met the same machine."""
    times = {result.client: result for result in results if result.records == records}
    if any(name not in times or times[name].error for name in (client, base)):
        return None
    pairs = zip(times[client].rounds_s, times[base].rounds_s, strict=True)
    return median(one_s / base_s for one_s, base_s in pairs)


def header() -> tuple[str, ...]:
    columns = [(f"{size:,}: first", "median (range)", "vs bare call") for size in SIZES]
    return ("client", *(cell for three in columns for cell in three))


def rows(results: Sequence[ListingResult], clients: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name in with_references(clients):
        of_client = [result for result in results if result.client == name]
        yield (title(name), *(cell for result in of_client for cell in _cells(results, result)))


def _cells(results: Sequence[ListingResult], result: ListingResult) -> tuple[str, str, str]:
    if result.error or result.first_s is None or result.median_s is None:
        return (result.error, "-", "-")
    low_s, high_s = min(result.rounds_s), max(result.rounds_s)
    times = ratio(results, result.client, BARE, result.records)
    return (
        f"{result.first_s * 1e3:.1f}",
        f"{result.median_s * 1e3:.2f} ({low_s * 1e3:.2f}-{high_s * 1e3:.2f})",
        "-" if times is None else f"x {times:.2f}",
    )
