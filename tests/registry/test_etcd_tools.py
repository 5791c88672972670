"""The tests of faults rely on these tools: the data of an etcd, and the faults of the proxy."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.etcd_gateway import Change, Gateway, Item
from harness.etcd_process import EtcdProcess
from harness.etcd_versions import ETCD_VERSIONS
from harness.eventually import eventually
from harness.faulty_proxy import Fault, FaultyProxy


@pytest.fixture(params=ETCD_VERSIONS)
def etcd_process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(request.param, tmp_path) as etcd:
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
    assert gateway.items(b"a/") == {}
    assert gateway.revision() == 1


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
