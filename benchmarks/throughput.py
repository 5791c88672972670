"""How many messages a second reach a Python handler, and what one costs: peerd and the others.

The receivers take turns, round after round, so that a slow minute of the machine hits all of them;
what is printed is the median and the range of the rounds. measurement.py has what one measurement
is, receivers.py who is measured, and README.md how to read the figures and what they do not say.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import orjson

try:
    from machine import Machine, choose_cpus, look_at_machine
    from measurement import (
        DATAGRAM_BYTES,
        SEGMENTS,
        BenchmarkError,
        Measurement,
        build_generator,
        granted_buffer_bytes,
        measure,
    )
    from receivers import RECEIVERS
except ImportError as error:
    sys.exit(f"throughput: {error}. Build and install peerd first: pip install -e '.[bench]'")

BASELINE = "uvloop"
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    # Ended politely, it ends as Ctrl-C does: the children first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse_options()
    try:
        benchmark(options)
    except BenchmarkError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("throughput: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


@dataclasses.dataclass(frozen=True)
class Options:
    seconds: float
    rounds: int
    receivers: list[str]
    json_file: Path | None


def benchmark(options: Options) -> None:
    cpus = choose_cpus()
    machine = look_at_machine(cpus, granted_buffer_bytes())
    print(machine, flush=True)
    if cpus.sender is not None:
        # The generator inherits it; this process only waits while the generator runs.
        os.sched_setaffinity(0, {cpus.sender})
    present = [name for name in options.receivers if RECEIVERS[name].available]
    if not present:
        raise BenchmarkError("none of these receivers is installed")
    measurements = []
    with tempfile.TemporaryDirectory(prefix="peerd-benchmark-") as folder, progress() as tell:
        generator = build_generator(Path(folder))
        for number in range(1, options.rounds + 1):
            for name in present:
                step = f"round {number}/{options.rounds}, {RECEIVERS[name].title}"
                tell(step, False)
                measured = measure(name, number, generator, options.seconds, cpus)
                measurements.append(measured)
                tell(f"{step}: {measured.rate / 1e6:.3f} M messages/s", True)
    print()
    print(table(present, measurements))
    print(footnotes(options.receivers, measurements))
    if options.json_file is not None:
        try:
            options.json_file.write_bytes(as_json(options, machine, measurements))
        except OSError as error:
            raise BenchmarkError(f"--json: {error}") from None


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, bool], None]]:
    """tell(text, done): one line that changes on a terminal, elsewhere a line for what is done."""
    terminal = sys.stderr.isatty()

    def tell(text: str, done: bool) -> None:
        if terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif done:
            print(text, file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# The table


HEADER = (
    "receiver",
    "messages/s (range)",
    "vs uvloop",
    "CPU ns/message (range)",
    "offered",
    "lost",
    "busy",
    "limited by",
)


def table(names: list[str], measurements: list[Measurement]) -> str:
    of = {name: [m for m in measurements if m.receiver == name] for name in names}
    rows = [HEADER, *(row(of[name], of.get(BASELINE, [])) for name in names)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADER))]
    lines = []
    for cells in rows:
        first, *rest = (
            cell.ljust(width) if column in (0, len(HEADER) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def row(runs: list[Measurement], baseline: list[Measurement]) -> tuple[str, ...]:
    rates = [run.rate / 1e6 for run in runs]
    costs = [run.cpu_ns for run in runs]
    # Round by round, since the two of a round met the same machine.
    ratios = [run.rate / base.rate for run, base in zip(runs, baseline, strict=False)]
    mark = " !" if any(run.unaccounted for run in runs) else ""
    return (
        RECEIVERS[runs[0].receiver].title + mark,
        f"{median(rates):.3f} M ({min(rates):.3f}-{max(rates):.3f})",
        f"x {median(ratios):.2f}" if ratios else "-",
        f"{median(costs):,.0f} ({min(costs):,.0f}-{max(costs):,.0f})",
        f"{median(run.offered_rate for run in runs) / 1e6:.1f} M",
        f"{median(run.loss for run in runs):.0%}",
        f"{median(run.busy for run in runs):.0%}",
        limited_by(runs),
    )


def limited_by(runs: list[Measurement]) -> str:
    (limit, times), *others = Counter(run.limited_by for run in runs).most_common()
    return f"{limit} ({times} of {len(runs)})" if others else limit


FOOTNOTE = f"""
{DATAGRAM_BYTES}-byte envelopes over loopback, {SEGMENTS} a send (UDP_SEGMENT); median and range.
peerd decodes every envelope in C and hands over a Message. The others hand over the raw bytes,
which their handler only counts: that favours them.
peerd takes datagrams joined by the kernel (UDP_GRO), which the others do not ask for. Most of its
lead is that, and it shrinks with senders that send one datagram at a time: see README.md.
'offered' is what the sender got out, 'lost' what found the receive buffer full, 'busy' the
receiver's share of its CPU. Where the sender is the limit, the receiver could do more.
"""


def footnotes(names: list[str], measurements: list[Measurement]) -> str:
    notes = [FOOTNOTE.rstrip()]
    for name in names:
        recipe = RECEIVERS[name]
        if not recipe.available:
            skipped = f"{recipe.title} was skipped: {recipe.needs} is not installed"
            notes.append(f"NOTE: {skipped} (pip install -e '.[bench]').")
    for run in measurements:
        where = f"round {run.round}, {RECEIVERS[run.receiver].title}"
        if run.unaccounted:
            notes.append(
                f"! WARNING: {where}: sent {run.load.sent:,} is not delivered {run.delivered:,} + "
                f"dropped by the kernel {run.kernel_drops:,}: {run.unaccounted:,} unaccounted for."
            )
        if run.load.errors:
            notes.append(f"! WARNING: {where}: {run.load.errors:,} sends failed.")
    return "\n".join(notes)


def as_json(options: Options, machine: Machine, measurements: list[Measurement]) -> bytes:
    facts = {
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "datagram_bytes": DATAGRAM_BYTES,
        "segments": SEGMENTS,
        "measurements": [
            {
                **dataclasses.asdict(run),
                "messages_per_s": run.rate,
                "offered_per_s": run.offered_rate,
                "cpu_ns_per_message": run.cpu_ns,
                "loss": run.loss,
                "busy": run.busy,
                "unaccounted": run.unaccounted,
                "limited_by": run.limited_by,
            }
            for run in measurements
        ],
    }
    return orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


# The command line


def parse_options() -> Options:
    names = "\n".join(f"  {name:12} {recipe.title}" for name, recipe in RECEIVERS.items())
    parser = argparse.ArgumentParser(
        prog="throughput.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "How many messages a second reach a Python handler, and what CPU time one costs.\n\n"
            "One load generator (C, compiled now) sends 64-byte envelopes over loopback to one\n"
            "receiver at a time, each in a process of its own. The receivers take turns for some\n"
            "rounds; the table has the median and the range. It needs a C compiler, Linux 4.18 or\n"
            "newer, and a machine that does nothing else; 2 CPUs or more, so that the sender does\n"
            "not take the receiver's time. As root the receive buffers may pass net.core.rmem_max."
        ),
        epilog=f"receivers:\n{names}\n\nREADME.md beside this file says how to read the figures.",
    )
    parser.add_argument(
        "--seconds", type=seconds, default=1.0, help="sending time of each measurement (1)"
    )
    parser.add_argument(
        "--rounds", type=rounds, default=7, help="measurements of each receiver (7)"
    )
    parser.add_argument(
        "--receivers",
        type=receiver_names,
        default=list(RECEIVERS),
        metavar="A,B",
        help="only these, in this order (default: all; see below)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every measurement and the machine"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="3 rounds of 0.2 s: to see that it works, not for figures that you quote",
    )
    given = parser.parse_args()
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"argument --json: no directory {given.json.parent}")
    if given.quick:
        given.seconds, given.rounds = 0.2, 3
    return Options(given.seconds, given.rounds, given.receivers, given.json)


def seconds(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 60:
        raise argparse.ArgumentTypeError(f"must be from 0.01 to 60, not {text}")
    return value


def rounds(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def receiver_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in RECEIVERS:
            raise argparse.ArgumentTypeError(
                f"no receiver {name!r}; there are {', '.join(RECEIVERS)}"
            )
    return names


if __name__ == "__main__":
    sys.exit(main())
