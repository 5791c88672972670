import socket

import pytest

from peerd import SettingsError
from peerd.settings import RegistrySettings, SupervisorSettings, default_linger_us


def test_peers_have_consecutive_ports() -> None:
    settings = SupervisorSettings(peers=8, base_port=5001)
    assert settings.last_port == 5008
    assert settings.peer_id(2) == "localhost:5003"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"peers": 0}, "--peers 0"),
        ({"peers": -1}, "--peers -1"),
        ({"peers": 5000}, "--peers 5000"),
        ({"base_port": 0}, "--base-port 0"),
        ({"base_port": 65536}, "--base-port 65536"),
        ({"base_port": 65530, "peers": 8}, "use --base-port 65528 or lower"),
        ({"stop_timeout_s": 0}, "--stop-timeout 0"),
        ({"stop_timeout_s": float("nan")}, "--stop-timeout nan"),
        ({"recv_buffer_bytes": 3 << 30}, "--recv-buffer"),
        ({"host": ""}, "--host ''"),
        ({"advertise": ""}, "--advertise ''"),
        ({"advertise": "http://a"}, "--advertise 'http://a'"),
    ],
)
def test_invalid_values_are_rejected(values: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        SupervisorSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("peers", "cpus", "linger_us"),
    [(1, 1, 0), (2, 2, 0), (8, 16, 0), (8, 2, 200), (3, 2, 75), (64, 2, 400)],
)
def test_peers_that_share_a_core_linger(peers: int, cpus: int, linger_us: int) -> None:
    assert default_linger_us(peers, cpus) == linger_us


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lease_ttl_s": 1}, "etcd grants 2 for 1"),
        ({"endpoint": "localhost:2379"}, "http://host:port"),
        ({"endpoint": "ftp://localhost:1"}, "http://host:port"),
        ({"endpoint": "http://localhost"}, "http://host:port"),
        *(({"prefix": prefix}, "prefix") for prefix in ("", "a/", "a\n", "x" * 256)),
    ],
)
def test_invalid_values_of_the_registry_are_rejected(values: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        RegistrySettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "advertise", "advertised"),
    [
        ("localhost", None, "localhost"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("0.0.0.0", None, socket.gethostname()),
        ("0.0.0.0", "peer.example", "peer.example"),
    ],
)
def test_the_advertised_host(host: str, advertise: str | None, advertised: str) -> None:
    assert SupervisorSettings(host=host, advertise=advertise).advertised_host == advertised
