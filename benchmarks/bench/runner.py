"""A benchmark is a series of trials. Each measures, prints a table, judges claims, and adds to the JSON file.

The options that every benchmark has are added here: ``--check`` compares the results with the
project's claims and sets the exit code, ``--json`` keeps every measurement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bench.children import BenchmarkError
from bench.machine import Machine
from bench.progress import Progress
from bench.tables import aligned
from bench.verdicts import Verdict


@dataclass(frozen=True)
class Trial:
    steps: int  # How often ``measure`` enters ``Progress.step()``
    measure: Callable[[Progress], Sequence[Any]]
    table: Callable[[Sequence[Any]], str]  # The text that is printed for the results of ``measure``
    judge: Callable[[Sequence[Any]], Iterable[Verdict]] = lambda _: ()


def run_trials(trials: Mapping[str, Trial]) -> dict[str, Sequence[Any]]:
    """The results by trial. Each table is printed as soon as its trial is over."""
    results: dict[str, Sequence[Any]] = {}
    progress = Progress(sum(trial.steps for trial in trials.values()))
    try:
        for name, trial in trials.items():
            results[name] = trial.measure(progress)
            progress.clear()
            print(f"\n{trial.table(results[name])}", flush=True)
    finally:
        progress.clear()
    return results


def verdicts_of(
    trials: Mapping[str, Trial], results: Mapping[str, Sequence[Any]]
) -> Iterator[Verdict]:
    for name, trial in trials.items():
        yield from trial.judge(results[name])


def titled_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([title, *aligned(rows)])


def report(
    options: argparse.Namespace,
    machine: Machine,
    results: object,
    verdicts: Iterable[Verdict],
    **facts: object,
) -> int:
    """Write the JSON file and check the claims, if the options say so; returns the exit code."""
    if options.json is not None:
        taken_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        document = {"taken_at": taken_at, "machine": machine, **facts, "results": results}
        try:
            options.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        except OSError as error:
            raise BenchmarkError(f"{options.json}: {error.strerror}") from None
    if not options.check:
        return 0
    found = list(verdicts)
    rows = [("claim", "bound", "measured", "holds")]
    rows += [(v.claim, v.bound, v.measured, "yes" if v.holds else "NO") for v in found]
    print("", *aligned(rows), sep="\n")
    return 0 if all(verdict.holds for verdict in found) else 1


# The command line


def option_parser(description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        epilog=epilog,
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a claim of the project does not hold"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all measurements")
    return parser


def add_names(
    parser: argparse.ArgumentParser, flag: str, known: Iterable[str], default: Sequence[str] = ()
) -> None:
    """An option that takes names with commas between; without ``default`` it means all of them."""
    names = list(known)
    parser.add_argument(
        flag,
        type=lambda text: _names_of(text, names),
        default=list(default) or names,
        metavar="A,B",
        help=f"of {', '.join(names)} ({', '.join(default) or 'all'})",
    )


def number(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """The type of an option that is a number from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its error for a text like "x"
    return parse


def output_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {path.parent}")
    return path


def _names_of(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
    return names
