"""An etcd with access control: logins whose tokens expire, TLS, and the message for each wrong setting."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness.certificates import CertificateAuthority
from harness.command import peerd
from harness.etcd_process import EtcdProcess, ServerTls
from harness.etcd_versions import EVERY_ETCD
from harness.eventually import eventually
from harness.ports import free_ports
from harness.record_writer import RecordWriter
from harness.watch_recorder import WatchRecorder, every_event
from peerd.errors import RegistryAuthError, RegistryError
from peerd.registry import EtcdAccess, PeerRecord, Registry

PREFIX = "guarded"
FOLDER = b"guarded/"
MINE = PeerRecord("localhost", 5009, "mine")
TOKEN_TTL_S = 5
ERROR_WITHIN_S = 30.0
LONG = os.environ.get("PEERD_LONG_TESTS") == "1"

# bcrypt at its usual cost would be half of the test's time.
AUTH_FLAGS = [f"--auth-token-ttl={TOKEN_TTL_S}", "--bcrypt-cost=4"]
PEER = EtcdAccess(user="peer", password="secret")


@pytest.fixture(params=EVERY_ETCD)
def binary(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


@pytest.fixture
def guarded(binary: Path, tmp_path: Path) -> Iterator[EtcdProcess]:
    """With authentication; user ``peer`` has access to the prefix and to nothing else."""
    with EtcdProcess(binary, tmp_path, flags=AUTH_FLAGS) as etcd:
        guard(etcd)
        yield etcd


def guard(etcd: EtcdProcess) -> None:
    etcd.gateway.add_user("peer", "secret")
    etcd.gateway.allow("peer", FOLDER)
    etcd.gateway.add_user("stranger", "secret")
    etcd.gateway.enable_auth("root secret")


@dataclass(frozen=True)
class Tls:
    etcd: EtcdProcess
    authority: CertificateAuthority
    stranger: CertificateAuthority  # trusted by neither side

    def access(self) -> EtcdAccess:
        """With the right files."""
        client = self.authority.issue("client")
        return EtcdAccess(
            ca_file=self.authority.ca_file, cert_file=client.cert_file, key_file=client.key_file
        )


@pytest.fixture
def tls(binary: Path, tmp_path: Path) -> Iterator[Tls]:
    """An etcd that requires client certificates."""
    authority, stranger = CertificateAuthority(tmp_path), CertificateAuthority(tmp_path, "other")
    settings = ServerTls(*authority.issue("server"), client_ca_file=authority.ca_file)
    with EtcdProcess(binary, tmp_path, tls=settings, flags=AUTH_FLAGS) as etcd:
        yield Tls(etcd, authority, stranger)


# Access granted


def test_expired_tokens_are_renewed_without_notice(
    guarded: EtcdProcess, caplog: pytest.LogCaptureFixture
) -> None:
    writer = RecordWriter(guarded.gateway, PREFIX)
    with (
        Registry(guarded.endpoint, PREFIX, access=PEER, lease_ttl_s=5) as registry,
        registry.cache() as cache,
        WatchRecorder(registry.watch()) as recorder,
    ):
        registration = registry.register(MINE)
        recorder.wait_for({"mine": MINE})
        put = guarded.gateway.items(FOLDER + b"mine")
        # In constant use, and then idle for longer than the life of a token.
        for idle_s in (0.2,) * 10 + (TOKEN_TTL_S + 1.5,) * (8 if LONG else 1) + (0.2,) * 10:
            time.sleep(idle_s)
            writer.write()
            recorder.wait_for(writer.records())
            assert len(registry.nodes()) == len(writer.records())
            with registry.register(PeerRecord("localhost", 5010)):
                pass
            assert registration.registered
            assert cache.current
        assert guarded.gateway.items(FOLDER + b"mine") == put
        recorder.wait_for(writer.records())
        assert recorder.events == every_event(guarded.gateway.history(FOLDER))
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []


def test_check_does_not_promise_that_a_refused_login_registers_later(
    guarded: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERD_ETCD_PASSWORD", "wrong")
    where = [f"--etcd={guarded.endpoint}", f"--base-port={free_ports()}"]
    checked = peerd("check", "--etcd-user=peer", *where)
    assert checked.returncode == 0
    assert "refuses user 'peer'" in checked.stderr
    assert "the peers would serve, and not register until this is corrected" in checked.stderr


def test_a_restart_forgets_all_tokens(guarded: EtcdProcess) -> None:
    writer = RecordWriter(guarded.gateway, PREFIX)
    with (
        Registry(guarded.endpoint, PREFIX, access=PEER) as registry,
        WatchRecorder(registry.watch()) as recorder,
    ):
        registration = registry.register(MINE)
        recorder.wait_for({"mine": MINE})
        for _ in range(3):
            guarded.restart()
            assert eventually(registry.nodes)
            writer.write(5)
            recorder.wait_for(writer.records())
        eventually(lambda: registration.registered)
        assert recorder.events == every_event(guarded.gateway.history(FOLDER))


def test_authentication_is_switched_on_under_a_user(binary: Path, tmp_path: Path) -> None:
    """A client that has a login is asked for it from then on."""
    with (
        EtcdProcess(binary, tmp_path, flags=AUTH_FLAGS) as etcd,
        Registry(etcd.endpoint, PREFIX, access=PEER) as registry,
        WatchRecorder(registry.watch()) as recorder,
    ):
        registration = registry.register(MINE)
        recorder.wait_for({"mine": MINE})
        guard(etcd)
        writer = RecordWriter(etcd.gateway, PREFIX)
        writer.write(5)
        assert len(registry.nodes()) == len(writer.records())
        recorder.wait_for(writer.records())
        assert registration.registered


def test_certificates_on_both_sides_also_with_a_login(tls: Tls) -> None:
    writer = RecordWriter(tls.etcd.gateway, PREFIX)
    with (
        Registry(tls.etcd.endpoint, PREFIX, access=tls.access()) as registry,
        WatchRecorder(registry.watch()) as recorder,
    ):
        registration = registry.register(MINE)
        writer.write(10)
        recorder.wait_for(writer.records())
        tls.etcd.restart()
        writer.write(10)
        recorder.wait_for(writer.records())
        assert MINE in registry.nodes()
        assert eventually(lambda: registration.registered)
    guard(tls.etcd)
    access = replace(tls.access(), user="peer", password="secret")
    with (
        Registry(tls.etcd.endpoint, PREFIX, access=access) as registry,
        WatchRecorder(registry.watch()) as recorder,
    ):
        registry.register(MINE)
        recorder.wait_for(writer.records())
        assert MINE in registry.nodes()


# Access refused


def failure(endpoint: str, access: EtcdAccess) -> RegistryError:
    """The error, which is the same for reading and registering, and is raised in time."""
    said = []
    uses: list[Callable[[Registry], object]] = [Registry.nodes, lambda r: r.register(MINE)]
    for use in uses:
        began_s = time.monotonic()
        with Registry(endpoint, PREFIX, access=access) as registry:
            with pytest.raises(RegistryError) as raised:
                use(registry)
            said.append(raised.value)
        assert time.monotonic() - began_s < ERROR_WITHIN_S
    assert str(said[0]) == str(said[1])
    assert "secret" not in str(said[0])
    return said[0]


@pytest.mark.parametrize(
    ("access", "says"),
    [
        (EtcdAccess(user="peer", password="no secre"), "'peer'.*password"),
        (EtcdAccess(user="unknown", password="secret"), "'unknown'.*password"),
        (EtcdAccess(), "--etcd-user"),
        (EtcdAccess(user="stranger", password="secret"), "'stranger'.*permission"),
    ],
    ids=["wrong password", "unknown user", "no login", "no permission"],
)
def test_a_wrong_login(guarded: EtcdProcess, access: EtcdAccess, says: str) -> None:
    with pytest.raises(RegistryAuthError, match=says):
        raise failure(guarded.endpoint, access)
    with (
        Registry(guarded.endpoint, PREFIX, access=access) as registry,
        registry.watch() as watch,
        pytest.raises(RegistryAuthError),  # only what its user can act on ends a watch
    ):
        next(watch)


def test_each_wrong_tls_setting_has_its_own_message(tls: Tls) -> None:
    """So has an etcd that does not run."""
    ours, theirs, endpoint = tls.access(), tls.stranger.issue("client"), tls.etcd.endpoint
    said: list[str] = []
    for url, access, says in [
        (endpoint, replace(ours, ca_file=tls.stranger.ca_file), "--etcd-ca"),
        (endpoint, replace(ours, cert_file=None, key_file=None), "--etcd-cert"),
        (f"https://{tls.etcd.plain}", ours, "http://"),
        (f"http://{tls.etcd.client}", EtcdAccess(), "https://"),
        # The first two settings, wrong in another way.
        (endpoint, replace(ours, ca_file=None), "--etcd-ca"),
        (
            endpoint,
            replace(ours, cert_file=theirs.cert_file, key_file=theirs.key_file),
            "--etcd-cert",
        ),
    ]:
        said.append(str(failure(url, access)))
        assert says in said[-1]
    tls.etcd.kill()
    different = [*said[:4], str(failure(endpoint, ours))]
    words = [text.replace(str(tls.etcd.plain), str(tls.etcd.client)) for text in different]
    words = [text.replace("https://", "http://") for text in words]
    assert len(set(words)) == len(words), "\n".join(words)
