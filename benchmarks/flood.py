"""What a flood does to a worker: nothing but counters, and others are answered through it.

Some floods, one after the other, each against a fresh worker on one CPU. From the other CPU come the
flood, as fast as it goes, and another client's pings, 100 a second. Meanwhile this process reads the
worker's heartbeat in the scoreboard every millisecond, and the app in the worker keeps a 20 ms timer.
flood_measurement.py has how each of them is accounted for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
from pathlib import Path

import orjson

try:
    from children import BenchmarkError
    from flood_measurement import Flood, Outcome, run_flood
    from machine import choose_cpus, look_at_machine
    from programs import build_programs
    from sockets import granted_buffer_bytes
except ImportError as error:
    sys.exit(f"flood: {error}. Build and install peerd first: pip install -e '.[bench]'")

LONG = (
    Flood("random bytes, 64 a send", "plain", valid=False, joined=True),
    Flood("random bytes, 1 a send", "plain", valid=False, joined=False),
)
SHORT = (
    Flood("messages, 64 a send", "plain", valid=True, joined=True),
    Flood("messages, 1 a send", "plain", valid=True, joined=False),
    Flood("random bytes, 64 a send", "coroutines", valid=False, joined=True),
    Flood("messages, 64 a send", "coroutines", valid=True, joined=True),
)
SHORT_SHARE = 1 / 6


def main() -> int:
    # Ended politely, it ends as Ctrl-C does: the children first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse_options()
    try:
        outcomes = run(options.seconds)
    except BenchmarkError as error:
        print(f"flood: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flood: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if options.json is not None:
        facts = [dataclasses.asdict(outcome) for outcome in outcomes]
        options.json.write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2))
    complaints = [complaint for outcome in outcomes for complaint in outcome.complaints]
    print("\nNOT as it should be, see above" if complaints else "\nall as it should be")
    return 1 if complaints else 0


def run(seconds: float) -> list[Outcome]:
    cpus = choose_cpus()
    print(look_at_machine(cpus, granted_buffer_bytes()), flush=True)
    if cpus.sender is not None:
        os.sched_setaffinity(0, {cpus.sender})
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="peerd-flood-") as folder:
        programs = build_programs(Path(folder), ("load", "flood", "ping"))
        plan = [(flood, seconds) for flood in LONG]
        plan += [(flood, seconds * SHORT_SHARE) for flood in SHORT]
        for flood, long_s in plan:
            outcomes.append(run_flood(flood, programs, cpus, long_s))
            print(text(outcomes[-1]), flush=True)
    return outcomes


def text(outcome: Outcome) -> str:
    """A block of lines."""
    seen = outcome.heartbeat
    rows = {
        "flood": f"{outcome.sent / 1e6:,.1f} M sent, {outcome.reached / 1e6:,.1f} M reached the worker "
        f"({outcome.reached / outcome.seconds / 1e6:.2f} M/s), "
        f"{outcome.decoded / 1e6:,.1f} M a handler",
        "CPU": f"{outcome.busy:.0%} used, {outcome.kept_waiting:.0%} waited for while others had it",
        "kernel": f"{outcome.kernel_drops:,} drops; {outcome.unexplained:,} datagrams unexplained",
        "pings": f"{outcome.pings:,} sent, {outcome.pings - outcome.pings_reached:,} dropped by the "
        f"kernel, {outcome.pings_reached:,} arrived, {outcome.answered:,} answered "
        f"(p50 {outcome.p50_ns / 1e6:.2f} ms, p99 {outcome.p99_ns / 1e6:.2f} ms)",
        "heartbeat": f"at most {seen.oldest_ns / 1e6:.1f} ms old "
        f"(longest time between two looks: {seen.longest_gap_ns / 1e6:.1f} ms)",
        "timer": f"{outcome.timer_fires:,} fires, at most {outcome.timer_late_ns / 1e6:.1f} ms late",
        "memory": f"{outcome.grown_bytes / 1024:+,.0f} KiB",
    }
    lines = ["", f"{outcome.title}, {outcome.app} handlers, {outcome.seconds:.0f} s"]
    lines += [f"  {name:10} {row}" for name, row in rows.items()]
    lines += [f"  WRONG      {complaint}" for complaint in outcome.complaints]
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flood.py", description=__doc__)
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of each flood of random bytes against plain handlers; the others take a sixth (60)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
