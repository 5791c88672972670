"""A cluster of three members, of which the connected one fails, first as a follower, then as the leader."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.cluster_network import ClusterNetwork
from harness.etcd_cluster import SIZE, EtcdCluster
from harness.etcd_gateway import Gateway, GatewayError
from harness.etcd_process import EtcdProcess
from harness.etcd_versions import ETCD_VERSIONS
from harness.eventually import eventually
from harness.namespaces import why_no_networks
from harness.record_writer import RecordWriter
from harness.watch_recorder import WatchRecorder, check_revisions, every_event, replayed
from peerd.registry import PeerRecord, Registry

PREFIX = "clustered"
FOLDER = b"clustered/"
MINE = PeerRecord("localhost", 5009, "mine")
TTL_S = 10
READS_AGAIN_WITHIN_S = 15.0
EVENTS_AGAIN_WITHIN_S = 30.0
log = logging.getLogger(__name__)

LONG = os.environ.get("PEERD_LONG_TESTS") == "1"

needs_networks = pytest.mark.skipif(bool(why_no_networks()), reason=why_no_networks())


Act = Callable[[EtcdCluster, EtcdProcess], None]
FAILURES: dict[str, tuple[Act, Act]] = {
    "killed": (lambda cluster, member: member.kill(), lambda cluster, member: member.start()),
    "stopped": (lambda cluster, member: member.stop(), lambda cluster, member: member.cont()),
    "cut-off": (EtcdCluster.cut, EtcdCluster.mend),
    "cut-off-from-its-peers": (EtcdCluster.cut_from_peers, EtcdCluster.mend),
}
"""How each begins and ends."""


@pytest.fixture(
    params=[
        "killed",
        pytest.param("stopped", marks=pytest.mark.slow),
        pytest.param("cut-off", marks=needs_networks),
        pytest.param("cut-off-from-its-peers", marks=[needs_networks, pytest.mark.slow]),
    ]
)
def failure_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ETCD_VERSIONS)
def cluster(
    request: pytest.FixtureRequest, failure_name: str, tmp_path: Path
) -> Iterator[EtcdCluster]:
    if failure_name.startswith("cut-off"):
        with (
            ClusterNetwork(SIZE) as network,
            EtcdCluster(request.param, tmp_path, network) as cluster,
        ):
            yield cluster
    else:
        with EtcdCluster(request.param, tmp_path) as cluster:
            yield cluster


def connected_member(cluster: EtcdCluster, registry: Registry) -> EtcdProcess:
    registry.nodes()
    (member,) = (one for one in cluster.members if one.endpoint == registry.endpoint)
    return member


@pytest.mark.timeout(240)
def test_the_connected_member_fails(cluster: EtcdCluster, failure_name: str) -> None:
    begin, end = FAILURES[failure_name]
    with (
        Registry(cluster.endpoints, PREFIX, lease_ttl_s=TTL_S) as registry,
        registry.cache() as cache,
        WatchRecorder(registry.watch()) as recorder,
    ):
        registration = registry.register(MINE)
        recorder.wait_for({"mine": MINE})
        put = cluster.members[0].gateway.items(FOLDER + b"mine")
        for leads in (False, True):
            member = connected_member(cluster, registry)
            others = cluster.others(member)
            cluster.move_leader(member if leads else others[0])
            assert connected_member(cluster, registry) is member

            # Its timeout outlasts an election, and it writes through a member that does not fail.
            writer = RecordWriter(Gateway(others[0].plain, timeout_s=1.0), PREFIX, seed=leads)
            with writer.writing():
                begin(cluster, member)
                began_s = time.monotonic()
                eventually(registry.nodes, READS_AGAIN_WITHIN_S)
                took_s = time.monotonic() - began_s
                log.info("%s, leads=%s: reading again after %.2f s", failure_name, leads, took_s)
                assert took_s < READS_AGAIN_WITHIN_S
                check_reads_go_on(registry)
                assert connected_member(cluster, registry) is not member
                wait_for_events(recorder, writer.revision)
                log.info("and events after %.2f s", time.monotonic() - began_s)
                check_newcomers(cluster)
                wait_for_keep_alive(cluster, others)
                if LONG:
                    time.sleep(TTL_S + 3)  # a lease that is not refreshed would have expired
                assert registration.registered
                end(cluster, member)
            member.wait_ready()

            history = every_event(others[0].gateway.history(FOLDER))
            recorder.wait_for(replayed(history))
            assert recorder.events == history
            check_revisions(recorder.events)
            for one in cluster.members:
                eventually(lambda: one.gateway.items(FOLDER + b"mine") == put)  # noqa: B023
            eventually(lambda: {r.peer_id: r for r in cache.nodes()} == replayed(history))  # noqa: B023


def check_reads_go_on(registry: Registry) -> None:
    """No read returns to the failed member and waits for it."""
    for _ in range(20):
        began_s = time.monotonic()
        assert MINE in registry.nodes()
        assert time.monotonic() - began_s < READS_AGAIN_WITHIN_S


def check_newcomers(cluster: EtcdCluster) -> None:
    """Some of the new clients ask the failed member first."""
    for _ in range(6):
        began_s = time.monotonic()
        with Registry(cluster.endpoints, PREFIX) as registry:
            assert MINE in registry.nodes()
        assert time.monotonic() - began_s < READS_AGAIN_WITHIN_S


def wait_for_events(recorder: WatchRecorder, revision: int) -> None:
    """Until the watch has reported a write after ``revision``, which is one after the failure."""
    eventually(lambda: recorder.events[-1].revision > revision, EVENTS_AGAIN_WITHIN_S)


def wait_for_keep_alive(cluster: EtcdCluster, members: list[EtcdProcess]) -> None:
    """Until the new leader has renewed a lease. Its election has extended each of them once."""

    def renewed() -> float:
        return sum(one.metric("etcd_debugging_lease_renewed_total") for one in members)

    assert cluster.leader() in members
    before = renewed()
    eventually(lambda: renewed() > before)


def test_a_cluster_without_a_majority(cluster: EtcdCluster, failure_name: str) -> None:
    """Only serializable reads work until the majority is back; then the watch resumes."""
    begin, end = FAILURES[failure_name]
    writer = RecordWriter(cluster.members[0].gateway, PREFIX)
    writer.put("first")
    with (
        Registry(cluster.endpoints, PREFIX, timeout_s=5.0) as registry,
        registry.cache() as cache,
        WatchRecorder(registry.watch()) as recorder,
    ):
        recorder.wait_for(writer.records())
        assert cache.wait_current(60)
        for member in cluster.members[1:]:
            begin(cluster, member)
        eventually(lambda: not cache.current)
        assert [record.peer_id for record in cache.nodes()] == ["first"]
        eventually(lambda: [r.peer_id for r in registry.nodes(serializable=True)] == ["first"])
        recorder.check_alive()
        for member in cluster.members[1:]:
            if failure_name == "killed":
                member.launch()  # it becomes ready only with the other one
            else:
                end(cluster, member)
        eventually(lambda: cache.current)
        eventually(write_one(writer))
        recorder.wait_for(writer.records())
        assert recorder.events == every_event(cluster.members[0].gateway.history(FOLDER))


def write_one(writer: RecordWriter) -> Callable[[], bool]:
    def write() -> bool:
        try:
            writer.write()
        except (OSError, GatewayError):
            return False
        return True

    return write
