"""For any result of recvmmsg and sendmmsg: no reply is lost, doubled or out of order, and each is counted.

The requests are in the socket's queue before a peer starts on it, in a process of its own with
faults.c in front of the two calls. So each case is the same every time, and what the kernel does in
between is real. At its end the peer reports its counters.
"""

import ctypes
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from peerd import App, decode, encode
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard
from peerd.linux import SOL_UDP, UDP_GRO, UDP_SEGMENT

EVER = 1 << 30
TX_ARENA_BYTES, TX_SEGMENTS, TX_REFUSING, TX_RETRIES = 1 << 18, 64, 64, 3
MAX_ATTEMPTS = 5  # ext/peerd/deferred.pxd

NOT_NOW = [errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM]
# How an ICMP error about an earlier reply shows in the call that comes next: icmp_err_convert in
# net/ipv4/icmp.c of Linux, icmp_err and icmpv6_err_convert in net/ipv6/icmp.c.
ICMP = [
    errno.ECONNREFUSED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPROTO,
    errno.EACCES,
    errno.EMSGSIZE,
]
REASONS = ["full", "too_big", "refused", "congested"]
BODIES = [b"%03d" % number for number in range(100)]
REQUESTS = [(0, body) for body in BODIES]

name_of = errno.errorcode.get


@dataclass(frozen=True)
class Fault:
    """An entry of the plan; faults.c says what it means."""

    function: str
    first: int
    last: int
    kind: str
    value: int
    client: int | None = None


@dataclass(frozen=True)
class Job:
    """The peer's task."""

    fd: int
    faults: int
    datagrams: int
    gro: bool
    gso: bool
    turns: int
    run: bool


@dataclass(frozen=True)
class Told:
    """The peer's report at its end."""

    counters: dict[str, int]
    gso: bool
    error: str | None
    met: list[int]
    """How often each entry of the plan was met."""
    runs_sent: int


@dataclass(frozen=True)
class Outcome:
    told: Told
    replies: list[list[bytes]]
    """The bodies that each client got, in the order of their arrival."""
    reply_bytes: int

    def __getitem__(self, counter: str) -> int:
        return self.told.counters[counter]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", *flags, str(source), "-o", str(target), "-ldl"], check=True)
    return target


def serve(
    library: Path,
    *faults: Fault,
    requests: Sequence[tuple[int, bytes]] = REQUESTS,
    magic: str = "ECHO",
    gro: bool = True,
    gso: bool = True,
    joined: bool = False,
    run: bool = False,
    turns: int = EVER,
) -> Outcome:
    """Have ``requests``, (number of the client, body) each, answered by a peer that meets ``faults``.

    The peer turns until all is sent, or so many ``turns``; or, with ``run``, until all has arrived.
    ``joined``: the requests are of one size and leave as one UDP_SEGMENT send.
    """
    with ExitStack() as stack:
        sock, *clients = (
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            for _ in range(2 + max(number for number, _ in requests))
        )
        sock.bind(("127.0.0.1", 0))
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            client.connect(sock.getsockname())
        datagrams = [encode(magic, "1", body) for _, body in requests]
        if joined:
            # What comes to a socket without it is taken apart at once.
            sock.setsockopt(SOL_UDP, UDP_GRO, 1)
            size = len(datagrams[0]).to_bytes(2, sys.byteorder)
            clients[0].sendmsg([b"".join(datagrams)], [(SOL_UDP, UDP_SEGMENT, size)])
        else:
            for (number, _), datagram in zip(requests, datagrams, strict=True):
                clients[number].send(datagram)
        job = Job(sock.fileno(), len(faults), len(requests), gro, gso, turns, run)
        peer = stack.enter_context(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(asdict(job))],
                env=os.environ
                | {"LD_PRELOAD": str(library), "PEERD_FAULTS": plan(faults, clients)},
                pass_fds=[sock.fileno()],
                stdout=subprocess.PIPE,
            )
        )
        if run:
            replies, reply_bytes = receive(clients, len(requests))
            peer.send_signal(signal.SIGTERM)
        output, _ = peer.communicate(timeout=30)
        told = Told(**json.loads(output))
        if not run:
            replies, reply_bytes = receive(clients, told.counters["tx_messages"])
        for client in clients:
            with pytest.raises(BlockingIOError):
                client.recv(1, socket.MSG_DONTWAIT)
    assert 0 not in told.met, "a fault of the plan did not happen"
    return Outcome(told, replies, reply_bytes)


def plan(faults: Sequence[Fault], clients: Sequence[socket.socket]) -> str:
    ports = [
        0 if fault.client is None else clients[fault.client].getsockname()[1] for fault in faults
    ]
    return " ".join(
        f"{fault.function}:{fault.first}:{fault.last}:{fault.kind}:{fault.value}:{port}"
        for fault, port in zip(faults, ports, strict=True)
    )


def receive(clients: Sequence[socket.socket], count: int) -> tuple[list[list[bytes]], int]:
    got: list[list[bytes]] = [[] for _ in clients]
    size = 0
    while sum(map(len, got)) < count:
        readable, _, _ = select.select(clients, [], [], 5)
        assert readable, f"only {sum(map(len, got))} of {count} replies came"
        for client in readable:
            datagram = client.recv(1 << 16)
            size += len(datagram)
            got[clients.index(client)].append(decode(datagram).body)
    return got, size


def peer_main(job: Job) -> Told:
    """The peer's process."""
    app = App()
    app.handler("ECHO")(lambda message: message.body)
    app.handler("LARGE")(lambda message: message.body.ljust(4000))
    app.handler("MIXED")(lambda message: message.body.ljust(20 * (1 + int(message.body) // 7 % 3)))
    slot = Scoreboard(1).slots[0]
    errors: list[object] = []
    loop = DatagramLoop(
        job.fd,
        app.handlers,
        app.batch_handlers,
        slot,
        lambda *error: errors.append(error),
        gro=job.gro,
        gso=job.gso,
    )
    error = None
    try:
        if job.run:
            signal.signal(signal.SIGTERM, lambda *_: loop.stop())
            signal.set_wakeup_fd(loop.wakeup_fd)
            loop.run()
        else:
            turns = 0
            while turns < job.turns and (
                slot.counters()["rx_datagrams"] < job.datagrams or loop.queued_replies
            ):
                loop.turn()
                turns += 1
            # run() ends by dropping what is still queued.
            loop.stop()
            loop.run()
    except OSError as failure:
        error = str(failure)
    assert not errors
    faults = ctypes.CDLL(None)
    met = [faults.faults_met(index) for index in range(job.faults)]
    return Told(slot.counters(), loop.gso, error, met, faults.faults_runs_sent())


def assert_all_answered(outcome: Outcome) -> None:
    assert outcome.told.error is None
    assert [body.rstrip() for body in outcome.replies[0]] == BODIES
    assert_counted(outcome, len(BODIES))
    assert outcome["tx_messages"] == len(BODIES)


def assert_counted(outcome: Outcome, requests: int) -> None:
    """Every datagram is in the counters, and every reply was sent or dropped."""
    dropped = sum(outcome[f"tx_dropped_{why}"] for why in REASONS)
    assert outcome["rx_datagrams"] == outcome["rx_messages"] + outcome["rx_truncated"] == requests
    assert outcome["rx_messages"] == outcome["tx_messages"] + dropped
    assert outcome["handled"] == outcome["rx_datagrams"]
    assert outcome["tx_bytes"] == outcome.reply_bytes


def test_without_faults(library: Path) -> None:
    outcome = serve(library)
    assert_all_answered(outcome)
    assert outcome.told.runs_sent > 0


@pytest.mark.parametrize("count", [1, 3])
def test_recvmmsg_gives_less_than_asked(library: Path, count: int) -> None:
    """Few after many, and many after few: what a buffer held before must not come again."""
    faults = [Fault("recvmmsg", call, call, "count", count) for call in (2, 3, 5)]
    assert_all_answered(serve(library, *faults))


@pytest.mark.parametrize("error", [errno.EINTR, *NOT_NOW, *ICMP], ids=name_of)
def test_recvmmsg_fails_for_a_while(library: Path, error: int) -> None:
    """Any host on the network can send an ICMP error: it must not end the loop."""
    assert_all_answered(serve(library, Fault("recvmmsg", 2, 4, "errno", error)))


@pytest.mark.parametrize("run", [False, True])
def test_recvmmsg_fails_for_good(library: Path, run: bool) -> None:
    outcome = serve(
        library, Fault("recvmmsg", 1, EVER, "errno", errno.EBADF), requests=[(0, b"x")], turns=1
    )
    assert outcome.told.error == f"[Errno {errno.EBADF}] recvmmsg: {os.strerror(errno.EBADF)}"


def test_a_datagram_that_was_cut_off_is_not_delivered(library: Path) -> None:
    """The kernel cuts off what does not fit the buffer, 20 bytes here, and says so (MSG_TRUNC)."""
    requests = [(0, b"x" * size) for size in (1, 50, 2, 51, 3, 5000, 4)]
    outcome = serve(library, Fault("recvmmsg", 1, EVER, "bytes", 20), requests=requests, gro=False)
    assert outcome.replies == [[b"x", b"xx", b"xxx", b"xxxx"]]
    assert outcome["rx_truncated"] == 3
    assert_counted(outcome, len(requests))


def test_joined_datagrams_without_their_stride_are_not_delivered(library: Path) -> None:
    """No room for the control message (MSG_CTRUNC): one buffer, 64 datagrams, and no way to split it."""
    outcome = serve(
        library,
        Fault("recvmmsg", 1, EVER, "control", 8),
        requests=[(0, b"%02d" % number) for number in range(TX_SEGMENTS)],
        joined=True,
        turns=2,
    )
    assert outcome.replies == [[]]
    assert outcome["rx_truncated"] == outcome["rx_datagrams"] == outcome["handled"] == 1
    assert outcome["rx_messages"] == outcome["rx_bytes"] == 0


@pytest.mark.parametrize("gso", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_sendmmsg_sends_less_than_asked(library: Path, gso: bool, count: int) -> None:
    outcome = serve(library, Fault("sendmmsg", 1, EVER, "count", count), gso=gso, magic="MIXED")
    assert_all_answered(outcome)


@pytest.mark.parametrize("gso", [False, True])
@pytest.mark.parametrize("error", [errno.EINTR, *NOT_NOW], ids=name_of)
def test_sendmmsg_fails_for_a_while_in_the_middle(library: Path, error: int, gso: bool) -> None:
    """First some are sent, then none three times, then some again."""
    faults = [
        Fault("sendmmsg", 1, 1, "count", 2),
        Fault("sendmmsg", 2, 4, "errno", error),
        Fault("sendmmsg", 5, 5, "count", 1),
        Fault("sendmmsg", 6, 6, "errno", error),
    ]
    outcome = serve(library, *faults, magic="MIXED", gso=gso)
    assert_all_answered(outcome)


@pytest.mark.parametrize(
    ("error", "calls"),
    [(errno.EAGAIN, 20), (errno.ENOBUFS, 4), (errno.ENOMEM, 4)],
    ids=["EAGAIN", "ENOBUFS", "ENOMEM"],
)
def test_what_has_to_wait_is_sent_without_another_request(
    library: Path, error: int, calls: int
) -> None:
    assert_all_answered(serve(library, Fault("sendmmsg", 1, calls, "errno", error), run=True))


@pytest.mark.parametrize("gso", [False, True])
@pytest.mark.parametrize("error", [errno.ENOBUFS, errno.ENOMEM], ids=name_of)
def test_an_address_without_room_costs_no_other_its_replies(
    library: Path, error: int, gso: bool
) -> None:
    """Its own are dropped after a few attempts; the others' are sent in their order."""
    requests = [(number // 5 % 4, b"%03d" % number) for number in range(100)]
    fault = Fault("sendmmsg", 1, EVER, "to", error, client=1)
    outcome = serve(library, fault, requests=requests, gso=gso)
    for client in (0, 2, 3):
        assert outcome.replies[client] == [body for number, body in requests if number == client]
    assert outcome.replies[1] == []
    assert outcome["tx_dropped_congested"] == 25
    # Each attempt is a call, and each drop is one, too.
    assert outcome.told.met[0] <= 25 + 2 * MAX_ATTEMPTS
    assert_counted(outcome, 100)


@pytest.mark.parametrize("gso", [False, True])
@pytest.mark.parametrize("error", ICMP, ids=name_of)
def test_an_icmp_error_of_another_loses_no_reply(library: Path, error: int, gso: bool) -> None:
    """The send that it shows in is for another address, and has not been done."""
    faults = [
        Fault("sendmmsg", 1, 1, "errno", error),
        Fault("sendmmsg", 2, 2, "count", 1),
        Fault("sendmmsg", 3, 3, "errno", error),
    ]
    outcome = serve(library, *faults, magic="MIXED", gso=gso)
    assert_all_answered(outcome)
    assert outcome.told.gso is gso


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EMSGSIZE], ids=name_of)
def test_an_address_that_refuses_runs_gets_single_datagrams(library: Path, error: int) -> None:
    """EIO without checksum offload; above the path's MTU EMSGSIZE (Linux 6.18), or EINVAL (udp(7))."""
    outcome = serve(library, Fault("sendmmsg", 1, EVER, "run", error))
    assert_all_answered(outcome)
    assert outcome.told.met[0] <= 1 + TX_RETRIES, "runs were tried again"
    assert outcome["tx_gso_refused"] == 1
    assert outcome.told.runs_sent == 0
    assert outcome.told.gso


def test_only_the_address_that_refuses_runs_gets_none(library: Path) -> None:
    requests = [(number // 10 % 2, b"%03d" % number) for number in range(100)]
    fault = Fault("sendmmsg", 1, EVER, "run", errno.EIO, client=0)
    outcome = serve(library, fault, requests=requests)
    assert outcome.replies == [
        [body for client, body in requests if client == number] for number in (0, 1)
    ]
    assert outcome.told.met == [1]
    assert outcome.told.runs_sent >= 5
    assert_counted(outcome, 100)


def test_when_too_many_addresses_refuse_runs_there_are_none(library: Path) -> None:
    requests = [(number // 2, b"%03d" % number) for number in range(2 * TX_REFUSING + 20)]
    outcome = serve(library, Fault("sendmmsg", 1, EVER, "run", errno.EIO), requests=requests)
    assert outcome.replies == [
        [body for client, body in requests if client == number]
        for number in range(TX_REFUSING + 10)
    ]
    assert not outcome.told.gso
    assert_counted(outcome, len(requests))


@pytest.mark.parametrize("error", [errno.EINTR, *NOT_NOW, errno.ECONNREFUSED], ids=name_of)
def test_a_run_that_leaves_in_pieces_is_stopped_midway(library: Path, error: int) -> None:
    faults = [
        Fault("sendmmsg", 2, 2, "count", 5),
        Fault("sendmmsg", 3, 3, "errno", error),
        Fault("sendmmsg", 4, 4, "count", 1),
        Fault("sendmmsg", 5, 5, "errno", error),
        Fault("sendmmsg", 1, EVER, "run", errno.EIO),
    ]
    assert_all_answered(serve(library, *faults))


def test_the_kernel_takes_nothing_for_long(library: Path) -> None:
    """The queue holds what the arena has room for; further replies are dropped and counted."""
    fault = Fault("sendmmsg", 1, 60, "errno", errno.EAGAIN)
    outcome = serve(library, fault, magic="LARGE")
    room = TX_ARENA_BYTES // len(encode("LARGE", "1", bytes(4000)))
    assert [body.rstrip() for body in outcome.replies[0]] == BODIES[:room]
    assert outcome["tx_messages"] == room
    assert outcome["tx_dropped_full"] == 100 - room
    assert_counted(outcome, 100)


def test_the_kernel_takes_nothing_at_all(library: Path) -> None:
    outcome = serve(library, Fault("sendmmsg", 1, EVER, "errno", errno.EAGAIN), turns=50)
    assert outcome["tx_dropped_full"] == 100
    assert_counted(outcome, 100)


def test_a_datagram_that_is_refused_costs_no_other(library: Path) -> None:
    """EPERM is what a firewall's rule says (iptables, OUTPUT, DROP)."""
    faults = [Fault("sendmmsg", 1, 1, "count", 10), Fault("sendmmsg", 2, 5, "errno", errno.EPERM)]
    outcome = serve(library, *faults, gso=False)
    lost = outcome["tx_dropped_refused"]
    assert 1 <= lost <= 4
    assert outcome.replies == [BODIES[:10] + BODIES[10 + lost :]]
    assert_counted(outcome, 100)


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENETUNREACH], ids=name_of)
def test_a_run_that_is_refused_for_good_is_counted_message_by_message(
    library: Path, error: int
) -> None:
    outcome = serve(library, Fault("sendmmsg", 1, EVER, "errno", error))
    assert outcome["tx_dropped_refused"] == 100
    assert outcome.told.gso
    assert_counted(outcome, 100)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(peer_main(Job(**json.loads(sys.argv[1]))))))
