"""The datagram loop over real sockets, turn by turn or in a thread."""

import gc
import os
import signal
import socket
import threading

import psutil
import pytest

from harness.eventually import eventually
from harness.loop_harness import LoopHarness
from peerd import App, Message, decode, encode
from peerd._loop import DatagramLoop
from peerd.linux import SO_RCVMARK, SO_TIMESTAMPNS, SOL_UDP, UDP_GRO
from peerd.serving.app import builtin_app


def collecting_app() -> tuple[App, list[Message]]:
    app, seen = App(), list[Message]()
    app.handler("M")(seen.append)
    return app, seen


def test_a_message_is_answered_to_its_sender() -> None:
    with LoopHarness() as peer:
        peer.client.send(encode("PING", "1.0", b"hi"))
        peer.take(1)
        assert peer.receive() == Message("PONG", "1.0", b"hi")
        peer.client.send(encode("ECHO", "7", b""))
        peer.take(1)
        assert peer.receive() == Message("ECHO", "7", b"")
        assert peer.counters["tx_messages"] == 2
        assert peer.counters["handled"] == 2


def test_malformed_datagrams_are_counted_by_reason_and_the_loop_continues() -> None:
    bad = {
        "decode_empty": [b""],
        "decode_short": [b"\0", b"\0\0\0\4PING"],
        "decode_negative_length": [b"\xff\xff\xff\xff"],
        "decode_length_past_end": [b"\x7f\xff\xff\xff", b"x" * 65507],
        "decode_not_ascii": [b"\0\0\0\1\xe9\0\0\0\0"],
        "unknown_magic": [encode("NOPE", "1", b"")],
    }
    with LoopHarness() as peer, peer.running():
        for datagrams in bad.values():
            for datagram in datagrams:
                peer.client.send(datagram)
        peer.client.send(encode("PING", "1", b"still here"))
        assert peer.receive().body == b"still here"
        eventually(lambda: peer.counters["handled"] == 9)
        for name, datagrams in bad.items():
            assert peer.counters[name] == len(datagrams), name


def test_a_reply_larger_than_a_datagram_is_counted() -> None:
    app = App()
    app.handler("M")(lambda message: bytes(65507))
    with LoopHarness(app) as peer:
        peer.client.send(encode("M", "1", b""))
        peer.take(1)
        assert peer.counters["tx_dropped_too_big"] == 1
        assert peer.counters["handled"] == 1


def test_a_turn_may_have_more_replies_than_the_arena_holds() -> None:
    with LoopHarness() as peer:
        body = bytes(60_000)
        for _ in range(12):
            peer.client.send(encode("ECHO", "1", body))
        peer.take(12)
        assert [peer.receive().body for _ in range(12)] == [body] * 12


def test_a_handler_that_raises_is_reported_and_the_loop_continues() -> None:
    app = builtin_app()

    @app.handler("BAD")
    def bad(message: Message) -> bytes:
        raise RuntimeError(message.body.decode())

    @app.handler("TYPE")
    def wrong(message: Message) -> bytes:
        return "text"  # type: ignore[return-value]

    with LoopHarness(app) as peer:
        for magic in ("BAD", "TYPE", "PING"):
            peer.client.send(encode(magic, "1", b"oh no"))
        peer.take(3)
        assert peer.receive().magic == "PONG"
        assert peer.counters["handler_errors"] == 2
        (magic, sender, error), (_, _, type_error) = peer.errors
        assert (magic, sender, str(error)) == ("BAD", peer.client.getsockname(), "oh no")
        assert "must return bytes, a Message or None" in str(type_error)


def test_a_batch_handler_gets_all_messages_of_a_turn() -> None:
    app = App()
    batches: list[list[Message]] = []
    app.batch_handler("M")(batches.append)
    with LoopHarness(app) as peer:
        for number in range(10):
            peer.client.send(encode("M", "1", b"%d" % number))
        peer.take(10)
        assert [message.body for batch in batches for message in batch] == [
            b"%d" % number for number in range(10)
        ]
        assert len(batches) < 10
        assert peer.counters["handled"] == 10


def test_a_batch_handler_that_raises_or_answers_is_reported() -> None:
    app = App()
    results = iter([RuntimeError("no"), b"reply"])

    @app.batch_handler("M")
    def handler(messages: list[Message]) -> None:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[return-value]

    with LoopHarness(app) as peer:
        for _ in range(2):
            peer.client.send(encode("M", "1", b""))
            peer.take(1)
        assert [type(error) for _, _, error in peer.errors] == [RuntimeError, TypeError]


def test_the_heartbeat_is_written_while_idle() -> None:
    with LoopHarness() as peer, peer.running():
        before = peer.slot.heartbeat_ns
        eventually(lambda: peer.slot.heartbeat_ns > before)


def test_stop_drains_the_queue() -> None:
    app, seen = collecting_app()
    with LoopHarness(app) as peer:
        for _ in range(500):
            peer.client.send(encode("M", "1", b""))
        peer.loop.stop(drain_s=5)
        peer.loop.run()
        assert len(seen) == 500


def test_stop_without_drain_leaves_the_queue_to_a_successor() -> None:
    app, seen = collecting_app()
    with LoopHarness(app) as peer:
        for _ in range(500):
            peer.client.send(encode("M", "1", b""))
        peer.loop.stop()
        peer.loop.run()
        successor = peer.new_loop()
        while len(seen) < 500:
            successor.turn()
        assert peer.counters["rx_datagrams"] == 500


def test_a_signal_wakes_the_sleeping_loop() -> None:
    with LoopHarness() as peer:
        previous = signal.signal(signal.SIGUSR1, lambda *_: peer.loop.stop())
        previous_fd = signal.set_wakeup_fd(peer.loop.wakeup_fd)
        try:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            peer.loop.run()
        finally:
            signal.set_wakeup_fd(previous_fd)
            signal.signal(signal.SIGUSR1, previous)


def test_replies_queued_before_a_handler_ends_the_loop_reach_their_own_client() -> None:
    app = builtin_app()

    @app.handler("LEAVE")
    def leave(message: Message) -> None:
        raise SystemExit(3)

    with LoopHarness(app) as peer:
        other = peer.new_client()
        peer.client.send(encode("ECHO", "1", b"first"))
        peer.client.send(encode("LEAVE", "1", b""))
        with pytest.raises(SystemExit):
            peer.loop.run()
        assert peer.receive().body == b"first"
        other.send(encode("ECHO", "1", b"second"))
        peer.take(1)
        assert decode(other.recv(1 << 16)).body == b"second"


def test_a_loop_without_gro_switches_it_off_on_the_socket() -> None:
    with LoopHarness() as peer:
        assert peer.sock.getsockopt(SOL_UDP, UDP_GRO) == 1
        loop = peer.new_loop(gro=False)
        assert not loop.gro
        assert peer.sock.getsockopt(SOL_UDP, UDP_GRO) == 0


def test_other_control_messages_do_not_hide_the_split() -> None:
    app, seen = collecting_app()
    datagrams = [encode("M", "1", b"%02d" % number) for number in range(8)]
    with LoopHarness(app) as peer:
        peer.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        peer.sock.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
        peer.send(*datagrams)
        peer.take(8)
    assert [message.body for message in seen] == [b"%02d" % number for number in range(8)]


def test_a_turn_inside_a_handler_is_refused() -> None:
    app = App()

    @app.handler("M")
    def nested(message: Message) -> None:
        peer.loop.turn()

    with LoopHarness(app) as peer:
        peer.client.send(encode("M", "1", b""))
        peer.take(1)
        assert "is running already" in str(peer.errors[0][2])


def test_headers_that_change_with_every_message() -> None:
    """The loop caches the last header: it must distinguish what begins like it from what does not."""
    app = App()
    seen = list[tuple[str, str, bytes]]()
    for magic in ("A", "AB", "B"):
        app.handler(magic)(
            lambda message: seen.append((message.magic, message.version, message.body))
        )
    long_version = "v" * 100
    sent = [
        ("A", "1", b"x"),
        ("AB", "1", b"x"),
        ("A", "", b"\0\0\0\1"),
        ("A", "", b""),
        ("A", long_version, b"x"),
        ("B", long_version, b"y"),
        ("B", "2", b"z"),
        ("A", "1", b"x"),
    ]
    with LoopHarness(app) as peer:
        sent.extend(("A", f"version {number}", b"%d" % number) for number in range(100))
        for message in sent:
            peer.client.send(encode(*message))
        peer.take(len(sent))
    assert seen == sent


def test_a_loop_runs_once_at_a_time() -> None:
    with LoopHarness() as peer, peer.running():
        peer.client.send(encode("PING", "1", b""))
        peer.receive()
        with pytest.raises(RuntimeError, match="is running already"):
            peer.loop.run()


def test_two_handlers_for_one_magic_code_are_refused() -> None:
    with LoopHarness() as peer, pytest.raises(ValueError, match="two handlers"):
        DatagramLoop(peer.sock.fileno(), {"A": print}, {"A": print}, peer.slot, print)


def test_memory_stays_flat() -> None:
    """A leaked message or body would be 200 bytes times 200,000."""
    app = App()
    app.handler("M")(lambda message: (message.sender, message.version, message.body)[2])
    datagrams = [encode("M", "1", bytes(100))] * 64
    with LoopHarness(app) as peer:

        def rounds(count: int) -> int:
            for _ in range(count):
                peer.send(*datagrams)
                peer.take(64)
                for _ in range(64):
                    peer.client.recv(200)
            gc.collect()
            return psutil.Process().memory_info().rss

        before = rounds(200)
        assert rounds(3000) - before < 4 << 20
