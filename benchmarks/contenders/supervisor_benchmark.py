"""peerd's supervisor compared with other supervisors of Python: supervisord and circus.

How long a killed worker is missed, how long 8 peers and --help take to start, the memory of the whole
tree, the processes that outlive a killed supervisor, and how often a worker that keeps dying is started.
README.md explains the tables.

The others come with ``pip install 'peerd[bench]'``, or from another environment (``--others DIR``); one
that is not installed is left out. peerd registers its peers in a real etcd, which is started first.
"""

from __future__ import annotations

from pathlib import Path

from bench.machine import describe_machine
from bench.runner import add_names, number, option_parser, report, run_trials, verdicts_of
from contenders.contender import (
    CONTENDERS,
    ECHO,
    ECHO_APP,
    PEERD,
    environment,
    installed_version,
    started,
)
from contenders.deaths import loop_trial, orphans_trial
from contenders.guard import guarded_folder
from contenders.memory import many_trial, memory_trial
from contenders.side_by_side import PEERS, Bench, wait_for_answers
from contenders.timings import help_trial, recovery_trial, start_trial
from etcd_clients.etcd import etcd_version
from peerd.registry.embedded_etcd import EmbeddedEtcd

TRIALS = {
    "recovery": recovery_trial,
    "start": start_trial,
    "help": help_trial,
    "memory": memory_trial,
    "many": many_trial,
    "orphans": orphans_trial,
    "loop": loop_trial,
}
ROUNDS = 8
QUICK_ROUNDS = 3


def main() -> int:
    parser = option_parser(__doc__)
    add_names(parser, "--trials", TRIALS)
    add_names(parser, "--supervisors", CONTENDERS)
    parser.add_argument(
        "--others",
        type=Path,
        metavar="DIR",
        help="the virtual environment of supervisor and circus (this one)",
    )
    parser.add_argument("--rounds", type=number(1, 1000, int), help=f"of each trial ({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    options = parser.parse_args()
    if options.others is not None and not (options.others / "bin" / "python").exists():
        parser.error(f"argument --others: no virtual environment in {options.others}")
    others = environment(options.others.absolute() if options.others else None)
    contenders = [CONTENDERS[name] for name in options.supervisors]
    missing = [c for c in contenders if c is not PEERD and not others.has(c.program)]
    contenders = [contender for contender in contenders if contender not in missing]
    machine = describe_machine(
        {"etcd": etcd_version()}
        | {c.name: installed_version(others, c.package) for c in contenders if c is not PEERD}
    )
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    with guarded_folder("peerd-benchmark-") as folder, EmbeddedEtcd() as etcd:
        bench = Bench(contenders, missing, folder, etcd.endpoint, others, rounds)
        warm_up(bench)
        trials = {name: TRIALS[name](bench) for name in options.trials}
        results = run_trials(trials)
    return report(options, machine, results, verdicts_of(trials, results), rounds=rounds)


def warm_up(bench: Bench) -> None:
    """So that the files of all contenders are cached, and their modules compiled."""
    for contender in bench.contenders:
        with started(contender, bench.order("warm-up", PEERS, ECHO, ECHO_APP)) as run:
            wait_for_answers(contender, run)
