import signal
import socket

from harness import raw_client
from harness.supervised import Running, Supervised, send_signal
from harness.supervisor_requests import scale, serving
from peerd.supervisor.socket_queue import KernelDrops, QueueState


def overrun(sock: socket.socket, datagrams: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(datagrams):
            client.sendto(bytes(1000), sock.getsockname())


def small_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sock.bind(("127.0.0.1", 0))
    return sock


def taken(sock: socket.socket) -> int:
    sock.setblocking(False)
    count = 0
    while True:
        try:
            sock.recv(2000)
        except BlockingIOError:
            return count
        count += 1


def test_the_count_continues_with_the_next_socket_and_outlives_the_last() -> None:
    drops = KernelDrops()
    with small_socket() as first, small_socket() as second:
        overrun(first, 10)  # before it was followed
        before = 10 - taken(first)
        drops.follow(first)
        assert before > 0
        assert drops.read()[1] == 0
        overrun(first, 50)
        dropped = 50 - taken(first)
        assert drops.read()[1] == dropped > 0
        drops.follow(second)
        assert drops.read()[1] == dropped
        overrun(second, 50)
        dropped += 50 - taken(second)
        drops.leave()
    assert drops.read() == (QueueState(0, 0), dropped)


def test_the_kernels_counter_wraps() -> None:
    """A test cannot cause four billion drops, so the count starts just below."""
    drops = KernelDrops()
    with small_socket() as sock:
        overrun(sock, 50)
        dropped = 50 - taken(sock)
        drops.follow(sock)
        drops._seen = 2**32 - 3
        assert drops.read()[1] == dropped + 3


def test_status_has_one_count_through_a_stopped_worker_its_death_and_the_close(
    supervised: Supervised,
) -> None:
    running = supervised.start("--recv-buffer=5000", peers=2).wait_ready()
    pid = running.peer(1)["pid"]
    send_signal(pid, signal.SIGSTOP)
    raw_client.send(running.ports[1], b"PING", bytes(1000), 1000)
    dropped = count_of(running)
    assert dropped > 900
    send_signal(pid, signal.SIGKILL)
    serving(running, 1, but_not=[pid])
    assert count_of(running) == dropped
    scale(running, 1)
    scale(running, 2)
    assert count_of(running) == dropped


def count_of(running: Running) -> int:
    peer = running.peer(1)
    assert peer["rx_dropped"] == peer["counters"]["rx_kernel_drops"]
    return int(peer["rx_dropped"])
