"""The registry against a real etcd that is killed, stopped and wiped under it."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.etcd_process import stop_process
from harness.eventually import eventually
from harness.store import Store
from peerd.address import Address, EtcdEndpoints
from peerd.errors import (
    InvalidRecordError,
    PeerConflictError,
    RegistryUnavailableError,
    SettingsError,
)
from peerd.registry import PeerRecord, Registry, SessionState, nodes
from peerd.registry.embedded_etcd import EmbeddedEtcd
from peerd.registry.etcd_types import KeyValue

CONNECTED, SUSPENDED, LOST = SessionState.CONNECTED, SessionState.SUSPENDED, SessionState.LOST
FAASNETS = b'{"Url":"localhost","Port":5009,"PartitionKey":null,"Id":"..."}'
SEED = PeerRecord(url="localhost", port=5001, peer_id="seedId")


# Registering and listing


def test_a_record_is_there_from_register_to_close(registry: Registry, store: Store) -> None:
    with registry.register(SEED) as registration:
        assert registration.registered
        assert registration.record == SEED
        assert registry.nodes() == [SEED]
        item = store.get("seedId")
        assert item is not None
        assert (PeerRecord.from_json(item.value), item.lease_id) == (SEED, registration.lease_id)
    assert registry.nodes() == []
    assert (registration.registered, registration.lease_id) == (False, 0)
    registration.close()


def test_closing_the_registry_removes_all_its_records_at_once(
    etcd: str, prefix: str, store: Store
) -> None:
    with Registry(etcd, prefix) as registry:
        for port in range(1, 201):
            registry.register(PeerRecord("localhost", port))
        assert len(nodes(etcd, prefix)) == 200
        assert len({item.lease_id for item in store.items()} - {0}) == 200, "one lease per record"
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 10
    assert nodes(etcd, prefix) == []
    for use in (registry.nodes, lambda: registry.register(SEED)):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    registry.close()


def test_listing_reads_faasnets_records_and_counts_what_is_none(
    registry: Registry, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register(SEED)
    store.put("localhost", FAASNETS)
    for number, value in enumerate([b"", b"no JSON", b"[]", b"\xff", b'{"Url":"h","Port":"1"}']):
        store.put(f"garbage-{number}", value)
    store.etcd.put(f"{store.prefix}x/y".encode(), FAASNETS)  # another prefix
    with caplog.at_level(logging.DEBUG, "peerd.registry"):
        listing = registry.scan()
    assert listing.records == (PeerRecord("localhost", 5009), SEED)
    assert listing.skipped == 5
    assert sum("skipped" in message for message in caplog.messages) == 5


def test_nodes_takes_its_settings_and_no_proxy_from_the_environment(
    etcd: str, prefix: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    registry.register(SEED)
    assert nodes(etcd, prefix) == [SEED]
    monkeypatch.setenv("PEERD_ETCD", etcd)
    monkeypatch.setenv("PEERD_PREFIX", prefix)
    assert nodes() == [SEED]
    assert nodes(prefix="elsewhere") == []


# The owner of a key


def test_a_key_under_anothers_live_lease_is_refused(
    etcd: str, prefix: str, registry: Registry, store: Store
) -> None:
    registration = registry.register(SEED)
    held = store.get("seedId")
    intruder = PeerRecord("elsewhere", 6001, peer_id="seedId")
    with Registry(etcd, prefix) as other:
        for rival in (other, registry):
            with pytest.raises(PeerConflictError) as caught:
                rival.register(intruder)
            assert "localhost:5001" in str(caught.value)
            assert f"{registration.lease_id:x}" in str(caught.value)
    assert store.get("seedId") == held
    registration.close()
    registry.register(intruder)


def test_a_dead_owners_record_is_taken_over_at_once_from_the_same_address(
    etcd: str, prefix: str, registry: Registry, store: Store
) -> None:
    lease_id = lease_of_killed_predecessor(etcd, prefix, owner_pid=0)
    with pytest.raises(PeerConflictError, match=f"since .* live lease {lease_id:x}"):
        registry.register(PeerRecord("localhost", 5002, peer_id="seedId"))
    assert registry.register(SEED).lease_id != lease_id
    assert registry.nodes() == [SEED]


def test_a_living_owners_record_is_not_taken_over(
    etcd: str, prefix: str, registry: Registry, store: Store
) -> None:
    """Only the registrar of that owner has died: its successor adopts the lease."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as supervisor:
        lease_of_killed_predecessor(etcd, prefix, owner_pid=supervisor.pid)
        held = store.get("seedId")
        with pytest.raises(PeerConflictError, match=f"process {supervisor.pid} on "):
            registry.register(SEED)
        assert store.get("seedId") == held
        supervisor.kill()
        supervisor.wait()
        registry.register(SEED)


def test_a_leftover_without_a_lease_is_taken_over(registry: Registry, store: Store) -> None:
    store.put("seedId", FAASNETS)
    with registry.register(SEED):
        assert registry.nodes() == [SEED]
    assert registry.nodes() == []


PREDECESSOR = """
import sys, threading
from peerd.registry import PeerRecord, Registry
registry = Registry(
    sys.argv[1], sys.argv[2], lease_ttl_s=int(sys.argv[3]), owner_pid=int(sys.argv[4]) or None
)
registration = registry.register(PeerRecord("localhost", 5001, peer_id="seedId"))
print(registration.lease_id, flush=True)
threading.Event().wait()
"""


def lease_of_killed_predecessor(
    etcd: str, prefix: str, ttl_s: int = 10, owner_pid: int | None = None
) -> int:
    """The process registered on behalf of this one, of ``owner_pid``, or of itself (0)."""
    owner = os.getpid() if owner_pid is None else owner_pid
    with subprocess.Popen(
        [sys.executable, "-c", PREDECESSOR, etcd, prefix, str(ttl_s), str(owner)],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        lease_id = int(process.stdout.readline())
        process.kill()
    return lease_id


def test_a_predecessors_lease_is_adopted_and_its_record_untouched(
    etcd: str, prefix: str, store: Store
) -> None:
    lease_id = lease_of_killed_predecessor(etcd, prefix, ttl_s=2)
    left = store.get("seedId")
    assert left is not None
    noted: list[int] = []
    with Registry(etcd, prefix) as registry:
        registration = registry.register(SEED, adopt_lease_id=lease_id, on_lease=noted.append)
        assert (registration.lease_id, noted) == (lease_id, [lease_id])
        store.outlive_a_lease(2)
        assert store.get("seedId") == left, "neither deleted meanwhile nor written again"
    assert store.get("seedId") is None


def test_an_adopted_record_is_rewritten_where_it_differs(
    etcd: str, prefix: str, registry: Registry, store: Store
) -> None:
    lease_id = lease_of_killed_predecessor(etcd, prefix)
    moved = PeerRecord("elsewhere", 6001, peer_id="seedId")
    assert registry.register(moved, adopt_lease_id=lease_id).lease_id == lease_id
    assert registry.nodes() == [moved]


def test_a_predecessors_lease_that_is_gone_is_replaced(registry: Registry, store: Store) -> None:
    gone = store.lease(10)
    registry.revoke(gone)
    registry.revoke(gone)
    seen: list[tuple[int, KeyValue | None]] = []
    registration = registry.register(
        SEED,
        adopt_lease_id=gone,
        on_lease=lambda lease_id: seen.append((lease_id, store.get("seedId"))),
    )
    assert registration.lease_id != gone
    assert seen == [(registration.lease_id, None)], "before the record is put"


def test_an_adopted_lease_does_not_open_anothers_key(
    etcd: str, prefix: str, registry: Registry, store: Store
) -> None:
    registry.register(SEED)
    lease = store.etcd.grant(10)
    with Registry(etcd, prefix) as other, pytest.raises(PeerConflictError):
        other.register(SEED, adopt_lease_id=lease.lease_id)
    assert [answer.ttl_s for answer in store.etcd.keep_alive([lease.lease_id])] == [10]


def test_on_lease_may_refuse(registry: Registry, store: Store) -> None:
    noted: list[int] = []

    def refuse(lease_id: int) -> None:
        noted.append(lease_id)
        raise OSError("cannot write it down")

    with pytest.raises(OSError, match="cannot write"):
        registry.register(SEED, on_lease=refuse)
    assert [answer.ttl_s for answer in store.etcd.keep_alive(noted)] == [0]
    assert store.items() == []


# Maintaining records


def test_a_record_outlives_its_ttl_by_keep_alives_over_one_stream(
    etcd: str, prefix: str, store: Store
) -> None:
    with Registry(etcd, prefix, lease_ttl_s=2) as registry:
        registrations = [registry.register(PeerRecord("h", port)) for port in range(1, 21)]
        put = store.items()
        stream = eventually(lambda: registry._etcd._keep_alives)
        store.outlive_a_lease(2)
        store.outlive_a_lease(2)
        assert store.items() == put
        assert all(registration.registered for registration in registrations)
        assert registry._etcd._keep_alives is stream


def test_a_lease_that_two_registrations_hold_is_refreshed_for_both(etcd: str, prefix: str) -> None:
    with Registry(etcd, prefix, lease_ttl_s=2) as registry:
        first = registry.register(SEED)
        both = (first, registry.register(SEED, adopt_lease_id=first.lease_id))
        until_s = max(registration.registered_until_s for registration in both)
        eventually(lambda: min(registration.registered_until_s for registration in both) > until_s)
        assert both[0].lease_id == both[1].lease_id


def test_a_stream_that_broke_between_two_rounds_is_no_failure() -> None:
    """For example after a restart of etcd or a failover: the next round opens another stream."""
    states: list[SessionState] = []
    with (
        EmbeddedEtcd() as etcd,
        Registry(etcd.endpoint, "p", lease_ttl_s=12, on_state=states.append) as registry,
    ):
        registration = registry.register(SEED)
        adopted = registry.register(SEED, adopt_lease_id=registration.lease_id)  # the first round
        stream = registry._etcd._keep_alives
        assert stream is not None
        etcd.kill()
        etcd.restart()
        eventually(lambda: not stream.is_open)
        until_s = adopted.registered_until_s
        # A round comes every 3.2 to 4 s, and the etcd has only just begun.
        eventually(lambda: adopted.registered_until_s > until_s)
        assert registry._etcd._keep_alives is not stream
    assert states == [CONNECTED]


def test_a_revoked_lease_is_replaced(etcd: str, prefix: str, store: Store) -> None:
    states: list[SessionState] = []
    leases: list[int] = []
    with Registry(etcd, prefix, lease_ttl_s=2, on_state=states.append) as registry:
        registration = registry.register(SEED, on_lease=leases.append)
        kept = registry.register(PeerRecord("localhost", 5002))
        kept_lease_id = kept.lease_id
        registry.revoke(registration.lease_id)
        eventually(lambda: states == [CONNECTED, LOST, CONNECTED])
        assert len(set(leases)) == 2
        item = store.get("seedId")
        assert item is not None
        assert item.lease_id == leases[-1] == registration.lease_id
        assert kept.lease_id == kept_lease_id


def test_an_etcd_away_for_longer_than_the_ttl(prefix: str) -> None:
    states: list[SessionState] = []
    with EmbeddedEtcd() as etcd:
        with Registry(etcd.endpoint, prefix, lease_ttl_s=2, on_state=states.append) as registry:
            registrations = [registry.register(PeerRecord("h", port)) for port in range(1, 9)]
            leases = {registration.lease_id for registration in registrations}
            etcd.kill()
            eventually(lambda: states[-1] is LOST)
            eventually(lambda: not any(r.registered for r in registrations))
            etcd.restart()
            eventually(lambda: all(r.registered for r in registrations))
            assert [record.port for record in registry.nodes()] == list(range(1, 9))
            assert not leases & {registration.lease_id for registration in registrations}
            eventually(lambda: states == [CONNECTED, SUSPENDED, LOST, CONNECTED])
        assert nodes(etcd.endpoint, prefix) == []


def test_an_etcd_that_hangs_for_less_than_the_ttl(prefix: str) -> None:
    states: list[SessionState] = []
    with (
        EmbeddedEtcd() as etcd,
        Registry(
            etcd.endpoint, prefix, lease_ttl_s=6, timeout_s=0.5, on_state=states.append
        ) as registry,
    ):
        registration = registry.register(SEED)
        lease_id = registration.lease_id
        os.kill(etcd.pid, signal.SIGSTOP)
        eventually(lambda: states == [CONNECTED, SUSPENDED])
        assert registration.registered
        os.kill(etcd.pid, signal.SIGCONT)
        eventually(lambda: states == [CONNECTED, SUSPENDED, CONNECTED])
        assert registration.lease_id == lease_id
        assert registry.nodes() == [SEED]


def test_an_etcd_that_is_wiped(prefix: str) -> None:
    with (
        EmbeddedEtcd() as etcd,
        Registry(etcd.endpoint, prefix, lease_ttl_s=10) as registry,
    ):
        registration = registry.register(SEED)
        etcd.stop()
        etcd.start()
        eventually(lambda: registry.nodes() == [SEED])
        eventually(lambda: registration.registered)


def test_a_registration_that_was_not_answered_can_be_repeated(prefix: str) -> None:
    with (
        EmbeddedEtcd() as etcd,
        Registry(etcd.endpoint, prefix, timeout_s=0.5) as registry,
    ):
        leases: list[int] = []

        def stop_etcd(lease_id: int) -> None:
            leases.append(lease_id)
            stop_process(etcd.pid)

        with pytest.raises(RegistryUnavailableError, match=r"no answer within 0\.5 s"):
            registry.register(SEED, on_lease=stop_etcd)
        os.kill(etcd.pid, signal.SIGCONT)
        registration = eventually(lambda: registry.register(SEED, on_lease=leases.append))
        assert set(leases) == {registration.lease_id}
        assert registry.nodes() == [SEED]


def test_a_record_that_could_not_be_withdrawn_is_no_conflict_later(prefix: str) -> None:
    with (
        EmbeddedEtcd() as etcd,
        Registry(etcd.endpoint, prefix, timeout_s=0.5, lease_ttl_s=60) as registry,
    ):
        registration = registry.register(SEED)
        lease_id = registration.lease_id
        etcd.kill()
        registration.close()
        etcd.restart()
        assert eventually(registry.nodes) == [SEED], "etcd knows nothing of it"
        assert registry.register(SEED).lease_id == lease_id


def test_a_listener_that_raises_is_logged_and_stops_nothing(
    etcd: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(state: SessionState) -> None:
        raise ValueError(state.value)

    with Registry(etcd, prefix, on_state=raises) as registry:
        assert registry.register(SEED).registered
    assert "ValueError: connected" in caplog.text


# etcd unreachable


@pytest.mark.parametrize(
    ("endpoint", "timeout_s", "cause"),
    [
        ("http://localhost:9", 5.0, "http://localhost:9 does not answer (connection refused)"),
        ("http://127.0.0.1:{silent}", 0.3, "does not answer (no answer within 0.3 s)"),
        ("http://does-not-exist.invalid:2379", 5.0, "does-not-exist.invalid"),
    ],
    ids=["no server listens", "a server does not answer", "the host does not exist"],
)
def test_an_etcd_that_cannot_be_reached(
    prefix: str, endpoint: str, timeout_s: float, cause: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = endpoint.format(silent=silent.getsockname()[1])
        with Registry(endpoint, prefix, timeout_s=timeout_s) as registry:
            for use in (
                registry.nodes,
                lambda: registry.register(SEED),
                lambda: registry.revoke(1),
            ):
                begun_s = time.monotonic()
                with pytest.raises(RegistryUnavailableError) as caught:
                    use()
                assert time.monotonic() - begun_s < 10
                assert cause in str(caught.value)
                assert "see that it runs" in str(caught.value)
            assert registry.state is SUSPENDED


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_closing_without_etcd_is_quiet_and_bounded(prefix: str, how: signal.Signals) -> None:
    with EmbeddedEtcd() as etcd:
        registry = Registry(etcd.endpoint, prefix, timeout_s=1.0)
        registrations = [registry.register(PeerRecord("h", port)) for port in range(1, 9)]
        os.kill(etcd.pid, how)
        begun_s = time.monotonic()
        registrations[0].close()
        registry.close()
        assert time.monotonic() - begun_s < 20


def test_the_thread_lives_from_the_first_registration_to_close(etcd: str, prefix: str) -> None:
    def keepers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "peerd-registry"]

    with Registry(etcd, prefix) as registry:
        registry.nodes()
        assert keepers() == []
        for port in range(1, 4):
            registry.register(PeerRecord("h", port))
        assert len(keepers()) == 1
    assert keepers() == []


FORKING = """
import os, sys
from peerd.registry import PeerRecord, Registry
registry = Registry(sys.argv[1], sys.argv[2])
registration = registry.register(PeerRecord("localhost", 5001, peer_id="seedId"))
watch, cache = registry.watch(), registry.cache()
assert cache.wait_current(60)
next(watch)
uses = {
    "nodes": registry.nodes,
    "register": lambda: registry.register(PeerRecord("localhost", 5002)),
    "revoke": lambda: registry.revoke(1),
    "registered": lambda: registration.registered,
    "lease_id": lambda: registration.lease_id,
    "update": lambda: registration.update(metadata={}),
    "watch": registry.watch,
    "next": lambda: next(watch),
    "cache": registry.cache,
    "cache.nodes": cache.nodes,
}
child = os.fork()
if not child:
    with registry, registration, watch, cache:  # leaves the parent's alone
        for name, use in uses.items():
            try:
                use()
                print(name, "worked", flush=True)
            except RuntimeError as error:
                print(name, error, flush=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert registration.registered and len(registry.nodes()) == 1
registration.update(metadata={"parent": True})
assert next(watch).record.metadata == {"parent": True}
assert cache.current
registry.close()
"""


def test_a_forked_child_gets_a_clear_error(etcd: str, prefix: str) -> None:
    lines = run_python(FORKING, etcd, prefix).stdout.splitlines()
    assert len(lines) == 10
    assert all("forked child" in line and "open another" in line for line in lines)


def test_a_program_that_does_not_close_its_registry_ends(etcd: str, prefix: str) -> None:
    code = PREDECESSOR.replace("threading.Event().wait()", "")
    assert run_python(code, etcd, prefix, "2", "0").stderr == ""
    eventually(lambda: nodes(etcd, prefix) == [])


# Settings


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("localhost:23790", "write http://host:port"),
        ("", "write http://host:port"),
        ("http://localhost", "name the host and the port"),
        ("http://:23790", "name the host and the port"),
        ("http://localhost:0", "name the host and the port"),
        ("http://localhost:70000", "write http://host:port"),
        ("http://localhost:x", "write http://host:port"),
        ("http://[::1:2379", "write http://host:port"),
        ("http://localhost:2379/v3", "nothing may follow"),
        ("http://user:secret@localhost:2379", "do not put a user or password"),
        ("a:2379,b:2379", "write http://host:port"),
        ("http://a:2379,", "write http://host:port"),
        ("http://a:2379,https://b:2379", "use TLS for all members"),
        ("http://a:2379,http://a:2379/", "each member once"),
    ],
)
def test_an_endpoint_that_cannot_work(url: str, why: str) -> None:
    with pytest.raises(SettingsError, match=why) as caught:
        Registry(url)
    assert "secret" not in str(caught.value)


def test_endpoints() -> None:
    assert Address.of_etcd("http://etcd.example:2379/") == ("etcd.example", 2379)
    assert Address.of_etcd("http://[::1]:2379") == ("::1", 2379)
    assert str(Address("::1", 2379)) == "[::1]:2379"
    members = (Address("a", 1), Address("b", 2))
    assert EtcdEndpoints.of("http://a:1, http://b:2") == (members, False)
    assert EtcdEndpoints.of("https://a:1,https://b:2/") == (members, True)
    for urls in ("https://a:1", "http://a:1,http://b:2"):
        with pytest.raises(SettingsError, match="write one http"):
            Address.of_etcd(urls)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        *[
            ({"prefix": prefix}, "prefix")
            for prefix in ("", "/", "peerd/", "a\nb", "x" * 256, "\ud800")
        ],
        *[({"lease_ttl_s": ttl_s}, "etcd grants 2 for 1") for ttl_s in (-1, 0, 1, 86401)],
    ],
    ids=repr,
)
def test_a_prefix_or_ttl_that_cannot_work(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        Registry(**settings)


def test_the_errors_are_values_too() -> None:
    assert issubclass(InvalidRecordError, ValueError)
    assert issubclass(SettingsError, ValueError)


# Importing


def run_python(
    code: str, *arguments: str, options: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *options, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_modules_that_need_no_etcd_import_no_grpc() -> None:
    modules = "sys, peerd.registry, peerd.registry.records, peerd.registry.embedded_etcd"
    code = f"import {modules}; print([m for m in ('grpc', 'etcd3') if m in sys.modules])"
    assert run_python(code).stdout == "[]\n"


def test_every_public_name_exists() -> None:
    run_python("from peerd.registry import *; print(Registry.__name__, nodes.__name__)")
    code = "import peerd.registry as r; print(set(r.__all__) <= set(dir(r)), hasattr(r, 'x'))"
    assert run_python(code).stdout == "True False\n"


def test_etcd3_imports_without_a_warning_and_leaves_protobufs_own_pool_alone(
    tmp_path: Path,
) -> None:
    """Compiled again, so that the compiler's warnings count as well."""
    code = (
        "from peerd.registry.etcd3_import import import_etcd3 as i; v = i().__version__\n"
        "import google.protobuf\n"
        "from google.protobuf.descriptor_pool import Default\n"
        "try: Default().FindFileByName('rpc.proto'); found = True\n"
        "except KeyError: found = False\n"
        "print(v, found is (google.protobuf.__version__ < '4'))"
    )
    options = ("-W", "error", "-X", f"pycache_prefix={tmp_path}")
    assert run_python(code, options=options).stdout == "0.12.0 True\n"


def test_etcd3_has_every_message_that_it_uses() -> None:
    from peerd.registry.connection import etcd3

    folder = Path(etcd3.__path__[0])
    used = {
        name
        for path in [*folder.glob("*.py"), folder / "etcdrpc" / "rpc_pb2_grpc.py"]
        for name in re.findall(r"\b(?:etcdrpc|rpc__pb2)\.([A-Za-z_.]+)", path.read_text())
    }
    assert len(used) > 100
    for name in sorted(used):
        found = etcd3.etcdrpc
        for part in name.split("."):
            found = getattr(found, part)
    rpc = etcd3.etcdrpc.rpc_pb2
    request = rpc.RangeRequest(key=b"k", limit=2, sort_order=rpc.RangeRequest.DESCEND)
    assert rpc.RangeRequest.FromString(request.SerializeToString()) == request
    assert rpc.RangeRequest.SortOrder.Name(2) == "DESCEND"
    assert rpc.WatchCreateRequest.FilterType.Value("NODELETE") == 1
    assert (rpc.AlarmType.Name(1), rpc.NOSPACE) == ("NOSPACE", 1)
    event = etcd3.etcdrpc.kv_pb2.Event(type=etcd3.etcdrpc.kv_pb2.Event.DELETE)
    assert rpc.WatchResponse(events=[event]).events[0].type == 1
    assert rpc.DESCRIPTOR.name == "rpc.proto"
    assert rpc.DESCRIPTOR.services_by_name["KV"].methods_by_name["Range"]


def test_an_etcd3_that_imports_by_itself_is_not_touched() -> None:
    """With protobuf 3, and with the pure-Python implementation of today's protobuf."""
    code = (
        "from peerd.registry.etcd3_import import import_etcd3 as i; e = i()\n"
        "print(e.etcdrpc.rpc_pb2.__spec__ is not None, i() is e)"
    )
    variables = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    assert run_python(code, options=["-W", "error"], **variables).stdout == "True True\n"
