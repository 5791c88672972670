"""Coroutine handlers, in a supervised worker and in the test's event loop."""

import asyncio
import contextlib
import contextvars
import os
import signal
import socket
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from harness import forged_icmp, raw_client
from harness.eventually import eventually
from harness.loop_harness import LoopHarness
from harness.supervised import Supervised, send_signal
from peerd import App, Message, decode, encode
from peerd.serving import async_server
from peerd.serving.async_server import AsyncServer
from peerd.signals import HAND_OVER

# libuv opens a pipe for signals with its first loop, and keeps it.
uvloop.new_event_loop().close()


class Served(LoopHarness):
    """A peer in the test's own event loop; its client receives replies in any order."""

    def ask(self, magic: str, body: bytes = b"") -> None:
        self.client.send(encode(magic, "1", body))

    async def answer(self) -> bytes:
        return decode(await asyncio.get_running_loop().sock_recv(self.client, 1 << 16)).body

    async def answers(self, count: int) -> list[bytes]:
        return [await self.answer() for _ in range(count)]

    @property
    def raised(self) -> list[type[BaseException]]:
        return [type(error) for _, _, error in self.errors]


SEEN = contextvars.ContextVar[object]("SEEN", default=None)


def task() -> asyncio.Task[Any]:
    current = asyncio.current_task()
    assert current is not None
    return current


async def until(check: Callable[[], object]) -> None:
    while not check():
        await asyncio.sleep(0)


def serve(
    app: App,
    test: Callable[[Served], Coroutine[Any, Any, None]],
    before: Callable[[Served], object] = lambda peer: None,
    server: type[AsyncServer] = AsyncServer,
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Served:
    """Run a test against a server in the same event loop, then stop the server with SIGTERM."""
    with Served(app, on_icmp_error=None) as peer:
        peer.client.setblocking(False)
        before(peer)

        async def main() -> None:
            async with asyncio.timeout(100), asyncio.TaskGroup() as group:
                serving = asyncio.Event()
                group.create_task(server(peer.loop, app.timeouts_s).serve(serving.set, 5.0))
                await serving.wait()
                try:
                    await test(peer)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main())
        for number in (signal.SIGTERM, HAND_OVER):
            signal.signal(number, signal.SIG_DFL)  # uvloop leaves its handler, which keeps the loop
        assert peer.loop.suspended == 0
        return peer


def test_a_handler_that_does_not_wait_and_one_that_does() -> None:
    app = App()

    @app.handler("NOW")
    async def now(message: Message) -> bytes:
        return b"now " + message.body

    @app.handler("LATER")
    async def later(message: Message) -> Message:
        await asyncio.sleep(0.01)
        return Message("LATE", message.version, message.body)

    @app.handler("PUT")
    async def put(message: Message) -> None:
        await asyncio.sleep(0.01)

    @app.handler("PLAIN")
    def plain(message: Message) -> bytes:
        return b"plain"

    async def test(peer: Served) -> None:
        for magic in ("LATER", "PUT", "NOW", "PLAIN"):
            peer.ask(magic, b"x")
        assert await peer.answers(3) == [b"now x", b"plain", b"x"]
        await until(lambda: peer["handled"] == 4)

    serve(app, test)


def test_handlers_wait_at_a_time_each_with_context_variables_of_its_own() -> None:
    app = App()
    release = dict[bytes, asyncio.Future[None]]()

    @app.handler("WAIT")
    async def wait(message: Message) -> bytes:
        assert SEEN.get() is None
        SEEN.set(message.body)
        release[message.body] = asyncio.get_running_loop().create_future()
        await release[message.body]
        assert SEEN.get() == message.body
        return message.body

    async def test(peer: Served) -> None:
        for number in range(50):
            peer.ask("WAIT", b"%d" % number)
        await until(lambda: len(release) == 50)
        assert peer["handled"] == 0
        for body in reversed(list(release)):
            release[body].set_result(None)
            assert await peer.answer() == body

    serve(app, test)


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("which element?")

    __hash__ = None  # type: ignore[assignment]


def cancel_twice_and_once_back(kept: list[object]) -> None:
    task().cancel()
    task().cancel()
    task().uncancel()


MARKS: dict[str, Callable[[list[object]], object]] = {
    "cancelled": lambda kept: task().cancel(),
    "cancelled twice, once back": cancel_twice_and_once_back,
    "named": lambda kept: task().set_name("mine"),
    "callback": lambda kept: task().add_done_callback(kept.append),
    "kept": lambda kept: kept.append(task()),
    "weak reference": lambda kept: kept.append(weakref.ref(task())),
    "attribute": lambda kept: setattr(task(), "attribute", 1),
    "variable": lambda kept: SEEN.set(b"seen"),
    "variable that compares badly": lambda kept: SEEN.set(Incomparable()),
}


@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_a_message_leaves_no_mark_on_the_next(mark: Callable[[list[object]], None]) -> None:
    """Both messages wait in the socket's queue, so one turn dispatches them in a row."""
    app = App()
    kept = list[object]()
    tasks = weakref.WeakKeyDictionary[asyncio.Task[Any], bool]()

    @app.handler("MARK")
    async def mark_it(message: Message) -> bytes:
        kept.append(task().get_name())
        mark(kept)
        return b"marked"

    @app.handler("QUIET")
    async def mark_quietly(message: Message) -> bytes:
        mark(kept)
        return b"marked"

    @app.handler("NEXT")
    async def next_one(message: Message) -> bytes:
        traces = (task() in tasks, task() in kept, task().cancelling(), SEEN.get())
        assert traces == (False, False, 0, None), traces
        assert task().get_name() != "mine"
        assert not hasattr(task(), "attribute")
        assert all(ref() is not task() for ref in kept if isinstance(ref, weakref.ref))
        tasks[task()] = True
        await asyncio.sleep(0)
        return b"next"

    @app.handler("PLAIN")
    def plain(message: Message) -> bytes:
        return repr(asyncio.current_task()).encode()

    def send(peer: Served) -> None:
        for magic in ("MARK", "PLAIN", "NEXT", "QUIET", "NEXT") * 3:
            peer.ask(magic)

    async def test(peer: Served) -> None:
        received = Counter(await peer.answers(15))
        assert received == {b"marked": 6, b"next": 6, b"None": 3}

    peer = serve(app, test, send)
    assert peer.errors == []
    assert peer["handled"] == 15
    if mark is MARKS["callback"]:
        assert len([each for each in kept if isinstance(each, asyncio.Task)]) == 6


def test_a_task_that_a_handler_cancels_later_is_its_own() -> None:
    app = App()
    kept = list[asyncio.Task[Any]]()

    @app.handler("KEEP")
    async def keep(message: Message) -> None:
        kept.append(task())

    @app.handler("WAIT")
    async def wait(message: Message) -> bytes:
        await asyncio.sleep(0.02)
        return b"waited"

    async def test(peer: Served) -> None:
        for _ in range(5):
            peer.ask("KEEP")
            peer.ask("WAIT")
        await until(lambda: len(kept) == 5)
        cancelled = [each.cancel() for each in kept]
        assert await peer.answers(5) == [b"waited"] * 5
        assert all(each.done() for each in kept)
        assert len(set(kept)) == len(cancelled) == 5

    assert serve(app, test).errors == []


def test_a_worker_serves_after_ten_thousand_that_cancel_themselves() -> None:
    app = App()

    @app.handler("CANCEL")
    async def cancel(message: Message) -> None:
        task().cancel()

    @app.handler("WAIT")
    async def wait(message: Message) -> bytes:
        await asyncio.sleep(0)
        return b"waited"

    async def test(peer: Served) -> None:
        for number in range(5_000):
            peer.ask("CANCEL")
            peer.ask("WAIT")
            if number % 20 == 19:
                for _ in range(20):
                    assert await peer.answer() == b"waited"
        assert peer.slot.waiting == 0

    assert serve(app, test)["handled"] == 10_000


def test_a_handler_runs_as_in_any_task_from_its_first_step_on() -> None:
    """Most handlers wait after their task was cancelled, or after their timeout has expired."""
    app = App()
    tasks = list[object]()
    inner_tasks = list[asyncio.Task[None]]()

    @app.handler("TIMEOUT")
    async def times_out(message: Message) -> bytes:
        tasks.append(asyncio.current_task())
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            tasks.append(asyncio.current_task())
            return b"timeout"
        return b"slept"

    @app.handler("CANCEL")
    async def cancel(message: Message) -> bytes:
        task().cancel()
        await asyncio.sleep(60)
        return b"never"

    @app.handler("CAUGHT")
    async def caught(message: Message) -> bytes:
        task().cancel()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            task().uncancel()
            await asyncio.sleep(0)
            return b"caught"
        return b"slept"

    @app.handler("OVER")
    async def over(message: Message) -> bytes:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(60)
        except TimeoutError:
            return b"over %d" % task().cancelling()
        return b"slept"

    @app.handler("INNER")
    async def inner(message: Message) -> bytes:
        inner_tasks.append(asyncio.create_task(asyncio.sleep(60)))
        task().cancel()
        try:
            await inner_tasks[0]
        except asyncio.CancelledError:
            return b"inner %d" % inner_tasks[0].cancelled()
        return b"slept"

    @app.handler("SHIELD")
    async def shield(message: Message) -> bytes:
        inner_tasks.append(asyncio.create_task(asyncio.sleep(0.05)))
        asyncio.get_running_loop().call_soon(task().cancel)
        try:
            await asyncio.shield(inner_tasks[1])
        except asyncio.CancelledError:
            await inner_tasks[1]
            return b"shielded %d" % inner_tasks[1].cancelled()
        return b"slept"

    @app.handler("GROUP")
    async def group(message: Message) -> bytes:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(asyncio.sleep(0, b"a"))
            second = group.create_task(asyncio.sleep(0.001, b"b"))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(60))
                raise ValueError
        except ExceptionGroup:
            return b"group %s%s %d" % (first.result(), second.result(), task().cancelling())

    async def test(peer: Served) -> None:
        peer.ask("CANCEL")  # has no answer
        for magic, reply in {
            "TIMEOUT": b"timeout",
            "CAUGHT": b"caught",
            "OVER": b"over 0",
            "INNER": b"inner 1",
            "SHIELD": b"shielded 0",
            "GROUP": b"group ab 0",
        }.items():
            peer.ask(magic)
            assert await peer.answer() == reply

    peer = serve(app, test)
    assert peer.raised == [asyncio.CancelledError]
    assert peer["handled"] == 7
    assert tasks[0] is tasks[1] is not None


def test_handlers_that_do_not_wait_share_a_task() -> None:
    """Reuse makes them cheap: a spare is discarded only if its message could have left a mark."""
    app = App()
    made = list[object]()

    class Counting(AsyncServer):
        def _new_task(self, *args: Any) -> asyncio.Task[None]:
            made.append(args)
            return super()._new_task(*args)

    @app.handler("N")
    async def number(message: Message) -> bytes:
        asyncio.current_task()
        return message.body

    async def test(peer: Served) -> None:
        for i in range(100):
            peer.ask("N", b"%d" % i)
            assert await peer.answer() == b"%d" % i

    serve(app, test, server=Counting)
    assert len(made) <= 2


@pytest.mark.parametrize("waits", [False, True])
def test_a_handler_that_raises(waits: bool) -> None:
    app = App()

    @app.handler("BAD")
    async def bad(message: Message) -> bytes:
        if waits:
            await asyncio.sleep(0)
        raise ValueError("bad")

    @app.handler("TYPE")
    async def wrong(message: Message) -> bytes:
        if waits:
            await asyncio.sleep(0)
        return 3  # type: ignore[return-value]

    @app.handler("GOOD")
    async def good(message: Message) -> bytes:
        return b"good"

    async def test(peer: Served) -> None:
        peer.ask("BAD")
        peer.ask("TYPE")
        await until(lambda: len(peer.errors) == 2)
        peer.ask("GOOD")
        assert await peer.answer() == b"good"

    peer = serve(app, test)
    assert peer.raised == [ValueError, TypeError]
    assert peer["handler_errors"] == 2
    assert peer["handled"] == 3


def test_a_handler_that_awaits_a_cancelled_future_loses_only_its_own_message() -> None:
    """It raises in its first step, in the middle of a batch."""
    app = App()

    @app.handler("N")
    async def number(message: Message) -> bytes:
        if message.body == b"3":
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled
        return message.body

    def send_twenty(peer: Served) -> None:
        for i in range(20):
            peer.ask("N", b"%d" % i)

    async def test(peer: Served) -> None:
        received = await peer.answers(19)
        assert received == [b"%d" % i for i in range(20) if i != 3]
        # The last message is counted after its reply.
        await until(lambda: not peer.slot.unfinished)

    # All messages are in the queue before the server starts.
    peer = serve(app, test, send_twenty)
    assert peer.raised == [asyncio.CancelledError]
    assert peer["handler_errors"] == 1
    assert peer["handled"] == peer["rx_messages"] == 20


@pytest.mark.parametrize("waits", [False, True])
def test_a_base_exception_ends_the_server(waits: bool) -> None:
    class EndOfTheWorld(BaseException):
        pass

    app = App()

    @app.handler("END")
    async def end(message: Message) -> bytes:
        raise EndOfTheWorld

    async def test(peer: Served) -> None:
        if waits:
            peer.ask("END")
        await asyncio.sleep(5)

    with pytest.raises(BaseExceptionGroup) as raised:
        serve(app, test, lambda peer: None if waits else peer.ask("END"))
    assert raised.group_contains(EndOfTheWorld)


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("is_forged", [False, True])
def test_an_icmp_error_does_not_delay_later_messages(
    new_event_loop: Callable[[], asyncio.AbstractEventLoop], is_forged: bool
) -> None:
    """libuv stops polling a descriptor at its first POLLERR: only heartbeats would read then."""
    app = App()

    @app.handler("NOW")
    async def now(message: Message) -> bytes:
        return message.body

    @app.handler("LATER")
    async def later(message: Message) -> bytes:
        await asyncio.sleep(0)
        return message.body

    async def cause_icmp_error(peer: Served) -> None:
        errors = peer["icmp_errors"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.connect(peer.client.getpeername())
            if is_forged:
                with forged_icmp.raw_socket(socket.AF_INET) as raw:
                    port, other_port = peer.client.getpeername()[1], gone.getsockname()[1]
                    forged_icmp.forge_icmp_error(raw, 3, 3, port, other_port)
            else:
                gone.send(encode("LATER", "1", b"gone"))
        await until(lambda: peer["icmp_errors"] > errors)

    async def test(peer: Served) -> None:
        took_s = list[float]()
        for number in range(20):
            await cause_icmp_error(peer)
            for magic in ("NOW", "LATER"):
                begun_s = time.monotonic()
                peer.ask(magic, b"%d" % number)
                assert await peer.answer() == b"%d" % number
                took_s.append(time.monotonic() - begun_s)
        # A heartbeat would have read each of these after HEARTBEAT_INTERVAL_S.
        assert statistics.median(took_s) < async_server.HEARTBEAT_INTERVAL_S / 10

    serve(app, test, new_event_loop=new_event_loop)


def test_a_bounded_number_of_handlers_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile the heartbeat is written, and further messages stay in the queue, during a drain, too.

    The server logs which magic codes wait: at the limit, then once per interval.
    """
    monkeypatch.setattr(async_server, "MAX_WAITING", 10)
    monkeypatch.setattr(async_server, "FULL_LOG_INTERVAL_S", 0.3)
    app = App()
    gate = asyncio.Event()
    waiting = [0]

    @app.handler("WAIT")
    async def wait(message: Message) -> bytes:
        waiting[0] += 1
        assert waiting[0] < 50  # the limit is exceeded by at most one batch
        await gate.wait()
        waiting[0] -= 1
        return b""

    async def test(peer: Served) -> None:
        for _ in range(200):
            peer.ask("WAIT")
            await asyncio.sleep(0)
        slot = peer.slot
        assert slot.waiting == slot.waiting_by_magic["WAIT"] == waiting[0] >= 10
        assert 0 < slot.not_reading_since_ns <= time.monotonic_ns()
        begun_ns = slot.heartbeat_ns
        while slot.heartbeat_ns < begun_ns + 500_000_000 or len(caplog.records) < 2:
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.1, gate.set)  # in the drain

    peer = serve(app, test)
    assert peer.errors == []
    assert peer["handled"] == 200
    assert (peer.slot.waiting, peer.slot.waiting_by_magic) == (0, {})
    assert peer.slot.not_reading_since_ns == 0
    assert all("'WAIT': " in record.getMessage() for record in caplog.records)
    assert "max_waiting=" in caplog.text


@pytest.mark.parametrize("is_stubborn", [False, True])
def test_a_timeout_cancels_a_handler(is_stubborn: bool) -> None:
    app = App()

    @app.handler("SLOW", timeout=0.05)
    async def slow(message: Message) -> bytes | None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if not is_stubborn:
                raise
        return b"late, but here"

    @app.handler("QUICK", timeout=60)
    async def quick(message: Message) -> bytes:
        await asyncio.sleep(0)
        return b"quick"

    async def test(peer: Served) -> None:
        peer.ask("SLOW")
        peer.ask("QUICK")
        assert await peer.answer() == b"quick"
        if is_stubborn:
            assert await peer.answer() == b"late, but here"
        await until(lambda: not peer.slot.unfinished)

    peer = serve(app, test)
    assert peer.raised == [TimeoutError] * (not is_stubborn)
    assert peer["handler_errors"] == (not is_stubborn)
    assert not is_stubborn or not peer.errors


def test_messages_above_max_waiting_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Only messages of this magic code are dropped; each is counted, and the log line has their number."""
    app = App()
    gate = asyncio.Event()

    @app.handler("ASK", max_waiting=3)
    async def ask(message: Message) -> bytes:
        await gate.wait()
        return message.body

    @app.handler("OTHER")
    async def other(message: Message) -> bytes:
        await asyncio.sleep(0)
        return b"other"

    async def test(peer: Served) -> None:
        for number in range(8):
            peer.ask("ASK", b"%d" % number)
        peer.ask("OTHER")
        assert await peer.answer() == b"other"
        counters = peer.slot.counters()
        assert (counters["rx_max_waiting"], counters["handled"]) == (5, 6)
        assert peer.slot.waiting_by_magic == {"ASK": 3}
        while not caplog.records:
            await asyncio.sleep(0.01)
        gate.set()
        assert await peer.answers(3) == [b"0", b"1", b"2"]
        peer.ask("ASK", b"again")
        assert await peer.answer() == b"again"

    serve(app, test)
    assert "dropped 5 messages for 'ASK'" in caplog.text


def test_a_stop_waits_for_handlers_under_way() -> None:
    app = App()

    @app.handler("SLOW")
    async def slow(message: Message) -> bytes:
        await asyncio.sleep(0.2)
        return b"done"

    answer = list[asyncio.Task[bytes]]()

    async def test(peer: Served) -> None:
        peer.ask("SLOW")
        await until(lambda: peer["rx_messages"])
        answer.append(asyncio.create_task(peer.answer()))

    serve(app, test)
    assert answer[0].result() == b"done"


def test_a_timer_of_the_app_runs_through_a_flood() -> None:
    """100 ticks of 5 ms while a sender floods: their pace varies, but all of them come."""
    app = App()

    @app.handler("FLOOD")
    async def flood(message: Message) -> None: ...

    ticks = list[int]()

    async def test(peer: Served) -> None:
        async def tick() -> None:
            for number in range(100):
                await asyncio.sleep(0.005)
                ticks.append(number)

        ticking = asyncio.create_task(tick())
        while not ticking.done():
            for _ in range(200):
                with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                    peer.ask("FLOOD", bytes(20))
            await asyncio.sleep(0)

    peer = serve(app, test)
    assert len(ticks) == 100
    assert peer["rx_messages"] > 1000


APP = """
import asyncio, peerd
app = peerd.App()

@app.handler("CHAT")
async def chat(message):
    await asyncio.sleep(0.01)
    return b"hello " + message.body
"""


def test_an_async_app_under_the_supervisor(supervised: Supervised) -> None:
    running = supervised.start(peers=2, app=APP).wait_registered()
    for port in running.ports:
        assert raw_client.request(port, b"CHAT", b"you")[2] == b"hello you"
    send_signal(running.peer(0)["pid"], signal.SIGKILL)
    eventually(
        lambda: raw_client.request(running.ports[0], b"CHAT", b"again", 0.5)[2] == b"hello again"
    )
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert "Traceback" not in running.err
