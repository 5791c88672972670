"""Whether a worker's memory grows: many messages through it, and its resident memory on the way.

A sender that is faster than the worker fills its batches and overflows its queue. The messages that
reach the handler are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from bench.children import resident_bytes
from bench.machine import Cpus, choose_cpus, describe_machine
from bench.progress import Progress
from bench.runner import Trial, add_names, number, option_parser, report, run_trials, titled_table
from bench.verdicts import Verdict, at_most, equal
from peerd._scoreboard import Slot
from peerd.settings import DatagramSettings
from regimes.rates import run_sender
from udp.envelope import SEGMENTS, datagram
from udp.peerd_workers import counted_messages, start_workers
from udp.programs import Programs, built_programs
from udp.udp_sockets import bound_socket, granted_buffer, port_of, wait_until_empty

MILLION = 1_000_000
MAX_GROWTH_KIB = 1024  # Of a worker, after its first million messages
APPS = ("counting", "counting_batch", "counting_async", "echo", "echo_async")
BURST_S = 0.1


@dataclasses.dataclass(frozen=True)
class Milestone:
    app: str
    messages: int  # As the worker counts
    resident_bytes: int
    delivered: int | None = None  # As the handler counts, at the end


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument(
        "--millions", type=number(1, 1_000_000, int), default=100, help="of messages per app (100)"
    )
    add_names(parser, "--apps", APPS, ["counting"])
    # Growth always sets the exit code.
    parser.set_defaults(check=True)
    options = parser.parse_args()
    cpus = choose_cpus()
    machine = describe_machine({}, f"{cpus}; {granted_buffer()}")
    cpus.pin_sender()
    with built_programs("load") as programs:
        results = run_trials(
            {
                app: Trial(
                    len(goals(options.millions)),
                    partial(soak, app, options.millions, programs, cpus),
                    table,
                )
                for app in options.apps
            }
        )
    return report(options, machine, results, verdicts(results.values()))


def soak(
    app: str, millions: int, programs: Programs, cpus: Cpus, progress: Progress
) -> list[Milestone]:
    milestones = []
    with (
        bound_socket() as sock,
        start_workers(
            [sock], f"regimes.apps:{app}", DatagramSettings(), counted_messages
        ) as workers,
    ):
        (worker,) = workers
        cpus.pin_receiver(worker.pid)
        command = [programs.path("load"), "-s", str(BURST_S), "-g", str(SEGMENTS)]
        command += [datagram().hex(), str(port_of(sock))]
        for goal in goals(millions):
            with progress.step(app, f"{goal} million messages"):
                while handled(worker.slot) < goal * MILLION:
                    run_sender(command, BURST_S)
                    wait_until_empty([sock], worker.check_alive)
            resident = resident_bytes(worker.pid)
            milestones.append(Milestone(app, handled(worker.slot), resident))
        delivered = worker.stop()["messages"]
    milestones[-1] = dataclasses.replace(milestones[-1], delivered=delivered)
    return milestones


def goals(millions: int) -> list[int]:
    """The first million, and each tenth of the whole."""
    tenths = (millions * tenth // 10 for tenth in range(1, 11))
    return [1, *(goal for goal in tenths if goal > 1)]


def handled(slot: Slot) -> int:
    return slot.counters()["rx_messages"]


def growth_kib(milestones: Sequence[Milestone]) -> float:
    """From the first million on, because receive buffers get their pages when they are first filled."""
    return (milestones[-1].resident_bytes - milestones[0].resident_bytes) / 1024


def table(milestones: Sequence[Milestone]) -> str:
    rows = [("messages", "resident", "growth")]
    rows += [
        (
            f"{milestone.messages / MILLION:.1f} M",
            f"{milestone.resident_bytes / 2**20:.2f} MiB",
            f"{growth_kib([milestones[0], milestone]):+.0f} KiB",
        )
        for milestone in milestones
    ]
    return titled_table(milestones[0].app, rows)


def verdicts(results: Iterable[Sequence[Milestone]]) -> Iterator[Verdict]:
    for milestones in results:
        app, last = milestones[0].app, milestones[-1]
        yield from at_most(f"{app}: growth", growth_kib(milestones), MAX_GROWTH_KIB, " KiB")
        yield from equal(f"{app}: messages at the handler", last.delivered, last.messages)
