"""Both clients, the asynchronous one on two event loops, against real and scripted peers."""

import asyncio
import contextlib
import inspect
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import uvloop

from harness import forged_icmp
from harness.eventually import eventually
from harness.ports import free_ports
from peerd import (
    App,
    AsyncPeerClient,
    Message,
    NoAnswerError,
    Peer,
    PeerClient,
    SettingsError,
    decode,
    encode,
)
from peerd.address import Address
from peerd.clients import client_sockets
from peerd.clients.client_base import KnownPeers
from peerd.clients.endpoints import Endpoint, preferred
from peerd.clients.request import RETRY_PAUSE_S
from peerd.registry import PeerRecord, Registry

V4, V6 = socket.AF_INET, socket.AF_INET6
EVENT_LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
event_loops = pytest.mark.parametrize("event_loop", EVENT_LOOPS)

LONG_S = 60.0  # A timeout that no test waits for: an earlier failure has another cause
AT_ONCE_S = 20.0
SHORT_S = 0.2

NO_HOST = "no..host"  # Not a valid name, so that no DNS server is asked


class InEventLoop:
    """An AsyncPeerClient with the blocking methods of PeerClient."""

    def __init__(self, runner: asyncio.Runner, peers: KnownPeers | None) -> None:
        self._runner = runner
        self._client = AsyncPeerClient(peers)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = getattr(self._client, name)(*args, **named)
            return self._runner.run(result) if inspect.iscoroutine(result) else result

        return call


@pytest.fixture(scope="module", autouse=True)
def uvloop_is_open_before_any_test() -> None:
    """With the first loop libuv opens a pipe that the process keeps."""
    uvloop.new_event_loop().close()


MakeClient = Callable[..., PeerClient]


@pytest.fixture(params=["blocking", *EVENT_LOOPS])
def client_of(request: pytest.FixtureRequest) -> Iterator[MakeClient]:
    """Makes a client with the given peers; each test runs with every kind of client."""
    with contextlib.ExitStack() as stack:

        def make(peers: KnownPeers | None = None) -> PeerClient:
            if request.param == "blocking":
                return stack.enter_context(PeerClient(peers))
            runner = stack.enter_context(asyncio.Runner(loop_factory=EVENT_LOOPS[request.param]))
            client = stack.enter_context(contextlib.closing(InEventLoop(runner, peers)))
            return cast(PeerClient, client)

        yield make


class Known:
    """A cache of fixed records, with a hook that runs before each ``get``."""

    def __init__(self, *records: PeerRecord, before_get: Callable[[], object] = int) -> None:
        self.records = {record.peer_id: record for record in records}
        self.before_get = before_get
        self.gets = 0

    def get(self, peer_id: str) -> PeerRecord | None:
        self.gets += 1
        self.before_get()
        return self.records.get(peer_id)

    def nodes(self, *, partition_key: str | None = None) -> Sequence[PeerRecord]:
        everyone = self.records.values()
        return [record for record in everyone if partition_key in (None, record.partition_key)]


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    started_s = time.monotonic()
    yield
    assert time.monotonic() - started_s < AT_ONCE_S


def echo_app() -> App:
    app = App()
    app.handler("ECHO")(lambda message: message.body)
    return app


@pytest.fixture
def echo() -> Iterator[Peer]:
    with Peer(echo_app(), port=free_ports()) as peer:
        yield peer


@contextlib.contextmanager
def scripted(
    script: Callable[[socket.socket], object], family: socket.AddressFamily = V4
) -> Iterator[Address]:
    """A peer that runs the script in a thread; the script ends before the test does."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock, ThreadPoolExecutor(1) as pool:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.settimeout(30)
        sock.bind((forged_icmp.LOOPBACK[family], 0))
        done = pool.submit(script, sock)
        yield Address(*sock.getsockname()[:2])
        done.result()


def take(sock: socket.socket) -> tuple[Message, Any]:
    datagram, sender = sock.recvfrom(1 << 16)
    return decode(datagram), sender


def reply(body: bytes) -> bytes:
    return encode("REPLY", "1.0", body)


def test_every_way_to_write_a_target(client_of: MakeClient, echo: Peer) -> None:
    record = PeerRecord(url="localhost", port=echo.port, peer_id="one")
    # A registered id wins over the address that it reads as.
    moved = PeerRecord(url="127.0.0.1", port=echo.port, peer_id="elsewhere:1")
    client = client_of(Known(record, moved))
    assert client.locate("elsewhere:1") == ("127.0.0.1", echo.port)
    for target in (
        "one",
        "elsewhere:1",
        f"localhost:{echo.port}",
        f"127.0.0.1:{echo.port}",
        ("localhost", echo.port),
        Address("127.0.0.1", echo.port),
        record,
    ):
        answer = client.request(target, "ECHO", b"to " + repr(target).encode())
        assert answer.body == b"to " + repr(target).encode()
        assert (answer.magic, answer.version) == ("ECHO", "1.0")
        assert answer.sender == ("127.0.0.1", echo.port)


def test_ipv6(client_of: MakeClient) -> None:
    client = client_of()
    with Peer(echo_app(), host="::1", port=free_ports()) as peer:
        assert client.request(f"[::1]:{peer.port}", "ECHO", b"x", version="2").version == "2"
        client.send(("::1", peer.port), "ECHO", b"y")
        eventually(lambda: peer.counters()["handled"] == 2)


def test_ipv4_is_preferred_for_a_name_with_both() -> None:
    """In any order of getaddrinfo, because the supervisor binds "localhost" that way."""
    found = [(V6, 2, 17, "", ("::1", 5001, 0, 0)), (V4, 2, 17, "", ("127.0.0.1", 5001))]
    assert preferred(found) == preferred(found[::-1]) == (V4, ("127.0.0.1", 5001))
    assert preferred(found[:1]) == (V6, ("::1", 5001, 0, 0))


def test_a_late_reply_to_an_earlier_try_does_not_answer_the_next(client_of: MakeClient) -> None:
    def script(sock: socket.socket) -> None:
        _, first = take(sock)
        _, second = take(sock)  # the first try is over
        sock.sendto(reply(b"late"), first)
        sock.sendto(reply(b"in time"), second)

    with scripted(script) as address:
        assert client_of().request(address, "ASK", timeout=1.0, retries=1).body == b"in time"


def test_a_late_reply_alone_is_no_answer(client_of: MakeClient) -> None:
    def script(sock: socket.socket) -> None:
        _, first = take(sock)
        for _ in range(2):
            take(sock)
            sock.sendto(reply(b"late"), first)

    with (
        scripted(script) as address,
        pytest.raises(NoAnswerError, match=f"from {address}: nothing within 0.2 s; .*handler"),
    ):
        client_of().request(address, "ASK", timeout=SHORT_S, retries=2)


def test_the_port_of_a_failed_try_is_not_drawn_again(
    client_of: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By chance the kernel does that once in 28,000 times; here it is forced to."""
    drawn: list[int] = []
    connected = client_sockets._connected

    def same_port_again(endpoint: Endpoint, source: Endpoint | None) -> socket.socket:
        if len(drawn) % 2 == 0:
            sock = connected(endpoint, source)
        else:
            sock = socket.socket(V4, socket.SOCK_DGRAM)
            sock.bind(("0.0.0.0", drawn[-1]))
            sock.connect(endpoint.sockaddr)
        drawn.append(sock.getsockname()[1])
        return sock

    monkeypatch.setattr(client_sockets, "_connected", same_port_again)
    senders: list[Any] = []

    def script(sock: socket.socket) -> None:
        senders.extend(take(sock)[1] for _ in range(2))
        sock.sendto(reply(b"late"), senders[0])
        sock.sendto(reply(b"in time"), senders[1])

    with scripted(script) as address:
        client = client_of()
        with pytest.raises(NoAnswerError):
            client.request(address, "ASK", timeout=SHORT_S)
        assert client.request(address, "ASK").body == b"in time"
    assert drawn[0] == drawn[1] == senders[0][1]
    assert drawn[2] == senders[1][1]


def test_garbage_strangers_and_unwanted_messages_are_skipped(client_of: MakeClient) -> None:
    def script(sock: socket.socket) -> None:
        _, client = take(sock)
        with socket.socket(V4, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(reply(b"2 of a stranger"), client)
        for datagram in (b"garbage", b"", reply(b"1"), reply(b"2"), reply(b"3")):
            sock.sendto(datagram, client)

    with scripted(script) as address:
        answer = client_of().request(address, "ASK", is_answer=lambda it: it.body[:1] == b"2")
    assert answer.body == b"2"


def test_a_flood_does_not_hold_a_request_beyond_its_timeout(client_of: MakeClient) -> None:
    """There is always one more datagram to read, and none is the answer."""
    asked: list[tuple[socket.socket, Any]] = []

    def script(sock: socket.socket) -> None:
        _, client = take(sock)
        asked.append((sock, client))
        sock.sendto(reply(b"not it"), client)

    def with_another_behind_it(_: Message) -> bool:
        sock, client = asked[0]
        sock.sendto(reply(b"nor this"), client)
        return time.monotonic() - started_s > AT_ONCE_S

    started_s = time.monotonic()
    with scripted(script) as address, pytest.raises(NoAnswerError, match="nothing within"):
        client_of().request(address, "ASK", timeout=SHORT_S, is_answer=with_another_behind_it)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_a_closed_port_is_reported_without_waiting(client_of: MakeClient, host: str) -> None:
    target = f"{host}:{free_ports()}"
    with at_once(), pytest.raises(NoAnswerError) as refused:
        client_of().request(target, "PING", timeout=LONG_S)
    assert f"no answer from {target}: Connection refused; no process listens" in str(refused.value)


@pytest.mark.parametrize(
    ("family", "kind", "code", "cause"),
    [
        (V4, 3, 1, "No route to host"),
        (V4, 3, 3, "Connection refused"),
        (V4, 11, 0, "No route to host"),
        (V6, 1, 3, "No route to host"),
        (V6, 1, 4, "Connection refused"),
    ],
    ids=["v4-host", "v4-port", "v4-time-exceeded", "v6-host", "v6-port"],
)
def test_an_icmp_error_from_a_router_is_reported_without_waiting(
    client_of: MakeClient, family: socket.AddressFamily, kind: int, code: int, cause: str
) -> None:
    """The peer has received the request, and the error arrives instead of a reply."""
    with forged_icmp.raw_socket(family) as raw:

        def script(sock: socket.socket) -> None:
            _, client = take(sock)
            forged_icmp.forge_icmp_error(raw, kind, code, client[1], sock.getsockname()[1])

        with (
            at_once(),
            scripted(script, family) as address,
            pytest.raises(NoAnswerError, match=cause),
        ):
            client_of().request(address, "PING", timeout=LONG_S)


@pytest.mark.parametrize("registered", [True, False])
def test_each_try_locates_the_peer_anew(
    client_of: MakeClient, echo: Peer, registered: bool
) -> None:
    """The peer moves, or registers for the first time, before the third try."""
    old = PeerRecord(url="localhost", port=free_ports(), peer_id="moving")
    new = PeerRecord(url="localhost", port=echo.port, peer_id="moving")
    peers = Known(*([old] if registered else []))
    peers.before_get = lambda: peers.gets == 3 and peers.records.update(moving=new)
    answer = client_of(peers).request("moving", "ECHO", b"x", timeout=LONG_S, retries=5)
    assert (answer.body, answer.sender) == (b"x", ("127.0.0.1", echo.port))
    assert peers.gets == 3


def test_there_are_as_many_tries_as_allowed(client_of: MakeClient) -> None:
    peers = Known(PeerRecord(url="localhost", port=free_ports(), peer_id="gone"))
    client = client_of(peers)
    started_s = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"no answer from gone at localhost:.*refused"):
        client.request("gone", "PING", timeout=LONG_S, retries=3)
    assert peers.gets == 4
    # The pauses give a peer time to come back, and do not last until the timeout.
    assert 3 * RETRY_PAUSE_S <= time.monotonic() - started_s < AT_ONCE_S


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("localhost:0", SettingsError, "from 1 to 65535"),
        ("localhost:65536", SettingsError, "from 1 to 65535"),
        ("localhost:" + "9" * 5000, SettingsError, "from 1 to 65535"),
        (("localhost", 0), SettingsError, "from 1 to 65535"),
        (("::1", 5001, 0, 0), SettingsError, r"write \(host, port\)"),
        (("", 5001), SettingsError, r"write \(host, port\)"),
        ("unknown", NoAnswerError, "no peer has the id 'unknown'"),
        ("", NoAnswerError, "no peer has the id"),
        (":5001", NoAnswerError, "no peer has the id"),
        # Ambiguous: the last group may be the port.
        ("::1:5001", NoAnswerError, "no peer has the id"),
        (f"{NO_HOST}:5001", NoAnswerError, "cannot be a host name"),
        ("x" * 64 + ":5001", NoAnswerError, "cannot be a host name"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_targets_that_cannot_be_reached(
    client_of: MakeClient, target: Any, error: type[Exception], says: str
) -> None:
    client = client_of(Known())
    for call in (client.request, client.send):
        with pytest.raises(error, match=says):
            call(target, "PING")


def test_ids_and_broadcasts_need_peers(client_of: MakeClient) -> None:
    client = client_of()
    with pytest.raises(SettingsError, match=r"no host:port.*cache"):
        client.request("seedId", "PING")
    with pytest.raises(SettingsError, match=r"no peers to broadcast to.*cache"):
        client.broadcast("PING")


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"body": bytes(65507)}, "65524 bytes does not fit.*65507"),
        ({"version": "\N{LATIN SMALL LETTER E WITH ACUTE}"}, "ASCII"),
        ({"timeout": -1.0}, "timeout -1.0: from 0 to 86400 seconds"),
        ({"timeout": float("nan")}, "timeout nan"),
        ({"timeout": float("inf")}, "timeout inf"),
        ({"timeout": 1e300}, "timeout 1e.300"),
        ({"retries": -1}, "retries -1"),
    ],
    ids=["body", "version", "negative", "nan", "inf", "far", "retries"],
)
def test_invalid_messages_and_limits(
    client_of: MakeClient, named: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        client_of().request("localhost:5001", "MAGICS", **named)


def test_the_largest_message(client_of: MakeClient, echo: Peer) -> None:
    body = bytes(65507 - len(encode("ECHO", "1.0")))
    assert client_of().request(("127.0.0.1", echo.port), "ECHO", body).body == body


def test_sends_come_from_one_sender_in_order(client_of: MakeClient) -> None:
    taken: list[tuple[Message, Any]] = []

    def script(sock: socket.socket) -> None:
        taken.extend(take(sock) for _ in range(100))

    client = client_of()
    with scripted(script) as address:
        for number in range(100):
            client.send(address, "NOTE", b"%d" % number)
    assert [message.body for message, _ in taken] == [b"%d" % number for number in range(100)]
    assert len({sender for _, sender in taken}) == 1


def test_a_send_to_a_closed_port_is_no_error(client_of: MakeClient) -> None:
    client = client_of()
    for _ in range(3):
        client.send(("127.0.0.1", free_ports()), "NOTE")


def test_broadcast(client_of: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "peerd")
    with contextlib.ExitStack() as stack:
        port = free_ports(3)
        peers = [stack.enter_context(Peer(echo_app(), port=port + slot)) for slot in range(3)]
        keys = ["red", "red", "blue"]
        records = [
            PeerRecord(url="localhost", port=peer.port, partition_key=key)
            for peer, key in zip(peers, keys, strict=True)
        ]
        lost = PeerRecord(url=NO_HOST, port=1, peer_id="0 lost", partition_key="red")
        client = client_of(Known(lost, *records))

        def handled() -> list[int]:
            return [peer.counters()["handled"] for peer in peers]

        assert client.broadcast("ECHO", b"to all") == 3
        eventually(lambda: handled() == [1, 1, 1])
        assert client.broadcast("ECHO", b"to some", "red") == 2
        eventually(lambda: handled() == [2, 2, 1])
        assert client.broadcast("ECHO", b"to none", partition_key="green") == 0
        assert handled() == [2, 2, 1]
    assert caplog.text.count(f"broadcast: no answer from 0 lost at {NO_HOST}:1") == 2


def test_with_a_registry_cache(client_of: MakeClient, etcd: str) -> None:
    port = free_ports()
    with (
        Registry(etcd, "client-cache") as registry,
        registry.cache() as cache,
        Peer(port=port, peer_id="seedId", etcd=etcd, prefix="client-cache", partition_key="red"),
    ):
        client = client_of(cache)
        eventually(lambda: client.locate("seedId"))
        assert client.request("seedId", "PING", b"x").magic == "PONG"
        assert client.broadcast("PING", partition_key="red") == 1
        assert client.broadcast("PING", partition_key="blue") == 0
        with pytest.raises(NoAnswerError, match="no peer has the id 'unknown'"):
            client.request("unknown", "PING")


def test_a_closed_client_refuses_every_call(client_of: MakeClient) -> None:
    client = client_of(Known())
    client.send(("127.0.0.1", free_ports()), "NOTE")
    client.close()
    client.close()
    for call in (
        lambda: client.request("localhost:5001", "PING"),
        lambda: client.send("localhost:5001", "PING"),
        lambda: client.broadcast("PING"),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_one_client_for_many_threads(echo: Peer) -> None:
    bodies = [b"%d" % number for number in range(400)]
    with PeerClient() as client, ThreadPoolExecutor(8) as pool:
        target = ("127.0.0.1", echo.port)
        answers = pool.map(lambda body: client.request(target, "ECHO", body, LONG_S), bodies)
        assert [answer.body for answer in answers] == bodies


def run(event_loop: str, main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=EVENT_LOOPS[event_loop]) as runner:
        runner.run(main)


@event_loops
def test_500_concurrent_requests_each_get_their_own_answer(event_loop: str) -> None:
    """The peer answers when it has all of them, the last one first."""
    bodies = [b"%d" % number for number in range(500)]

    def script(sock: socket.socket) -> None:
        taken = [take(sock) for _ in bodies]
        for message, sender in reversed(taken):
            sock.sendto(reply(message.body), sender)

    async def main() -> None:
        async with AsyncPeerClient() as client:
            requests = (client.request(f"localhost:{port}", "ASK", body, LONG_S) for body in bodies)
            assert [answer.body for answer in await asyncio.gather(*requests)] == bodies

    with scripted(script) as (_, port):
        run(event_loop, main())


@event_loops
def test_a_cancelled_request_leaves_no_socket(event_loop: str) -> None:
    arrived = threading.Semaphore(0)

    def script(sock: socket.socket) -> None:
        for _ in range(50):
            take(sock)
            arrived.release()

    async def main() -> None:
        client = AsyncPeerClient()
        before = sockets()
        requests = [
            asyncio.create_task(client.request(address, "ASK", b"", LONG_S)) for _ in range(50)
        ]
        for _ in requests:
            await asyncio.to_thread(arrived.acquire)
        assert len(sockets() - before) == 50
        for request in requests:
            request.cancel()
        ended = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(end) for end in ended} == {asyncio.CancelledError}
        assert sockets() == before
        await client.close()

    with scripted(script) as address:
        run(event_loop, main())


@event_loops
def test_a_timeout_of_the_caller_is_not_translated(event_loop: str) -> None:
    async def main() -> None:
        async with AsyncPeerClient() as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SHORT_S):
                    await client.request(address, "ASK", b"", LONG_S, retries=3)

    with scripted(take) as address:
        run(event_loop, main())


def sockets() -> set[str]:
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return {os.readlink(name) for name in names if os.path.exists(name) or os.path.islink(name)}
