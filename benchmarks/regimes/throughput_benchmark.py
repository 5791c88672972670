"""How many messages per second reach a Python handler, what one costs, and how long an answer takes.

peerd, other Python stacks, and C, in regimes. In each regime the receivers take turns, round by round,
so that a slow minute of the machine affects all of them. Printed are the median and the range.

Senders and references are written in C and compiled for each run. The benchmark needs a C compiler,
Linux 5.0 or newer, 2 CPUs, and a machine that does nothing else. As root the receive buffers may exceed
net.core.rmem_max.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from bench.machine import choose_cpus, describe_machine, package_version
from bench.noise import Patience
from bench.progress import Progress
from bench.runner import Trial, add_names, number, option_parser, output_file, report, run_trials
from regimes import chart
from regimes.latency import Latency
from regimes.rates import RunSettings, Subject
from regimes.regime_tables import table, warnings
from regimes.regimes import Regime, Result, present, regimes
from regimes.speed_claims import verdicts
from udp.envelope import DATAGRAM_BYTES, SEGMENTS
from udp.programs import built_programs
from udp.udp_sockets import granted_buffer

COMPARED = ("uvloop", "rloop", "aiofastnet")

FOOTNOTE = f"""
{DATAGRAM_BYTES}-byte envelopes over loopback; median and range of the rounds.
peerd decodes every envelope in C, keeps its counters and passes a Message to its handler. The others
pass the raw bytes to their handlers, which count them or send them back: that favours them.
The kernel can deliver a stream of {SEGMENTS} datagrams per send joined (UDP_GRO). peerd asks for that, the
others do not, and most of peerd's lead in such a stream comes from it. 'offered' is the rate of the
sender, 'lost' the share that found the receive buffer full, 'busy' the CPU time of the receiver's
processes per second. Where the sender is the limit, the receiver could do more. See README.md.
"""


def main() -> int:
    options = parse_options()
    cpus = choose_cpus()
    machine = describe_machine(
        {name: package_version(name) for name in COMPARED}, f"{cpus}; {granted_buffer()}"
    )
    for title, needs in not_installed(options.plan):
        print(f"NOTE      no {title}: {needs} is not installed (pip install -e '.[bench]')")
    cpus.pin_sender()
    plan = {name: present(regime) for name, regime in options.plan.items()}
    with built_programs("load", "ping", "echo_load", "reference") as programs:
        settings = RunSettings(programs, cpus, options.seconds)
        patience = Patience(options.patience)
        trials = {
            name: Trial(
                options.rounds * len(regime.receivers),
                partial(run_regime, settings, name, regime, options.rounds, patience),
                partial(table, name, regime),
            )
            for name, regime in plan.items()
        }
        by_regime = run_trials(trials)
    results: list[Result] = [result for each in by_regime.values() for result in each]
    print("", *warnings(results), sep="\n")
    print(FOOTNOTE)
    if options.chart is not None:
        chart.draw(options.chart, machine, plan, results)
    return report(
        options,
        machine,
        [as_facts(result) for result in results],
        verdicts(results),
        seconds=options.seconds,
        rounds=options.rounds,
        datagram_bytes=DATAGRAM_BYTES,
        segments=SEGMENTS,
    )


def run_regime(
    settings: RunSettings,
    name: str,
    regime: Regime,
    rounds: int,
    patience: Patience,
    progress: Progress,
) -> list[Result]:
    results: list[Result] = []
    for round_ in range(1, rounds + 1):
        for receiver, spec in regime.receivers.items():
            subject = Subject(name, receiver, spec, round_)
            with progress.step(regime.title, f"round {round_} of {rounds}, {spec.title}"):
                results += measure_undisturbed(settings, regime, subject, patience)
    return results


def measure_undisturbed(
    settings: RunSettings, regime: Regime, subject: Subject, patience: Patience
) -> Sequence[Result]:
    """Measure again while others use the CPUs; the least disturbed measurement counts."""
    tries = [regime.measure(settings, subject)]
    while patience.is_left and any(result.disturbed for result in tries[-1]):
        patience.wait_for_quiet()
        began_s = time.monotonic()
        tries.append(regime.measure(settings, subject))
        patience.spend(time.monotonic() - began_s)
    return min(tries, key=lambda results: max(result.others for result in results))


def not_installed(plan: dict[str, Regime]) -> Iterator[tuple[str, str]]:
    absent = {
        receiver.title: receiver.needs
        for regime in plan.values()
        for receiver in regime.receivers.values()
        if receiver.needs is not None and not receiver.available
    }
    yield from absent.items()


def as_facts(result: Result) -> dict[str, Any]:
    facts = dataclasses.asdict(result) | {"cpu_ns_per_message": result.cpu_ns}
    if isinstance(result, Latency):
        return facts
    facts |= {"messages_per_s": result.rate, "offered_per_s": result.offered_rate}
    names = ("loss", "busy", "unaccounted", "limited_by")
    return facts | {name: getattr(result, name) for name in names}


# The command line


def parse_options() -> argparse.Namespace:
    known = regimes()
    listed = "\n".join(f"  {name:19} {regime.text}" for name, regime in known.items())
    parser = option_parser(__doc__, f"regimes:\n{listed}\n\nREADME.md explains the figures.")
    add_names(parser, "--regimes", known, [n for n, regime in known.items() if regime.by_default])
    parser.add_argument("--receivers", metavar="A,B", help="only these, as in the JSON file")
    parser.add_argument(
        "--seconds", type=number(0.01, 60), default=0.2, help="of load per measurement (0.2)"
    )
    parser.add_argument(
        "--rounds", type=number(1, 1000, int), default=5, help="measurements per receiver (5)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds of the whole run to spend on waiting and measuring again while others use more "
        "than a tenth of the CPUs (10)",
    )
    parser.add_argument(
        "--linger-us",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[0],
        metavar="A,B",
        help="linger times of peerd to measure in addition to its default (0)",
    )
    parser.add_argument(
        "--chart", type=output_file, metavar="FILE", help="draw a PNG (needs matplotlib)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 rounds of 0.1 s, to try it out; not for figures to quote",
    )
    options = parser.parse_args()
    if options.chart is not None and find_spec("matplotlib") is None:
        parser.error("--chart needs matplotlib (pip install -e '.[bench]')")
    if options.quick:
        options.seconds, options.rounds, options.patience = 0.1, 2, 0.0
    plan = regimes(options.linger_us)
    options.plan = {name: plan[name] for name in options.regimes}
    if options.receivers is not None:
        names = options.receivers.split(",")
        for name, regime in options.plan.items():
            kept = {name: each for name, each in regime.receivers.items() if name in names}
            options.plan[name] = dataclasses.replace(regime, receivers=kept)
        if not any(regime.receivers for regime in options.plan.values()):
            parser.error(f"argument --receivers: none of {options.receivers} is in these regimes")
    return options
