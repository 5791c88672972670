"""``--pin auto``: each worker gets one of the CPUs that the supervisor may use."""

from __future__ import annotations

import os

from harness.supervised import Supervised


def test_workers_get_cpus_round_robin(supervised: Supervised) -> None:
    running = supervised.start("--pin=auto", peers=3).wait_ready()
    cpus = sorted(os.sched_getaffinity(0))
    pinned = [os.sched_getaffinity(peer["pid"]) for peer in running.status()["peers"]]
    assert pinned == [{cpus[slot % len(cpus)]} for slot in range(3)]
    assert os.sched_getaffinity(running.pid) == set(cpus)


def test_only_cpus_that_the_supervisor_may_use(supervised: Supervised) -> None:
    everything = os.sched_getaffinity(0)
    allowed = {max(everything)}
    os.sched_setaffinity(0, allowed)
    try:
        running = supervised.start("--pin=auto", peers=2)
    finally:
        os.sched_setaffinity(0, everything)
    running.wait_ready()
    for peer in running.status()["peers"]:
        assert os.sched_getaffinity(peer["pid"]) == allowed
