"""``--pin auto``: each worker gets one of the CPUs that the supervisor may use."""

import math
import os
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from harness.supervised import Supervised
from peerd.supervisor.pinning import cpu_count, plan, usable_cpus

CPUS = st.lists(st.integers(0, 4095), min_size=1, max_size=300, unique=True)
QUOTAS = st.none() | st.floats(0.001, 1e6)
PEERS = st.integers(0, 600)


@given(CPUS, QUOTAS, PEERS)
def test_slots_use_only_as_many_cpus_as_the_quota_pays_for(
    cpus: list[int], quota: float | None, peers: int
) -> None:
    used = plan(cpus, quota, peers)
    assert len(used) == peers
    allowed = cpus if quota is None else cpus[: math.ceil(quota)]
    assert set(used) <= set(allowed)


@given(CPUS, QUOTAS, PEERS)
def test_slots_are_spread_evenly(cpus: list[int], quota: float | None, peers: int) -> None:
    shares = Counter(plan(cpus, quota, peers)).values()
    assert not shares or max(shares) - min(shares) <= 1
    count = len(cpus) if quota is None else min(len(cpus), math.ceil(quota))
    assert len(shares) == min(peers, count)


@given(CPUS, QUOTAS, PEERS, PEERS)
def test_a_slot_keeps_its_cpu_when_peers_are_added(
    cpus: list[int], quota: float | None, peers: int, more: int
) -> None:
    assert plan(cpus, quota, peers + more)[:peers] == plan(cpus, quota, peers)


def test_this_machine() -> None:
    assert 1 <= cpu_count() <= len(usable_cpus())
    assert set(plan(usable_cpus(), None, 100)) == set(usable_cpus())


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
