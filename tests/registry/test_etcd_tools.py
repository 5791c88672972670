"""The test harness itself against real etcds, so that its faults are not taken for faults of peerd."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.certificates import Certificate, CertificateAuthority
from harness.cluster_network import ClusterNetwork, why_no_networks
from harness.etcd_cluster import SIZE, EtcdCluster
from harness.etcd_gateway import Change, Gateway, GatewayError, Item
from harness.etcd_process import EtcdProcess, ServerTls
from harness.etcd_versions import ETCD_VERSIONS
from harness.eventually import eventually
from harness.faulty_proxy import Fault, FaultyProxy
from peerd.address import Address

needs_networks = pytest.mark.skipif(bool(why_no_networks()), reason=why_no_networks())


@pytest.fixture(params=ETCD_VERSIONS)
def binary(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


@pytest.fixture
def etcd_process(binary: Path, tmp_path: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(binary, tmp_path) as etcd:
        yield etcd


def test_data_survive_a_kill_and_not_a_wipe(etcd_process: EtcdProcess) -> None:
    gateway = etcd_process.gateway
    first = gateway.put(b"a/1", b"one")
    etcd_process.restart()
    second = gateway.put(b"a/2", b"\xfftwo")
    assert gateway.items(b"a/") == {
        b"a/1": Item(b"one", 0, first, first),
        b"a/2": Item(b"\xfftwo", 0, second, second),
    }
    third = gateway.delete(b"a/1")
    assert gateway.history(b"a/") == [
        Change(first, b"a/1", b"one"),
        Change(second, b"a/2", b"\xfftwo"),
        Change(third, b"a/1", None),
    ]
    etcd_process.kill()
    assert not etcd_process.is_healthy()
    etcd_process.wipe()
    etcd_process.start()
    assert gateway.items(b"a/") == {}
    assert gateway.revision() == 1


def test_a_stopped_etcd_accepts_connections_and_is_silent(etcd_process: EtcdProcess) -> None:
    etcd_process.stop()
    socket.create_connection(etcd_process.client).close()
    assert not etcd_process.is_healthy(0.2)
    etcd_process.cont()
    etcd_process.wait_ready()


def test_compaction(etcd_process: EtcdProcess) -> None:
    gateway = etcd_process.gateway
    gateway.put(b"a/1", b"one")
    revision = gateway.put(b"a/1", b"two")
    gateway.compact(revision)
    with pytest.raises(GatewayError, match="compacted"):
        gateway.compact(revision)
    assert gateway.items(b"a/")[b"a/1"].value == b"two"


def test_authentication(etcd_process: EtcdProcess) -> None:
    admin = etcd_process.gateway
    admin.add_user("peer", "secret")
    admin.allow("peer", b"a/")
    admin.enable_auth("root secret")
    admin.put(b"b/1", b"")
    peer = Gateway(etcd_process.plain, "peer", "secret")
    peer.put(b"a/1", b"")
    assert list(peer.items(b"a/")) == [b"a/1"]
    for refused in (peer, Gateway(etcd_process.plain), Gateway(etcd_process.plain, "peer", "no")):
        with pytest.raises(GatewayError):
            refused.put(b"b/1", b"")
    etcd_process.restart()


def test_tls_and_client_certificates(binary: Path, tmp_path: Path) -> None:
    authority, stranger = CertificateAuthority(tmp_path), CertificateAuthority(tmp_path, "other")
    tls = ServerTls(*authority.issue("server"), client_ca_file=authority.ca_file)
    client = authority.issue("client")
    with EtcdProcess(binary, tmp_path, tls=tls) as etcd:
        assert etcd.endpoint.startswith("https://")
        etcd.gateway.put(b"a/1", b"")
        assert _is_let_in(etcd.client, authority.ca_file, client)
        assert not _is_let_in(etcd.client, authority.ca_file, stranger.issue("client"))
        assert not _is_let_in(etcd.client, authority.ca_file, None)
        assert not _is_let_in(etcd.client, stranger.ca_file, client)


def _is_let_in(address: Address, ca_file: Path, client: Certificate | None) -> bool:
    """etcd refuses with an alert, which depends on the version of Go that built it, or by closing."""
    context = ssl.create_default_context(cafile=str(ca_file))
    if client:
        context.load_cert_chain(*client)
    try:
        with (
            socket.create_connection(address, 5.0) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as tls,
        ):
            tls.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            # With TLS 1.3 the server checks the certificate after the handshake.
            return tls.recv(4) == b"HTTP"
    except (ssl.SSLError, ConnectionError):
        return False


def test_a_cluster_elects_another_leader(binary: Path, tmp_path: Path) -> None:
    with EtcdCluster(binary, tmp_path) as cluster:
        assert len(cluster.endpoints.split(",")) == SIZE
        for member in cluster.members:
            cluster.move_leader(member)
            assert cluster.leader() is member
        leader, other = cluster.members[-1], cluster.members[0]
        other.gateway.put(b"a/1", b"one")
        leader.kill()
        eventually(lambda: cluster.leader() is not leader)
        eventually(lambda: other.gateway.put(b"a/1", b"two"))
        leader.start()
        assert leader.gateway.items(b"a/")[b"a/1"].value == b"two"


@needs_networks
def test_a_member_can_be_cut_off(binary: Path, tmp_path: Path) -> None:
    with ClusterNetwork(SIZE) as network, EtcdCluster(binary, tmp_path, network) as cluster:
        member, other = cluster.members[:2]
        other.gateway.put(b"a/1", b"one")
        cluster.cut(member)
        assert not member.is_healthy(0.5)
        eventually(lambda: other.gateway.put(b"a/1", b"two"))
        cluster.mend(member)
        assert eventually(lambda: member.gateway.items(b"a/"))[b"a/1"].value == b"two"

        cluster.cut_from_peers(member)
        eventually(lambda: other.gateway.put(b"a/1", b"three"))
        assert member.gateway.items(b"a/", serializable=True)[b"a/1"].value == b"two"
        cluster.mend(member)
        eventually(lambda: member.gateway.items(b"a/")[b"a/1"].value == b"three")


def test_the_proxy_without_a_fault_passes_everything(etcd_process: EtcdProcess) -> None:
    value = bytes(range(256)) * 2000
    with FaultyProxy(etcd_process.client, seed=1) as proxy:
        gateway = Gateway(proxy.address)
        for fault in (Fault.NONE, Fault.DELAYED):
            proxy.begin(fault)
            gateway.put(b"a/1", value)
            assert gateway.items(b"a/")[b"a/1"].value == value
        assert proxy.connections == 4


def test_the_proxys_faults(etcd_process: EtcdProcess) -> None:
    with FaultyProxy(etcd_process.client, seed=1) as proxy, _connect(proxy) as old:
        proxy.begin(Fault.CUT)
        assert _ended(old)
        assert _ended(_connect(proxy))

        for fault in (Fault.HALF_OPEN, Fault.GARBAGE):
            proxy.end()
            with _connect(proxy) as before:
                proxy.begin(fault)
                with _connect(proxy) as during:
                    for client in (before, during):
                        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                        client.settimeout(0.2 if fault is Fault.HALF_OPEN else 5.0)
                        if fault is Fault.HALF_OPEN:
                            with pytest.raises(TimeoutError):
                                client.recv(1)
                        else:
                            assert client.recv(1)
                    proxy.end()
                    assert _ended(before)
                    assert _ended(during)
        assert Gateway(proxy.address).revision() == 1


def test_one_seed_gives_the_same_random_faults(etcd_process: EtcdProcess) -> None:
    def run() -> dict[Fault, int]:
        with FaultyProxy(etcd_process.client, seed=7) as proxy:
            done = proxy.run_faults(20, reconnected_within_s=0)
            assert Gateway(proxy.address).revision() == 1
            return done

    assert run() == run()


def _connect(proxy: FaultyProxy) -> socket.socket:
    """Returns once the proxy has accepted it."""
    before = proxy.connections
    client = socket.create_connection(proxy.address)
    eventually(lambda: proxy.connections > before)
    return client


def _ended(client: socket.socket) -> bool:
    """Reads until the connection is closed or reset."""
    with client:
        client.settimeout(30)
        try:
            while client.recv(4096):
                pass
        except ConnectionError:
            pass
    return True
