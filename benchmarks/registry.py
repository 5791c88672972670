"""peerd's registry beside the other etcd clients of Python, in one run.

What a watch sees over a kill -9 of etcd, how long a read takes after the connected member has gone,
what a listing and what a thousand kept leases cost, and what a forked child can do. The etcds are real
ones, started here. README.md beside this file says how to read the tables.

The others come with ``pip install -e '.[bench]'``; one that is not there is left out. etcd3 0.12.0 does
not import with protobuf 4 and newer by itself: it runs here through peerd's import_etcd3().
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import orjson

try:
    import psutil

    import peerd
    import registry_claims
    import registry_failover
    import registry_fork
    import registry_leases
    import registry_listing
    import registry_watch
    from children import BenchmarkError
    from machine import cpu_model, package_version
    from noise import QUIET
    from progress import showing
    from registry_claims import Result
    from registry_clients import CLIENTS
    from registry_etcd import etcd_version
    from registry_trials import Bench
    from tables import aligned
except ImportError as error:
    sys.exit(
        f"registry: {error}. Build and install peerd first: pip install -e '.[bench,embedded]'"
    )

LIBRARIES = ("grpcio", "protobuf")


def main() -> int:
    # Ended politely, it ends as Ctrl-C does: the children first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse_options()
    try:
        return benchmark(options)
    except BenchmarkError as error:
        print(f"registry: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("registry: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


@dataclasses.dataclass(frozen=True)
class Options:
    trials: Sequence[str]
    clients: Sequence[str]
    seconds: float
    check: bool
    json_file: Path | None


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What the figures depend on."""

    cpu: str
    cores: int
    virtual: bool
    kernel: str
    python: str
    etcd: str
    peerd: str
    packages: dict[str, str]
    busy_before: float
    """Share of all CPUs that others used in the second before."""

    def __str__(self) -> str:
        kind = "virtual machine" if self.virtual else "no hypervisor seen"
        packages = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        lines = [
            f"machine   {self.cpu}, {self.cores} CPUs, {kind}, Linux {self.kernel}",
            f"versions  {self.python}, etcd {self.etcd}, peerd {self.peerd}, {packages}",
        ]
        if self.busy_before > QUIET:
            lines.append(
                f"WARNING   the machine was {self.busy_before:.0%} busy before the start: "
                "stop the rest and run this again"
            )
        return "\n".join(lines)


def look_around() -> Surroundings:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    others = [spec.package for spec in CLIENTS.values() if spec.package is not None]
    return Surroundings(
        cpu=cpu_model(cpuinfo),
        cores=os.cpu_count() or 1,
        virtual=" hypervisor" in cpuinfo,
        kernel=platform.release(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        etcd=etcd_version(),
        peerd=peerd.__version__,
        packages={name: package_version(name) for name in (*others, *LIBRARIES)},
        busy_before=psutil.cpu_percent(interval=1.0) / 100,
    )


def benchmark(options: Options) -> int:
    surroundings = look_around()
    print(surroundings, flush=True)
    for name in options.clients:
        if not CLIENTS[name].installed:
            print(f"NOTE      no {name}: it is not installed (pip install -e '.[bench]')")
    clients = [name for name in options.clients if CLIENTS[name].installed]
    steps = sum(STEPS[name](clients) for name in options.trials)
    results: dict[str, Sequence[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="peerd-benchmark-") as folder, showing(steps) as shown:
        bench = Bench(Path(folder), options.seconds, shown)
        for name in options.trials:
            results[name], table = TRIALS[name](bench, clients)
            shown.clear()
            print(f"\n{table}", flush=True)
    if options.json_file is not None:
        write(options.json_file, as_json(options, surroundings, results))
    return check(results) if options.check else 0


# The trials. Each returns what it found, and the table of it.

Found = tuple[Sequence[Result], str]


def watch(bench: Bench, clients: Sequence[str]) -> Found:
    results = registry_watch.run(bench, clients)
    rows = [registry_watch.HEADER, *(result.row() for result in results)]
    return results, table(registry_watch.TITLE, rows)


def failover(bench: Bench, clients: Sequence[str]) -> Found:
    results = registry_failover.run(bench, clients)
    rows = [registry_failover.HEADER, *registry_failover.rows(results, clients)]
    return results, table(registry_failover.TITLE, rows)


def listing(bench: Bench, clients: Sequence[str]) -> Found:
    results = registry_listing.run(bench, clients)
    rows = [registry_listing.header(), *registry_listing.rows(results, clients)]
    return results, table(registry_listing.TITLE, rows)


def leases(bench: Bench, clients: Sequence[str]) -> Found:
    results = registry_leases.run(bench, clients)
    rows = [registry_leases.HEADER, *(result.row() for result in results)]
    text = table(registry_leases.heading(bench.seconds), rows)
    if any(result.disturbed for result in results):
        text += "\n! others used more than a tenth of the CPUs meanwhile"
    return results, text


def fork(bench: Bench, clients: Sequence[str]) -> Found:
    results = registry_fork.run(bench, clients)
    rows = [registry_fork.HEADER, *registry_fork.rows(results, clients)]
    return results, table(registry_fork.TITLE, rows)


TRIALS = {
    "watch": watch,
    "failover": failover,
    "listing": listing,
    "leases": leases,
    "fork": fork,
}

STEPS = {
    "watch": registry_watch.steps,
    "failover": registry_failover.steps,
    "listing": registry_listing.steps,
    "leases": registry_leases.steps,
    "fork": registry_fork.steps,
}


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([title, *aligned(rows)])


def check(results: dict[str, Sequence[Result]]) -> int:
    failures = list(registry_claims.failures([one for many in results.values() for one in many]))
    print("", *(f"CHECK  {failure}" for failure in failures), sep="\n")
    print("CHECK  failed" if failures else "CHECK  everything that was measured of peerd holds")
    return 1 if failures else 0


def as_json(
    options: Options, surroundings: Surroundings, results: dict[str, Sequence[Result]]
) -> bytes:
    facts = {
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "surroundings": surroundings,
        "seconds": options.seconds,
        "results": results,
    }
    return orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise BenchmarkError(f"{file}: {error.strerror}") from None


# The command line


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        prog="registry.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "--trials",
        type=names_of(TRIALS),
        default=list(TRIALS),
        metavar="A,B",
        help=f"of {', '.join(TRIALS)} (all)",
    )
    parser.add_argument(
        "--clients",
        type=names_of(CLIENTS),
        default=list(CLIENTS),
        metavar="A,B",
        help=f"of {', '.join(CLIENTS)} (all)",
    )
    parser.add_argument(
        "--seconds", type=seconds, default=15.0, help="of each client's keep-alives (15)"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where peerd misses what it claims"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement")
    given = parser.parse_args()
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"no directory {given.json.parent}")
    return Options(given.trials, given.clients, given.seconds, given.check, given.json)


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return text.split(",")

    return names


def seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be from 1 to 3600, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
