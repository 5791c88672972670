"""Whether a worker grows: many messages through it, and its resident memory on the way.

One worker as ``peerd supervise`` runs it, and a sender that is faster than it, so its batches are full
and its queue overflows. What counts is what reached the handler.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    from children import BenchmarkError
    from datagrams import SEGMENTS, datagram
    from machine import choose_cpus, look_at_machine
    from measurement import run_sender
    from peerd._scoreboard import Slot
    from peerd.settings import DatagramSettings
    from peerd_workers import counted_messages, start_workers
    from process_memory import resident_bytes
    from programs import build_programs
    from sockets import bound_socket, granted_buffer_bytes, port_of, wait_until_empty
except ImportError as error:
    sys.exit(f"soak: {error}. Build and install peerd first: pip install -e '.[bench]'")

MILLION = 1_000_000
LIMIT_BYTES = 1 << 20
"""What a worker may grow by after its first million messages."""

APPS = ("counting", "counting_batch", "counting_async", "echo", "echo_async")
BURST_S = 0.1


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse_options()
    cpus = choose_cpus()
    print(look_at_machine(cpus, granted_buffer_bytes()), flush=True)
    if cpus.sender is not None:
        os.sched_setaffinity(0, {cpus.sender})
    try:
        flat = [soak(app, options.millions, cpus.receiver) for app in options.apps]
    except BenchmarkError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0 if all(flat) else 1


def soak(app: str, millions: int, cpu: int | None) -> bool:
    """Whether the worker stayed within LIMIT_BYTES."""
    print(f"\n{app}, {millions} million messages")
    with (
        tempfile.TemporaryDirectory(prefix="peerd-soak-") as folder,
        bound_socket() as sock,
        start_workers([sock], f"apps:{app}", DatagramSettings(), counted_messages) as (worker,),
    ):
        if cpu is not None:
            os.sched_setaffinity(worker.pid, {cpu})
        sender = build_programs(Path(folder), ["load"]).path("load")
        command = [sender, "-s", str(BURST_S), "-g", str(SEGMENTS), datagram().hex()]
        first_bytes = last_bytes = 0
        for goal in milestones(millions):
            while handled(worker.slot) < goal * MILLION:
                run_sender([*command, str(port_of(sock))], BURST_S)
                wait_until_empty([sock], worker.check_alive)
            last_bytes = resident_bytes(worker.pid)
            first_bytes = first_bytes or last_bytes
            grown = (last_bytes - first_bytes) / 1024
            print(
                f"  {handled(worker.slot) / MILLION:8.1f} M messages   "
                f"{last_bytes / 2**20:7.2f} MiB resident   {grown:+6.0f} KiB",
                flush=True,
            )
        messages = handled(worker.slot)
        delivered = worker.stop()["messages"]
    is_flat = last_bytes - first_bytes <= LIMIT_BYTES
    if messages != delivered:
        print(f"  WRONG: the worker counted {messages:,}, the handler {delivered:,}")
    print(f"  {'flat' if is_flat else 'NOT FLAT'}: {(last_bytes - first_bytes) / 1024:+.0f} KiB")
    return is_flat and messages == delivered


def milestones(millions: int) -> Iterator[int]:
    """After the first million and after each tenth of the whole."""
    yield 1
    for tenth in range(1, 11):
        if millions * tenth // 10 > 1:
            yield millions * tenth // 10


def handled(slot: Slot) -> int:
    return slot.counters()["rx_messages"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__)
    parser.add_argument("--millions", type=int, default=100, help="messages for each app (100)")
    parser.add_argument(
        "--apps",
        type=lambda text: text.split(","),
        default=["counting"],
        metavar="A,B",
        help=f"of apps.py: {', '.join(APPS)} (counting)",
    )
    options = parser.parse_args()
    if options.millions < 1:
        parser.error("argument --millions: must be 1 or more")
    for app in options.apps:
        if app not in APPS:
            parser.error(f"argument --apps: no app {app!r}; there are {', '.join(APPS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
