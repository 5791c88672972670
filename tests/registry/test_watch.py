"""Watching and caching peers in a real etcd that stays up; test_watch_faults.py has one that fails."""

import asyncio
import gc
import subprocess
import sys
import threading

import pytest

from harness.command import peerd
from harness.eventually import eventually
from harness.store import Store
from harness.watch_recorder import WatchRecorder
from peerd.errors import InvalidRecordError, RegistryUnavailableError
from peerd.registry import EtcdAccess, Joined, Left, PeerRecord, Registry, Updated, Watch
from peerd.registry.connection import Members
from peerd.registry.embedded_etcd import EmbeddedEtcd
from peerd.registry.streams import WatchStream

FAASNETS = b'{"Url":"localhost","Port":5009,"PartitionKey":"eu","Id":"..."}'
SEED = PeerRecord(url="localhost", port=5001, peer_id="seedId")


# Watching


def test_a_watch_reports_present_peers_and_then_every_change(registry: Registry) -> None:
    with registry.register(SEED) as seed, registry.watch() as watch:
        first = next(watch)
        assert first == Joined(SEED, first.revision)
        other = registry.register(PeerRecord("h", 2))
        changed = seed.update(metadata={"load": 3})
        other.close()
        joined, updated, left = next(watch), next(watch), next(watch)
        assert joined == Joined(PeerRecord("h", 2), joined.revision)
        assert updated == Updated(changed, updated.revision)
        assert left == Left(PeerRecord("h", 2), left.revision)
        assert first.revision < joined.revision < updated.revision < left.revision
    assert next(watch, None) is None, "it ends when it is closed"


def test_a_value_that_is_no_record_is_no_event(registry: Registry, store: Store) -> None:
    first = registry.register(PeerRecord("h", 1))
    with registry.watch() as watch:
        assert next(watch).record == first.record
        store.put("seedId", b"garbage")
        store.put("seedId", SEED.to_json())
        store.put("seedId", b"garbage again")
        store.put("thief", SEED.to_json())  # names another peer id than its key
        store.put("localhost", FAASNETS)
        events = [next(watch) for _ in range(3)]
    faasnets = PeerRecord("localhost", 5009, partition_key="eu")
    assert [(type(event), event.record) for event in events] == [
        (Joined, SEED),
        (Left, SEED),
        (Joined, faasnets),
    ]
    assert registry.scan().skipped == 2


DEEP = b"[" * 1000 + b"]" * 1000
POISON = {
    "deep": b'{"Url":"h","Port":1,"Metadata":{"n":%b}}' % DEEP,
    "h:1": b'{"Url":"h","Port":1,"PartitionKey":null,"Protocol":"udp","PeerId":"h:1",'
    b'"Metadata":{"n":%b}}' % (DEEP[747:1253]),
    "surrogate": b'{"Url":"\\ud800","Port":1}',
    "huge": b'{"Url":"h","Port":%b}' % (b"9" * 5000),
    "long": bytes(100_000),
}


def test_no_value_in_etcd_ends_a_reader(
    registry: Registry, store: Store, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Values that raised RecursionError in every reader, for as long as they were in etcd."""
    with registry.cache() as cache, registry.watch() as watch:
        assert cache.wait_current(60.0)
        assert watch.take() == []
        for name, value in POISON.items():
            store.put(name, value)
        with registry.register(SEED):
            assert next(watch).record == SEED
            eventually(lambda: cache.nodes() == [SEED])
            listing = registry.scan()
            assert (listing.records, listing.skipped) == ((SEED,), len(POISON))
            assert watch.skipped == cache.skipped == len(POISON)
            with registry.watch() as other:  # which has them in its first list
                assert next(other).record == SEED
        assert isinstance(next(watch), Left)
        assert cache.current
        store.put("h:1", PeerRecord("h", 1).to_json())
        eventually(lambda: cache.get("h:1"))
        assert cache.skipped == len(POISON) - 1
    warnings = [message for message in caplog.messages if "skipped" in message]
    assert len(warnings) == 1, "at most one per minute"
    assert f"key=b'{prefix}/" in warnings[0]


def test_no_value_in_etcd_ends_a_command(store: Store, prefix: str, etcd: str) -> None:
    for name, value in {**POISON, "seedId": SEED.to_json()}.items():
        store.put(name, value)
    where = ["--etcd", etcd, "--prefix", prefix]
    for options in ([], ["--json"]):
        done = peerd("nodes", *options, *where)
        assert (done.returncode, "seedId" in done.stdout) == (0, True), done.stderr
        assert f"are not peer records: {len(POISON)}" in done.stderr
    assert "Traceback" not in peerd("check", "--peers", "1", *where).stderr


def test_nodes_watch_survives_a_poisonous_value(store: Store, prefix: str, etcd: str) -> None:
    command = [sys.executable, "-m", "peerd", "nodes", "--watch", "--json"]
    store.put("deep", POISON["deep"])
    with subprocess.Popen(
        [*command, "--etcd", etcd, "--prefix", prefix], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        store.put("seedId", SEED.to_json())
        assert b"seedId" in process.stdout.readline()
        store.put("h:1", POISON["h:1"])
        store.put("h:2", PeerRecord("h", 2).to_json())
        assert b"h:2" in process.stdout.readline()
        process.kill()


@pytest.mark.parametrize("how", ["watch", "registry"])
def test_closing_from_another_thread_ends_a_wait(etcd: str, prefix: str, how: str) -> None:
    registry = Registry(etcd, prefix)
    registry.register(SEED)
    watch = registry.watch()
    events: list[object] = []
    reader = threading.Thread(target=lambda: events.extend(watch))
    reader.start()
    eventually(lambda: events)
    (watch if how == "watch" else registry).close()
    reader.join(30)
    assert not reader.is_alive()
    watch.close()
    registry.close()


def test_a_watch_that_is_dropped_half_way_closes_itself(registry: Registry) -> None:
    registry.register(SEED)
    for event in registry.watch():
        assert event.record == SEED
        break
    gc.collect()
    eventually(lambda: not any("probe" in thread.name for thread in threading.enumerate()))


def test_a_stream_that_is_collected_under_the_lock_of_its_connection(
    etcd: str, prefix: str
) -> None:
    """The collector runs in any thread that allocates, which once deadlocked with itself."""
    members = Members(etcd, EtcdAccess(), 5.0)
    stream = WatchStream(members, prefix.encode(), 0)
    assert next(stream) == []

    def collect() -> None:
        nonlocal stream
        with members._lock:
            del stream  # a cycle: it and its generator
            gc.collect()

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    collector.join(30)
    assert not collector.is_alive()
    members.close()


def test_two_threads_cannot_read_one_watch(registry: Registry) -> None:
    registry.register(SEED)
    with registry.watch() as watch:
        next(watch)
        reader = threading.Thread(target=lambda: list(watch))
        reader.start()
        eventually(lambda: watch._reading.locked())
        with pytest.raises(RuntimeError, match="two threads"):
            next(watch)
        watch.close()
        reader.join(30)


def test_async_for(registry: Registry) -> None:
    async def some() -> list[object]:
        found: list[object] = []
        async for event in registry.watch():
            found.append(type(event))
            if len(found) == 1:
                await asyncio.to_thread(registration.close)
            else:
                break
        return found

    registration = registry.register(SEED)
    assert asyncio.run(some()) == [Joined, Left]


def test_an_async_watch_that_is_cancelled(registry: Registry) -> None:
    async def wait_for_ever(watch: Watch) -> None:
        async for _ in watch:
            joined.set()

    async def cancel() -> None:
        waiting = asyncio.create_task(wait_for_ever(registry.watch()))
        await joined.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    joined = asyncio.Event()
    registry.register(SEED)
    asyncio.run(cancel())


def test_a_watch_may_start_before_etcd(prefix: str) -> None:
    with EmbeddedEtcd() as etcd, Registry(etcd.endpoint, prefix, timeout_s=1.0) as registry:
        etcd.kill()
        with WatchRecorder(registry.watch()) as recorder:
            etcd.restart()
            registration = eventually(lambda: registry.register(SEED))
            recorder.wait_for({"seedId": SEED})
            registration.close()
            recorder.wait_for({})
            assert len(recorder.events) == 2


# Caching


def test_a_cache_follows(registry: Registry) -> None:
    with registry.cache() as cache:
        assert cache.wait_current(60)
        assert cache.nodes() == []
        with registry.register(SEED):
            eventually(lambda: cache.get("seedId") == SEED)
            registry.register(PeerRecord("h", 2, partition_key="eu", metadata={"zone": 1}))
            eventually(lambda: len(cache.nodes()) == 2)
            assert [record.peer_id for record in cache.nodes()] == ["h:2", "seedId"]
            assert [record.port for record in cache.nodes(partition_key="eu")] == [2]
        eventually(lambda: cache.get("seedId") is None)
        assert cache.current
        assert cache.age_s < 30


def test_a_peer_with_two_records_is_present_until_both_are_gone(
    registry: Registry, store: Store
) -> None:
    """One under FaasNet's key and one under ours."""
    store.put("localhost", FAASNETS, lease := store.lease())
    with registry.cache() as cache:
        eventually(lambda: cache.get("localhost:5009"))
        registration = registry.register(PeerRecord("localhost", 5009))
        eventually(lambda: cache.get("localhost:5009") == registration.record)
        store.etcd.revoke([lease])
        registration.close()
        eventually(lambda: cache.nodes() == [])


def test_all_caches_of_a_registry_share_one_watch(registry: Registry) -> None:
    def threads() -> int:
        return sum(thread.name == "peerd-registry-cache" for thread in threading.enumerate())

    with registry.cache() as one:
        with registry.cache() as other:
            registry.register(SEED)
            eventually(lambda: one.get("seedId") and other.get("seedId"))
            assert threads() == 1
        other.close()
        assert one.get("seedId") == SEED
        assert threads() == 1
    assert threads() == 0


def test_a_cache_whose_thread_has_ended_raises_the_cause(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(SEED)
    with registry.cache() as cache:
        assert cache.wait_current(60)
        monkeypatch.setattr(Watch, "take", lambda watch: [] if 1 / 0 else None)
        registry.register(PeerRecord("h", 2))  # so that the thread comes back from etcd
        eventually(lambda: not cache.current)
        for use in (cache.nodes, lambda: cache.get("seedId"), lambda: cache.wait_current(60)):
            with pytest.raises(ZeroDivisionError):
                use()
    monkeypatch.undo()
    with registry.cache() as cache:
        assert cache.wait_current(60)
        registry.close()
        assert not cache.current
        assert len(cache.nodes()) == 2, "closed on purpose: the last known state can be read"


def test_a_cache_can_be_read_while_etcd_is_unreachable(prefix: str) -> None:
    with EmbeddedEtcd() as etcd, Registry(etcd.endpoint, prefix) as registry:
        registry.register(SEED)
        with registry.cache() as cache:
            eventually(lambda: cache.nodes() == [SEED])
            etcd.kill()
            eventually(lambda: not cache.current)
            assert cache.nodes() == [SEED]
            assert cache.age_s > 1.0
            etcd.restart()
            eventually(lambda: cache.current)
    with Registry("http://localhost:9", prefix) as registry, registry.cache() as cache:
        assert not cache.wait_current(0.2)
        assert (cache.nodes(), cache.age_s) == ([], float("inf"))


# Listing


def test_filters(registry: Registry) -> None:
    for port, key, protocol, zone in [
        (1, "eu", "udp", "a"),
        (2, "us", "udp", "b"),
        (3, "eu", "quic", "b"),
    ]:
        registry.register(
            PeerRecord("h", port, partition_key=key, protocol=protocol, metadata={"zone": zone})
        )

    def ports(**wanted: object) -> list[int]:
        return [record.port for record in registry.nodes(**wanted)]  # type: ignore[arg-type]

    assert ports() == ports(serializable=True) == [1, 2, 3]
    assert ports(partition_key="eu") == [1, 3]
    assert ports(protocol="udp") == [1, 2]
    assert ports(metadata={"zone": "b"}) == [2, 3]
    assert ports(metadata={"zone": "b"}, partition_key="eu") == [3]
    assert ports(metadata={"none": None}) == []


def test_a_listing_of_many_pages_some_of_them_too_large(registry: Registry, store: Store) -> None:
    """Other programs may write up to 1.5 MB; a page of such values is more than gRPC accepts."""
    records = [PeerRecord("localhost", port) for port in range(1, 1501)]
    for record in reversed(records):
        store.put(record.peer_id, record.to_json())
    lease_id = store.lease()
    for number in range(40):
        store.put(f"zz-{number}", bytes(1_400_000), lease_id)
    expected = sorted(records, key=lambda record: record.peer_id)
    with registry.watch() as watch:
        for _ in range(2):
            listing = registry.scan()
            assert (listing.records, listing.skipped) == (tuple(expected), 40)
        assert [next(watch).record for _ in records] == expected
    store.etcd.revoke([lease_id])


def test_more_events_than_one_message_holds(registry: Registry, store: Store) -> None:
    """etcd sends all events before a stream was opened in one message."""
    lease_id = store.lease()
    with registry.watch() as watch:
        assert watch.take() == []
        for number in range(40):
            store.put(f"zz-{number}", bytes(1_400_000), lease_id)
        record = PeerRecord("localhost", 1)
        store.put(record.peer_id, record.to_json())
        assert next(watch).record == record
    store.etcd.revoke([lease_id])


# Updating


def test_an_update_keeps_the_lease_and_is_in_the_next_listing(registry: Registry) -> None:
    registration = registry.register(SEED)
    lease_id = registration.lease_id
    assert registry.nodes() == [SEED]
    assert registration.update(metadata={"a": [1]}).metadata == {"a": [1]}
    assert registration.update(partition_key="eu").metadata == {"a": [1]}
    assert registry.nodes() == [registration.record]
    assert registration.lease_id == lease_id
    with pytest.raises(InvalidRecordError):
        registration.update(metadata={"a": object()})
    registration.close()
    assert registry.nodes() == []
    with pytest.raises(RuntimeError, match="closed"):
        registration.update(metadata={})


def test_an_update_of_a_lost_record_is_refused(registry: Registry) -> None:
    registration = registry.register(SEED)
    registry.revoke(registration.lease_id)
    with pytest.raises(RegistryUnavailableError, match="put again soon"):
        registration.update(metadata={"a": 1})
