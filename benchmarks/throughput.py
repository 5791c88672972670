"""How many messages a second reach a Python handler, what one costs, and how long an answer takes.

Regimes, one after the other; in each, the receivers take turns, round after round, so that a slow
minute of the machine hits all of them. What is printed is the median and the range of the rounds.
regimes.py has who is measured how, and README.md how to read the figures and what they do not say.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import orjson

try:
    import chart
    import claims
    from children import BenchmarkError
    from datagrams import DATAGRAM_BYTES, SEGMENTS
    from latency import Latency
    from machine import Machine, choose_cpus, look_at_machine
    from measurement import Bench, Subject
    from noise import Patience
    from programs import build_programs
    from progress import Progress, showing
    from regimes import Regime, Result, present, regimes
    from sockets import granted_buffer_bytes
    from tables import table, warnings
except ImportError as error:
    sys.exit(f"throughput: {error}. Build and install peerd first: pip install -e '.[bench]'")

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
    patience_s: float
    regimes: dict[str, Regime]
    check: bool
    json_file: Path | None
    chart_file: Path | None


def benchmark(options: Options) -> None:
    cpus = choose_cpus()
    machine = look_at_machine(cpus, granted_buffer_bytes())
    print(machine, flush=True)
    for title, needs in not_installed(options.regimes):
        print(f"NOTE      no {title}: {needs} is not installed (pip install -e '.[bench]')")
    if cpus.sender is not None:
        # The senders inherit it; this process only waits while they run.
        os.sched_setaffinity(0, {cpus.sender})
    plan = {name: present(regime) for name, regime in options.regimes.items()}
    results: list[Result] = []
    steps = options.rounds * sum(len(regime.receivers) for regime in plan.values())
    with tempfile.TemporaryDirectory(prefix="peerd-benchmark-") as folder, showing(steps) as shown:
        bench = Bench(build_programs(Path(folder)), cpus, options.seconds)
        patience = Patience(options.patience_s)
        for name, regime in plan.items():
            results += run_regime(bench, name, regime, options.rounds, patience, shown)
            shown.clear()
            print(f"\n{table(name, regime, results)}", flush=True)
    print("", *warnings(results), sep="\n")
    print(FOOTNOTE)
    if options.check:
        print(claims.check(results))
    if options.json_file is not None:
        write(options.json_file, as_json(options, machine, results))
    if options.chart_file is not None:
        chart.draw(options.chart_file, machine, plan, results)


def run_regime(
    bench: Bench,
    name: str,
    regime: Regime,
    rounds: int,
    patience: Patience,
    shown: Progress,
) -> list[Result]:
    results: list[Result] = []
    for number in range(1, rounds + 1):
        for receiver, spec in regime.receivers.items():
            subject = Subject(name, receiver, spec, number)
            shown.begin(regime.title, f"round {number} of {rounds}, {spec.title}")
            results += measure_undisturbed(bench, regime, subject, patience)
            shown.end()
    return results


def measure_undisturbed(
    bench: Bench, regime: Regime, subject: Subject, patience: Patience
) -> list[Result]:
    """Measure again when somebody else used the CPUs meanwhile; the least disturbed one counts."""
    tries = [list(regime.measure(bench, subject))]
    while patience.is_left and any(result.disturbed for result in tries[-1]):
        patience.wait_for_quiet()
        began_s = time.monotonic()
        tries.append(list(regime.measure(bench, subject)))
        patience.spend(time.monotonic() - began_s)
    return min(tries, key=lambda results: max(result.others for result in results))


def not_installed(plan: dict[str, Regime]) -> list[tuple[str, str]]:
    absent = {
        receiver.title: receiver.needs
        for regime in plan.values()
        for receiver in regime.receivers.values()
        if receiver.needs is not None and not receiver.available
    }
    return list(absent.items())


FOOTNOTE = f"""
{DATAGRAM_BYTES}-byte envelopes over loopback; median and range of the rounds.
peerd decodes every envelope in C, keeps its counters and hands over a Message. The others hand over
the raw bytes, which their handler counts or sends back as they are: that favours them.
A stream of {SEGMENTS} datagrams a send is what the kernel can hand over joined (UDP_GRO); peerd asks for
that, the others do not, and most of peerd's lead in such a stream is that. 'offered' is what the
sender got out, 'lost' what found the receive buffer full, 'busy' the CPU time of the receiver's
processes a second. Where the sender is the limit, the receiver could do more. README.md says more.
"""


def as_json(options: Options, machine: Machine, results: list[Result]) -> bytes:
    facts = {
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "datagram_bytes": DATAGRAM_BYTES,
        "segments": SEGMENTS,
        "results": [as_facts(result) for result in results],
    }
    return orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def as_facts(result: Result) -> dict[str, object]:
    facts: dict[str, object] = dataclasses.asdict(result)
    if isinstance(result, Latency):
        return facts | {"cpu_ns_per_message": result.cpu_ns}
    return facts | {
        "messages_per_s": result.rate,
        "offered_per_s": result.offered_rate,
        "cpu_ns_per_message": result.cpu_ns,
        "loss": result.loss,
        "busy": result.busy,
        "unaccounted": result.unaccounted,
        "limited_by": result.limited_by,
    }


def write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise BenchmarkError(f"{file}: {error.strerror}") from None


# The command line


def parse_options() -> Options:
    everything = regimes()
    listed = "\n".join(f"  {name:17} {regime.text}" for name, regime in everything.items())
    parser = argparse.ArgumentParser(
        prog="throughput.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "How many messages a second reach a Python handler, what one costs, and how long an answer\n"
            "takes: peerd, other Python stacks, and C.\n\n"
            "Senders and references are C, compiled now. It needs a C compiler, Linux 5.0 or newer, 2\n"
            "CPUs, and a machine that does nothing else. As root the receive buffers may pass\n"
            "net.core.rmem_max."
        ),
        epilog=f"regimes:\n{listed}\n\nREADME.md beside this file says how to read the figures.",
    )
    parser.add_argument(
        "--regimes", metavar="A,B", help="only these (default: all below but the last)"
    )
    parser.add_argument("--receivers", metavar="A,B", help="only these, as in the JSON file")
    parser.add_argument(
        "--seconds", type=seconds, default=0.2, help="of each measurement's load (0.2)"
    )
    parser.add_argument("--rounds", type=count, default=5, help="measurements of each receiver (5)")
    parser.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="S",
        help="spend so many seconds in all on waiting, and measuring again, where others used more "
        "than a tenth of the CPUs (10)",
    )
    parser.add_argument(
        "--linger-us",
        type=lingers,
        default=[0],
        metavar="A,B",
        help="peerd's linger times to measure beside its default (0)",
    )
    parser.add_argument(
        "--check", action="store_true", help="hold the figures against what the project claims"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="also draw a PNG (matplotlib)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 rounds of 0.1 s: to see that it works, not for figures that you quote",
    )
    given = parser.parse_args()
    for file in (given.json, given.chart):
        if file is not None and not file.parent.is_dir():
            parser.error(f"no directory {file.parent}")
    if given.chart is not None and find_spec("matplotlib") is None:
        parser.error("--chart needs matplotlib (pip install -e '.[bench]')")
    if given.quick:
        given.seconds, given.rounds, given.patience = 0.1, 2, 0.0
    plan = regimes(given.linger_us)
    if given.regimes is not None:
        for name in given.regimes.split(","):
            if name not in plan:
                parser.error(f"no regime {name!r}; there are {', '.join(plan)}")
        plan = {name: plan[name] for name in given.regimes.split(",")}
    else:
        plan = {name: regime for name, regime in plan.items() if regime.by_default}
    if given.receivers is not None:
        plan = {name: with_only(regime, given.receivers) for name, regime in plan.items()}
        if not any(regime.receivers for regime in plan.values()):
            parser.error(f"argument --receivers: none of {given.receivers} is in these regimes")
    return Options(
        given.seconds, given.rounds, given.patience, plan, given.check, given.json, given.chart
    )


def with_only(regime: Regime, names: str) -> Regime:
    kept = {name: each for name, each in regime.receivers.items() if name in names.split(",")}
    return dataclasses.replace(regime, receivers=kept)


def seconds(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 60:
        raise argparse.ArgumentTypeError(f"must be from 0.01 to 60, not {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def lingers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
