"""Records that an administrator, or another program, removes or overwrites while their leases live."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.etcd_process import EtcdProcess
from harness.eventually import eventually
from harness.store import Store
from harness.supervised import Supervised
from peerd import control
from peerd.errors import PeerConflictError
from peerd.registry import PeerRecord, Registration, Registry, SessionState
from peerd.registry.embedded_etcd import find_etcd

CONNECTED, LOST = SessionState.CONNECTED, SessionState.LOST
SEED = PeerRecord(url="localhost", port=5001, peer_id="seedId")
FAASNETS = b'{"Url":"localhost","Port":5009,"PartitionKey":null,"Id":"..."}'

CHANGES: dict[str, Callable[[Store, bytes, int], object]] = {
    "del": lambda store, key, lease_id: store.etcdctl("del", key),
    "del --prefix": lambda store, key, lease_id: store.etcdctl("del", "--prefix", store.prefix),
    "put": lambda store, key, lease_id: store.etcdctl("put", key, "by hand"),
    "put, FaasNet's": lambda store, key, lease_id: store.etcdctl("put", key, FAASNETS),
    "put, our lease": lambda store, key, lease_id: store.etcdctl(
        "put", f"--lease={lease_id:x}", key, "by hand"
    ),
    "put, without lease": lambda store, key, lease_id: store.etcdctl(
        "put",
        key,
        store.etcd.get(key).value,  # type: ignore[union-attr]
    ),
    "put, dying lease": lambda store, key, lease_id: store.put("seedId", b"x", store.lease(2)),
    "lease revoke": lambda store, key, lease_id: store.etcdctl("lease", "revoke", f"{lease_id:x}"),
}


def is_in_etcd(store: Store, registration: Registration) -> bool:
    """Whether the record is there, under the registration's own lease."""
    record = registration.record
    item = store.get(record.peer_id)
    return item is not None and (
        (PeerRecord.from_json(item.value), item.lease_id) == (record, registration.lease_id)
    )


@pytest.mark.parametrize("how", CHANGES)
def test_a_record_changed_by_hand_is_put_again(
    etcd: str, prefix: str, store: Store, how: str
) -> None:
    states: list[SessionState] = []
    with Registry(etcd, prefix, lease_ttl_s=4, on_state=states.append) as registry:
        registration = registry.register(SEED)
        other = registry.register(PeerRecord("localhost", 5002))
        untouched = store.get("localhost:5002")
        CHANGES[how](store, store.key("seedId"), registration.lease_id)
        eventually(lambda: LOST in states or registration.conflict)
        eventually(lambda: is_in_etcd(store, registration) and registration.registered)
        eventually(lambda: states[-1] is CONNECTED)
        assert registration.conflict == ""
        eventually(lambda: is_in_etcd(store, other))
        if how != "del --prefix":
            assert store.get("localhost:5002") == untouched
        registration.update(metadata={"a": 1})
        assert is_in_etcd(store, registration)
    assert store.items() == []


@pytest.mark.slow
def test_a_record_with_a_ttl_of_hours_is_put_again_within_seconds(
    etcd: str, prefix: str, store: Store
) -> None:
    with Registry(etcd, prefix, lease_ttl_s=86400) as registry:
        registration = registry.register(SEED)
        store.etcdctl("del", store.key("seedId"))
        eventually(lambda: is_in_etcd(store, registration), within_s=30)


def test_a_thousand_removed_records_come_back(etcd: str, prefix: str, store: Store) -> None:
    with Registry(etcd, prefix, lease_ttl_s=6) as registry:
        registrations = [registry.register(PeerRecord("h", port)) for port in range(1, 1001)]
        leases = {registration.lease_id for registration in registrations}
        store.etcdctl("del", "--prefix", prefix)
        eventually(lambda: len(store.items()) == 1000, within_s=30)
        assert {item.lease_id for item in store.items()} == leases
        eventually(lambda: all(registration.registered for registration in registrations))


def test_records_that_etcd_does_not_compare_stay_registered(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[SessionState] = []
    binary = find_etcd()
    assert binary is not None
    with (
        EtcdProcess(binary, tmp_path, flags=["--max-txn-ops=4"]) as etcd,
        Registry(etcd.endpoint, prefix, lease_ttl_s=2, on_state=states.append) as registry,
    ):
        registrations = [registry.register(PeerRecord("h", port)) for port in range(1, 9)]
        first_until_s = registrations[0].registered_until_s
        eventually(lambda: registrations[0].registered_until_s > first_until_s + 2.0)
        assert all(registration.registered for registration in registrations)
        eventually(lambda: registry.state is CONNECTED)
    assert LOST not in states
    assert sum("the records are not compared" in message for message in caplog.messages) == 1


def test_own_updates_are_not_taken_for_anothers(
    etcd: str, prefix: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[SessionState] = []
    with Registry(etcd, prefix, lease_ttl_s=2, on_state=states.append) as registry:
        registration = registry.register(SEED)
        second = registry.register(SEED, adopt_lease_id=registration.lease_id)
        first_until_s = registration.registered_until_s
        number = 0
        while registration.registered_until_s < first_until_s + 2.0:  # four rounds
            number += 1
            registration.update(metadata={"number": number})
        assert is_in_etcd(store, registration)
        assert second.registered
    assert LOST not in states
    assert "another writer" not in caplog.text


@pytest.mark.parametrize("is_lost", [False, True], ids=["overwritten", "its lease is revoked"])
def test_a_live_holder_is_a_conflict_until_it_goes(
    etcd: str, prefix: str, store: Store, caplog: pytest.LogCaptureFixture, is_lost: bool
) -> None:
    states: list[SessionState] = []
    with Registry(etcd, prefix, lease_ttl_s=2, on_state=states.append) as registry:
        registration = registry.register(SEED)
        squatter = store.lease()
        store.put("seedId", FAASNETS, squatter)
        if is_lost:
            store.etcd.revoke([registration.lease_id])
        conflict = eventually(lambda: registration.conflict)
        assert f"belongs to localhost:5009 under the live lease {squatter:x}" in conflict
        assert conflict in caplog.messages
        assert not registration.registered
        eventually(lambda: registry.state is CONNECTED)
        with pytest.raises(PeerConflictError, match="localhost:5009"):
            registration.update(metadata={"a": 1})
        assert registration.record == SEED
        store.outlive_a_lease(2)
        item = store.get("seedId")
        assert item is not None
        assert item.value == FAASNETS, "two owners do not overwrite each other"
        store.etcd.revoke([squatter])
        eventually(lambda: registration.registered and is_in_etcd(store, registration))
        assert registration.conflict == ""
        assert registry.nodes() == [SEED]
    assert states == [CONNECTED, LOST, CONNECTED]


def test_a_writer_that_does_not_stop_is_overwritten_ever_more_rarely(
    etcd: str, prefix: str, store: Store
) -> None:
    ours = 0
    done = threading.Event()

    def overwrite() -> None:
        nonlocal ours
        while not done.wait(0.05):
            item = store.get("seedId")
            if item is None or item.lease_id:
                ours += 1
                store.put("seedId", FAASNETS)

    with Registry(etcd, prefix, lease_ttl_s=2) as registry:
        registration = registry.register(SEED)
        rival = threading.Thread(target=overwrite)
        rival.start()
        try:
            conflict = eventually(lambda: registration.conflict, within_s=10)
            assert "repeatedly overwritten, without a lease, by localhost:5009" in conflict
            assert not registration.registered
            assert ours <= 5
        finally:
            done.set()
            rival.join()
        eventually(lambda: is_in_etcd(store, registration), within_s=20)
        eventually(lambda: registration.registered and not registration.conflict)


def test_a_supervisor_reports_a_holder_and_puts_its_records_again(
    supervised: Supervised, etcd: str
) -> None:
    running = supervised.start("--ttl=4", peers=2)
    running.wait_registered()
    store = Store(etcd, running.prefix)
    peer_id = str(running.peer(0)["peer_id"])

    def events() -> list[object]:
        answer = control.request(running.control, "events")
        return [event["event"] for event in answer if event.get("peer_id") == peer_id]

    store.etcdctl("del", store.key(peer_id))
    eventually(lambda: store.get(peer_id))
    eventually(lambda: running.peer(0)["registered"])
    squatter = store.lease()
    store.put(peer_id, FAASNETS, squatter)
    conflict = eventually(lambda: running.peer(0)["conflict"])
    assert f"under the live lease {squatter:x}" in conflict
    assert not running.peer(0)["registered"]
    assert running.peer(1)["registered"]
    eventually(lambda: "conflict" in events())
    assert (
        f"removed or overwritten in etcd by another writer, and put again: {peer_id}" in running.err
    )
    store.etcd.revoke([squatter])
    eventually(lambda: running.peer(0)["registered"] and not running.peer(0)["conflict"])
    eventually(lambda: events()[-1] == "conflict resolved")
    store.etcd.close()
