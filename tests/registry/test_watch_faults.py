"""A watch while etcd is killed, stopped, compacted and wiped, and while the network fails.

As long as etcd has the history, the watch reports every event, once, in order. If etcd has lost it
(compacted, wiped), the watch reports exactly the difference. It never raises and never ends.
"""

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.etcd_gateway import Gateway
from harness.etcd_process import EtcdProcess
from harness.etcd_versions import ETCD_VERSIONS
from harness.eventually import eventually
from harness.faulty_proxy import Fault, FaultyProxy
from harness.record_writer import RecordWriter
from harness.watch_recorder import WatchRecorder, check_revisions, every_event, replayed
from peerd.registry import Joined, Left, PeerRecord, Registry, Updated

PREFIX = "watched"
FOLDER = b"watched/"
SEED = 20261123


@pytest.fixture(params=ETCD_VERSIONS)
def etcd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(request.param, tmp_path) as etcd:
        yield etcd


@pytest.fixture
def writer(etcd: EtcdProcess) -> RecordWriter:
    """With one record in etcd: a watch that has reported it has started."""
    writer = RecordWriter(etcd.gateway, PREFIX)
    writer.put("first")
    return writer


@pytest.fixture
def proxy(etcd: EtcdProcess) -> Iterator[FaultyProxy]:
    with FaultyProxy(etcd.client, SEED) as proxy:
        yield proxy


@pytest.fixture
def recorder(etcd: EtcdProcess, writer: RecordWriter) -> Iterator[WatchRecorder]:
    """The recorder of a watch that has started."""
    with Registry(etcd.endpoint, PREFIX) as registry, WatchRecorder(registry.watch()) as recorder:
        recorder.wait_for(writer.records())
        yield recorder


@pytest.fixture
def recorder_behind_proxy(proxy: FaultyProxy, writer: RecordWriter) -> Iterator[WatchRecorder]:
    with Registry(proxy.endpoint, PREFIX) as registry, WatchRecorder(registry.watch()) as recorder:
        recorder.wait_for(writer.records())
        yield recorder


def check_every_event(recorder: WatchRecorder, etcd: EtcdProcess) -> None:
    history = every_event(etcd.gateway.history(FOLDER))
    recorder.wait_for(replayed(history))
    assert recorder.events == history
    check_revisions(recorder.events)


def wait_for_more(recorder: WatchRecorder) -> None:
    enough = len(recorder.events) + 10
    eventually(lambda: len(recorder.events) > enough)


# etcd itself


def test_kill_9_and_restart(
    etcd: EtcdProcess, recorder: WatchRecorder, writer: RecordWriter
) -> None:
    for _ in range(3):
        writer.write(10)
        etcd.kill()  # with the last events still on their way
        etcd.start()
        writer.write(10)
    check_every_event(recorder, etcd)
    assert len(recorder.events) == 61


def test_kill_9_while_others_write(
    etcd: EtcdProcess, recorder: WatchRecorder, writer: RecordWriter
) -> None:
    with writer.writing():
        for _ in range(3):
            wait_for_more(recorder)
            etcd.restart()
    check_every_event(recorder, etcd)


def test_etcd_is_stopped_for_10_s(
    etcd: EtcdProcess, recorder: WatchRecorder, writer: RecordWriter
) -> None:
    writer.write(10)
    etcd.stop()
    waiting = RecordWriter(Gateway(etcd.plain, timeout_s=30.0), PREFIX, seed=2)
    thread = threading.Thread(target=waiting.put, args=["written-while-stopped"])
    thread.start()
    time.sleep(10.0)  # longer than every deadline on the way
    recorder.check_alive()
    etcd.cont()
    thread.join()
    writer.write(10)
    check_every_event(recorder, etcd)


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.HALF_OPEN])
def test_compaction_past_the_watched_revision(
    etcd: EtcdProcess,
    recorder_behind_proxy: WatchRecorder,
    proxy: FaultyProxy,
    writer: RecordWriter,
    fault: Fault,
) -> None:
    recorder = recorder_behind_proxy
    for peer_id in ("changes", "leaves", "comes back", "stays"):
        writer.put(peer_id)
    before = writer.records()
    recorder.wait_for(before)
    reported = len(recorder.events)

    proxy.begin(fault)
    writer.put("changes")
    changed = writer.put("changes")
    writer.delete("leaves")
    writer.delete("comes back")
    back = writer.put("comes back")
    writer.put("comes and leaves")
    writer.delete("comes and leaves")
    joined = writer.put("joins")
    etcd.gateway.compact(writer.revision)
    recorder.check_alive()
    proxy.end()

    recorder.wait_for(writer.records())
    writer.put("afterwards")
    recorder.wait_for(writer.records())
    difference = recorder.events[reported:-1]
    assert Counter((type(event), event.record) for event in difference) == Counter(
        [(Updated, changed), (Left, before["leaves"]), (Updated, back), (Joined, joined)]
    )
    check_revisions(recorder.events)


@pytest.mark.parametrize("more_revisions", [0, 100], ids=["younger", "older"])
def test_the_data_are_wiped(
    etcd: EtcdProcess,
    recorder_behind_proxy: WatchRecorder,
    proxy: FaultyProxy,
    writer: RecordWriter,
    more_revisions: int,
) -> None:
    """The new store may have grown past the watched revision before the watch reconnects."""
    recorder = recorder_behind_proxy
    for peer_id in ("changes", "leaves", "stays"):
        writer.put(peer_id)
    before = writer.records()
    recorder.wait_for(before)
    reported = len(recorder.events)

    proxy.begin(Fault.CUT)
    etcd.wipe()
    etcd.gateway.put(FOLDER + b"stays", before["stays"].to_json())
    changed = writer.put("changes")
    joined = writer.put("joins")
    for _ in range(more_revisions):
        etcd.gateway.put(b"elsewhere", b"")
    proxy.end()

    recorder.wait_for(writer.records())
    difference = recorder.events[reported:]
    lost = [(Left, before["first"]), (Left, before["leaves"])]
    assert Counter((type(event), event.record) for event in difference) == Counter(
        [*lost, (Updated, changed), (Joined, joined)]
    )

    writer.write(20)
    recorder.wait_for(writer.records())
    assert len(recorder.events) == reported + 24


def test_the_data_are_wiped_under_a_connected_watch(
    etcd: EtcdProcess, recorder: WatchRecorder, writer: RecordWriter
) -> None:
    for _ in range(3):
        writer.write(20)
        etcd.wipe()
        assert writer.records() == {}
        writer.put("second")
        writer.write(5)
        recorder.wait_for(writer.records())
        writer.write(30)  # past the revisions of the old store
        recorder.wait_for(writer.records())


@pytest.mark.parametrize("meanwhile", ["compacted", "wiped", "wiped and older"])
def test_a_slow_reader(etcd: EtcdProcess, writer: RecordWriter, meanwhile: str) -> None:
    """etcd changes while the reader handles the first of the listed records."""
    writer.put("second")
    with Registry(etcd.endpoint, PREFIX) as registry, registry.watch() as watch:
        first = next(watch)
        assert isinstance(first, Joined)
        if meanwhile == "compacted":
            writer.write(30)
            etcd.gateway.compact(writer.revision)
        else:
            etcd.wipe()
            writer.put("another")
        if meanwhile == "wiped and older":
            writer.write(30)
        with WatchRecorder(watch) as recorder:
            recorder.events.append(first)
            recorder.wait_for(writer.records())


# The network


@pytest.fixture
def collector_at_any_moment() -> Iterator[None]:
    """The garbage collector runs all the time, in any thread, so finalizers run while any lock is held."""
    before = gc.get_threshold()
    gc.set_threshold(20, 5, 5)
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("collector_at_any_moment")
def test_200_random_faults_of_the_network(
    etcd: EtcdProcess, proxy: FaultyProxy, writer: RecordWriter
) -> None:
    """Half of them with a complete history, half with a store that is compacted all the time.

    A registration and a cache of the same registry suffer them, too.
    """
    mine = PeerRecord("localhost", 5009, "mine")
    with (
        Registry(proxy.endpoint, PREFIX) as registry,
        registry.cache() as cache,
        WatchRecorder(registry.watch()) as recorder,
    ):
        registration = registry.register(mine)
        recorder.wait_for(writer.records())
        reported = len(recorder.events)
        put = etcd.gateway.items(FOLDER + b"mine")

        with writer.writing():
            done = proxy.run_faults(100)
        assert all(done.values()), done
        history = every_event(etcd.gateway.history(FOLDER))
        recorder.wait_for(replayed(history))
        # The first events are a list, sorted by key.
        assert recorder.events[reported:] == history[reported:]

        with writer.writing():
            for _ in range(10):
                proxy.run_faults(10)
                etcd.gateway.compact(etcd.gateway.revision())
        recorder.wait_for(writer.records())
        check_revisions(recorder.events)

        eventually(lambda: registration.registered)
        assert etcd.gateway.items(FOLDER + b"mine") == put, "the record was put again"
        eventually(lambda: {record.peer_id: record for record in cache.nodes()} == writer.records())
        assert eventually(lambda: cache.current)


@pytest.mark.parametrize("fault", [Fault.HALF_OPEN, Fault.GARBAGE, Fault.CUT, Fault.DELAYED])
def test_a_long_fault_of_the_network(
    etcd: EtcdProcess,
    recorder_behind_proxy: WatchRecorder,
    proxy: FaultyProxy,
    writer: RecordWriter,
    fault: Fault,
) -> None:
    """Longer than the probe's timeout, so that the watch gives up one connection or several."""
    connections = proxy.connections
    proxy.begin(fault)
    writer.write(20)
    if fault is not Fault.DELAYED:
        eventually(lambda: proxy.connections >= connections + 3)
    recorder_behind_proxy.check_alive()
    proxy.end()
    writer.write(20)
    check_every_event(recorder_behind_proxy, etcd)
