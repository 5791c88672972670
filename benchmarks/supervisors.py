"""peerd beside other supervisors of Python, in one run: supervisord and circus.

How long a killed worker is missed, how long 8 peers take to start, what memory the whole tree has,
what outlives a killed supervisor, and how often a worker is started that dies again and again.
README.md beside this file says how to read the tables.

The others come with ``pip install 'peerd[bench]'``, or are taken from another environment
(``--others DIR``); one that is not there is left out. peerd registers in a real etcd, started here
beforehand.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median

# Before anything imports it: supervisord is to have libcrypto for itself, as it has without us, or
# 4 MiB would be missing from its USS.
sys.modules["ssl"] = None  # type: ignore[assignment]

try:
    import orjson
    import psutil

    import peerd
    import supervisors_claims
    import supervisors_trials
    from children import BenchmarkError
    from machine import cpu_model
    from noise import QUIET
    from peerd.errors import RegistryUnavailableError
    from peerd.registry.embedded_etcd import EmbeddedEtcd
    from progress import showing
    from registry_etcd import etcd_version
    from supervisors_claims import mib, of, of_peers, times_circus
    from supervisors_contenders import CONTENDERS, PEERD, Contender, Environment, environment
    from supervisors_contenders import version_in as installed_version
    from supervisors_guard import guarded_folder
    from supervisors_trials import (
        LOOP_S,
        MANY_PEERS,
        PEERS,
        Bench,
        Loop,
        Memory,
        Orphans,
        Recovery,
        Result,
        Start,
    )
    from tables import aligned
except ImportError as error:
    sys.exit(
        f"supervisors: {error}. Build and install peerd first: pip install -e '.[bench,embedded]'"
    )

ROUNDS = 8
QUICK_ROUNDS = 3


def main() -> int:
    # Ended politely, it ends as Ctrl-C does: the children first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse_options()
    try:
        return benchmark(options)
    except (BenchmarkError, RegistryUnavailableError) as error:
        print(f"supervisors: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("supervisors: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


@dataclasses.dataclass(frozen=True)
class Options:
    trials: Sequence[str]
    contenders: Sequence[Contender]
    others: Environment
    rounds: int
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
    versions: dict[str, str]
    busy_before: float
    """Share of all CPUs that others used in the second before."""

    def __str__(self) -> str:
        kind = "virtual machine" if self.virtual else "no hypervisor seen"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"machine   {self.cpu}, {self.cores} CPUs, {kind}, Linux {self.kernel}",
            f"versions  {self.python}, etcd {self.etcd}, {versions}",
        ]
        if self.busy_before > QUIET:
            lines.append(
                f"WARNING   the machine was {self.busy_before:.0%} busy before the start: "
                "stop the rest and run this again"
            )
        return "\n".join(lines)


def look_around(others: Environment, contenders: Sequence[Contender]) -> Surroundings:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    return Surroundings(
        cpu=cpu_model(cpuinfo),
        cores=os.cpu_count() or 1,
        virtual=" hypervisor" in cpuinfo,
        kernel=platform.release(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        etcd=etcd_version(),
        versions={
            contender.name: peerd.__version__
            if contender is PEERD
            else installed_version(others, contender.package)
            for contender in contenders
        },
        busy_before=psutil.cpu_percent(interval=1.0) / 100,
    )


def benchmark(options: Options) -> int:
    missing = [
        contender
        for contender in options.contenders
        if contender is not PEERD and not options.others.has(contender.program)
    ]
    contenders = [contender for contender in options.contenders if contender not in missing]
    surroundings = look_around(options.others, contenders)
    print(surroundings, flush=True)
    results: dict[str, Sequence[Result]] = {}
    count = len(contenders)
    whole = count + sum(steps(name, count, options.rounds) for name in options.trials)
    with (
        guarded_folder("peerd-benchmark-") as folder,
        EmbeddedEtcd() as etcd,
        showing(whole) as shown,
    ):
        bench = Bench(folder, etcd.endpoint, options.others, options.rounds, shown)
        supervisors_trials.warm_up(bench, contenders)
        for name in options.trials:
            run, table = TRIALS[name]
            results[name] = run(bench, contenders)
            shown.clear()
            rows = table(results[name])
            absent = [
                [one.name, "not installed: pip install 'peerd[bench]'", *[""] * (len(rows[0]) - 2)]
                for one in missing
                if name != "many"
            ]
            print(f"\n{TITLES[name]}", *aligned([*rows, *absent]), sep="\n", flush=True)
    everything = [one for many in results.values() for one in many]
    if shared := {
        file for one in everything if isinstance(one, Memory) for file in one.shared_outside
    }:
        print(
            f"\n! Other programs on this machine use {', '.join(sorted(shared))}, too: what is shared "
            "with them is not in the USS of the marked."
        )
    if options.json_file is not None:
        write(options.json_file, as_json(options, surroundings, results))
    return check(everything) if options.check else 0


def steps(trial: str, contenders: int, rounds: int) -> int:
    memory_rounds = min(rounds, supervisors_trials.MEMORY_ROUNDS)
    return {
        "recovery": contenders * rounds,
        "start": contenders * rounds,
        "memory": contenders * memory_rounds,
        "many": memory_rounds,
        "orphans": contenders,
        "loop": 1,
    }[trial]


# The tables


Rows = list[Sequence[str]]


def recovery_rows(results: Sequence[Result]) -> Rows:
    rows: Rows = [("supervisor", "median", "min", "max", "rounds")]
    for contender in CONTENDERS.values():
        if found := of(Recovery, results, contender):
            rows.append((contender.name, *spread([one.seconds for one in found])))
    return rows


def start_rows(results: Sequence[Result]) -> Rows:
    rows: Rows = [("supervisor", "median", "min", "max", "rounds", "peerd/circus")]
    times = times_circus(results)
    for contender in CONTENDERS.values():
        if found := of(Start, results, contender):
            beside = f"x {times:.2f}" if contender is PEERD and times is not None else ""
            rows.append((contender.name, *spread([one.seconds for one in found]), beside))
    return rows


def memory_rows(results: Sequence[Result]) -> Rows:
    rows: Rows = [
        ("supervisor", "USS, all", "itself", "a worker, mean", "most", "registrar", "PSS, all")
    ]
    rows += [
        (
            contender.name + (" !" if any(one.shared_outside for one in found) else ""),
            mib(median(one.uss for one in found)),
            mib(median(one.supervisor for one in found)),
            f"{median(mean(one.workers) for one in found) / 2**20:.2f} MiB",
            f"{max(max(one.workers) for one in found) / 2**20:.2f} MiB",
            mib(median(one.others for one in found)) if contender is PEERD else "-",
            mib(median(one.pss for one in found)),
        )
        for contender in CONTENDERS.values()
        if (found := of_peers(results, contender, PEERS))
    ]
    return rows


def many_rows(results: Sequence[Result]) -> Rows:
    rows: Rows = [("supervisor", "all answer", "a worker, mean", "most", "USS, all", "PSS, all")]
    if found := of_peers(results, PEERD, MANY_PEERS):
        rows.append(
            (
                PEERD.name,
                f"{median(one.start_s for one in found):.2f} s",
                f"{median(mean(one.workers) for one in found) / 2**20:.2f} MiB",
                f"{max(max(one.workers) for one in found) / 2**20:.2f} MiB",
                mib(median(one.uss for one in found)),
                mib(median(one.pss for one in found)),
            )
        )
    return rows


def orphans_rows(results: Sequence[Result]) -> Rows:
    return [
        ("supervisor", "left"),
        *((one.contender, str(one.left)) for one in results if isinstance(one, Orphans)),
    ]


def loop_rows(results: Sequence[Result]) -> Rows:
    return [
        ("supervisor", "starts"),
        *((one.contender, str(one.starts)) for one in results if isinstance(one, Loop)),
    ]


def spread(seconds: Sequence[float]) -> tuple[str, str, str, str]:
    middle, least, most = (f"{f(seconds) * 1e3:,.1f} ms" for f in (median, min, max))
    return middle, least, most, str(len(seconds))


TRIALS: dict[
    str,
    tuple[
        Callable[[Bench, Sequence[Contender]], Sequence[Result]], Callable[[Sequence[Result]], Rows]
    ],
] = {
    "recovery": (supervisors_trials.recovery, recovery_rows),
    "start": (supervisors_trials.start, start_rows),
    "memory": (supervisors_trials.memory, memory_rows),
    "many": (supervisors_trials.many, many_rows),
    "orphans": (supervisors_trials.orphans, orphans_rows),
    "loop": (supervisors_trials.loop, loop_rows),
}

TITLES = {
    "recovery": "recovery: from kill -9 of a worker to the next answer on its port",
    "start": f"start: from the command to an answer of each of {PEERS} peers",
    "memory": f"memory: {PEERS} peers that have settled",
    "many": f"many: {MANY_PEERS} peers",
    "orphans": f"orphans: processes that live 2 s after kill -9 of the supervisor of {PEERS} peers",
    "loop": f"loop: starts in {LOOP_S:g} s of a worker that dies 1.2 s after each",
}


def check(results: Sequence[Result]) -> int:
    """What could not be judged does not hold, as far as anybody knows."""
    failures = list(supervisors_claims.failures(results))
    failures += [f"not judged: {why}" for why in supervisors_claims.unjudged(results)]
    print("", *(f"CHECK  {failure}" for failure in failures), sep="\n")
    print("CHECK  failed" if failures else "CHECK  everything that was measured of peerd holds")
    return 1 if failures else 0


def as_json(
    options: Options, surroundings: Surroundings, results: dict[str, Sequence[Result]]
) -> bytes:
    facts = {
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "surroundings": surroundings,
        "rounds": options.rounds,
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
        prog="supervisors.py",
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
        "--supervisors",
        type=names_of(CONTENDERS),
        default=list(CONTENDERS),
        metavar="A,B",
        help=f"of {', '.join(CONTENDERS)} (all)",
    )
    parser.add_argument(
        "--others",
        type=Path,
        metavar="DIR",
        help="the virtual environment that supervisor and circus are installed in (this one)",
    )
    parser.add_argument("--rounds", type=rounds, help=f"of each trial ({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 where peerd misses what it claims, or that could not be judged",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement")
    given = parser.parse_args()
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"no directory {given.json.parent}")
    if given.others is not None and not (given.others / "bin" / "python").exists():
        parser.error(f"argument --others: no virtual environment in {given.others}")
    return Options(
        trials=given.trials,
        contenders=[CONTENDERS[name] for name in given.supervisors],
        others=environment(given.others.absolute() if given.others else None),
        rounds=given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS),
        check=given.check,
        json_file=given.json,
    )


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return text.split(",")

    return names


def rounds(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"must be from 1 to 1000, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
