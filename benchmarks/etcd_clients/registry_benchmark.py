"""peerd's registry compared with the other etcd clients of Python.

How many events a watch reports across a kill -9 of etcd, how long a read takes after the connected member
has failed, what a listing and a thousand kept leases cost, and whether a forked child can read. The etcds
are real and started here. README.md explains the tables.

The other clients come with ``pip install -e '.[bench]'``; one that is not installed is left out. etcd3
0.12.0 cannot be imported directly with protobuf 4 and newer, and is imported by peerd's import_etcd3().
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.machine import describe_machine, package_version
from bench.runner import add_names, number, option_parser, report, run_trials, verdicts_of
from etcd_clients import failover, fork, leases, listing, watch
from etcd_clients.client_process import Bench
from etcd_clients.clients import CLIENTS
from etcd_clients.etcd import etcd_version

TRIALS = {
    "watch": watch.trial,
    "failover": failover.trial,
    "listing": listing.trial,
    "leases": leases.trial,
    "fork": fork.trial,
}
LIBRARIES = ("grpcio", "protobuf")


def main() -> int:
    parser = option_parser(__doc__)
    add_names(parser, "--trials", TRIALS)
    add_names(parser, "--clients", CLIENTS)
    parser.add_argument(
        "--seconds", type=number(1, 3600), default=15.0, help="that each client keeps leases (15)"
    )
    options = parser.parse_args()
    packages = [spec.package for spec in CLIENTS.values() if spec.package is not None]
    versions = {name: package_version(name) for name in (*packages, *LIBRARIES)}
    machine = describe_machine({"etcd": etcd_version(), **versions})
    for name in options.clients:
        if not CLIENTS[name].installed:
            print(f"NOTE      no {name}: it is not installed (pip install -e '.[bench]')")
    clients = [name for name in options.clients if CLIENTS[name].installed]
    with tempfile.TemporaryDirectory(prefix="peerd-benchmark-") as folder:
        bench = Bench(clients, Path(folder), options.seconds)
        trials = {name: TRIALS[name](bench) for name in options.trials}
        results = run_trials(trials)
    verdicts = verdicts_of(trials, results)
    return report(options, machine, results, verdicts, seconds=options.seconds)
