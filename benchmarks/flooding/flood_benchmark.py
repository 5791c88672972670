"""Floods of datagrams against a worker, which has to serve other clients meanwhile.

Each flood is sent to a new worker on one CPU. From the other CPU come the flood, at full speed, and 100
pings per second of another client. This process reads the worker's heartbeat in the scoreboard every
millisecond, and the app in the worker keeps a 20 ms timer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from bench.machine import Cpus, choose_cpus, describe_machine
from bench.progress import Progress
from bench.runner import Trial, number, option_parser, report, run_trials
from bench.verdicts import Verdict, failed
from flooding.flood_measurement import Flood, Outcome, run_flood
from udp.programs import Programs, built_programs
from udp.udp_sockets import granted_buffer

LONG = (
    Flood("random bytes, 64 per send", "plain", valid=False, joined=True),
    Flood("random bytes, 1 per send", "plain", valid=False, joined=False),
)
SHORT = (
    Flood("messages, 64 per send", "plain", valid=True, joined=True),
    Flood("messages, 1 per send", "plain", valid=True, joined=False),
    Flood("random bytes, 64 per send", "coroutines", valid=False, joined=True),
    Flood("messages, 64 per send", "coroutines", valid=True, joined=True),
)
SHORT_SHARE = 1 / 6


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument(
        "--seconds",
        type=number(0.1, 86_400),
        default=60.0,
        help="of each flood of random bytes against plain handlers; the others take a sixth (60)",
    )
    # A flood that goes wrong always sets the exit code.
    parser.set_defaults(check=True)
    options = parser.parse_args()
    cpus = choose_cpus()
    machine = describe_machine({}, f"{cpus}; {granted_buffer()}")
    cpus.pin_sender()
    plan = [(flood, options.seconds) for flood in LONG]
    plan += [(flood, options.seconds * SHORT_SHARE) for flood in SHORT]
    with built_programs("load", "flood", "ping") as programs:
        results = run_trials(
            {
                f"{flood.title}, {flood.app} handlers": Trial(
                    1, partial(measure, flood, programs, cpus, seconds), text
                )
                for flood, seconds in plan
            }
        )
    outcomes = [outcome for each in results.values() for outcome in each]
    facts = [dataclasses.asdict(outcome) for outcome in outcomes]
    return report(options, machine, facts, verdicts(outcomes))


def measure(
    flood: Flood, programs: Programs, cpus: Cpus, seconds: float, progress: Progress
) -> Sequence[Outcome]:
    with progress.step(flood.title, f"{flood.app} handlers"):
        return [run_flood(flood, programs, cpus, seconds)]


def verdicts(outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    for outcome in outcomes:
        claim = f"{outcome.title}, {outcome.app} handlers"
        if not outcome.complaints:
            yield Verdict(claim, "no complaint", "none", True)
        for complaint in outcome.complaints:
            yield from failed(claim, complaint)


def text(outcomes: Sequence[Outcome]) -> str:
    (outcome,) = outcomes
    seen = outcome.heartbeat
    rows = {
        "flood": f"{outcome.sent / 1e6:,.1f} M sent, {outcome.reached / 1e6:,.1f} M reached the worker "
        f"({outcome.reached / outcome.seconds / 1e6:.2f} M/s), "
        f"{outcome.decoded / 1e6:,.1f} M reached a handler",
        "CPU": f"{outcome.busy:.0%} used, {outcome.kept_waiting:.0%} waited for while others had it",
        "kernel": f"{outcome.kernel_drops:,} drops; {outcome.unexplained:,} datagrams unexplained",
        "pings": f"{outcome.pings:,} sent, {outcome.pings - outcome.pings_reached:,} dropped by the "
        f"kernel, {outcome.pings_reached:,} arrived, {outcome.answered:,} answered "
        f"(p50 {outcome.p50_ns / 1e6:.2f} ms, p99 {outcome.p99_ns / 1e6:.2f} ms)",
        "heartbeat": f"at most {seen.oldest_ns / 1e6:.1f} ms old "
        f"(longest time between two readings: {seen.longest_gap_ns / 1e6:.1f} ms)",
        "timer": f"{outcome.timer_fires:,} fires, at most {outcome.timer_late_ns / 1e6:.1f} ms late",
        "memory": f"{outcome.grown_bytes / 1024:+,.0f} KiB",
    }
    lines = [f"{outcome.title}, {outcome.app} handlers, {outcome.seconds:.0f} s"]
    lines += [f"  {name:10} {row}" for name, row in rows.items()]
    lines += [f"  WRONG      {complaint}" for complaint in outcome.complaints]
    return "\n".join(lines)
