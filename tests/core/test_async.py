"""Coroutine handlers, in a supervised worker and in the test's event loop."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

import pytest
import uvloop

from harness import forged_icmp, raw_client
from harness.eventually import eventually
from harness.supervised import Supervised, send_signal
from peerd import App, Message, decode, encode
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard, Slot
from peerd.serving import async_server
from peerd.serving.async_server import AsyncServer
from peerd.signals import HAND_OVER

# libuv opens a pipe for signals with its first loop, and keeps it.
uvloop.new_event_loop().close()


class Client:
    """A test's side while the server runs: sends messages, and receives replies in any order."""

    def __init__(self, address: tuple[str, int], slot: Slot) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.connect(address)
        self.sock.setblocking(False)
        self.slot = slot
        self.errors: list[BaseException] = []

    def send(self, magic: str, body: bytes = b"") -> None:
        self.sock.send(encode(magic, "1", body))

    async def receive(self) -> bytes:
        datagram = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
        return decode(datagram).body


def serve(
    app: App,
    test: Callable[[Client], Coroutine[Any, Any, None]],
    before: Callable[[Client], object] = lambda client: None,
    server: type[AsyncServer] = AsyncServer,
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Client:
    """Run a test against a server in the same event loop, then stop the server with SIGTERM."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        slot = Scoreboard(1).slots[0]
        client = Client(sock.getsockname(), slot)
        before(client)
        core = DatagramLoop(
            sock.fileno(),
            app.handlers,
            app.batch_handlers,
            slot,
            lambda _magic, _sender, error: client.errors.append(error),
            coroutine_handlers=app.coroutine_handlers,
            max_waiting=app.max_waiting,
        )

        async def main() -> None:
            async with asyncio.timeout(100), asyncio.TaskGroup() as group:
                serving = asyncio.Event()
                group.create_task(server(core, app.timeouts_s).serve(serving.set, 5.0))
                await serving.wait()
                try:
                    await test(client)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)

        with client.sock, asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main())
        for number in (signal.SIGTERM, HAND_OVER):
            signal.signal(number, signal.SIG_DFL)  # uvloop leaves its handler, which keeps the loop
        assert core.suspended == 0
        return client


def test_a_handler_that_does_not_wait_and_one_that_does() -> None:
    app = App()

    @app.handler("NOW")
    async def now(message: Message) -> bytes:
        return b"now " + message.body

    @app.handler("LATER")
    async def later(message: Message) -> Message:
        await asyncio.sleep(0.01)
        return Message("LATE", message.version, message.body)

    @app.handler("PLAIN")
    def plain(message: Message) -> bytes:
        return b"plain"

    async def test(client: Client) -> None:
        for magic in ("LATER", "NOW", "PLAIN"):
            client.send(magic, b"x")
        assert [await client.receive() for _ in range(3)] == [b"now x", b"plain", b"x"]

    assert serve(app, test).slot.counters()["handled"] == 3


def test_replies_are_concurrent_and_go_to_their_senders() -> None:
    app = App()
    release = dict[bytes, asyncio.Future[None]]()

    @app.handler("WAIT")
    async def wait(message: Message) -> bytes:
        release[message.body] = asyncio.get_running_loop().create_future()
        await release[message.body]
        return message.body

    async def test(client: Client) -> None:
        for number in range(50):
            client.send("WAIT", b"%d" % number)
        while len(release) < 50:
            await asyncio.sleep(0)
        assert client.slot.counters()["handled"] == 0
        order = sorted(release, key=lambda body: -int(body))
        for body in order:
            release[body].set_result(None)
            assert await client.receive() == body

    serve(app, test)


def test_a_handler_has_a_task_from_its_first_step_on() -> None:
    app = App()
    tasks = list[object]()

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

    @app.handler("GROUP")
    async def group(message: Message) -> bytes:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(asyncio.sleep(0, b"a"))
            second = group.create_task(asyncio.sleep(0.001, b"b"))
        return first.result() + second.result()

    async def test(client: Client) -> None:
        client.send("TIMEOUT")
        assert await client.receive() == b"timeout"
        client.send("GROUP")
        assert await client.receive() == b"ab"

    serve(app, test)
    assert tasks[0] is not None
    assert tasks[0] is tasks[1]


def test_each_message_has_context_variables_of_its_own() -> None:
    app = App()
    variable = contextvars.ContextVar[bytes]("variable", default=b"unset")

    @app.handler("SET")
    async def set_it(message: Message) -> bytes:
        before = variable.get()
        variable.set(message.body)
        return before

    @app.handler("KEEP")
    async def keep(message: Message) -> bytes:
        variable.set(message.body)
        await asyncio.sleep(0)
        return variable.get()

    async def test(client: Client) -> None:
        for number in range(3):
            client.send("SET", b"%d" % number)
        assert [await client.receive() for _ in range(3)] == [b"unset"] * 3
        for number in range(3):
            client.send("KEEP", b"%d" % number)
        assert {await client.receive() for _ in range(3)} == {b"0", b"1", b"2"}

    serve(app, test)


def task() -> asyncio.Task[Any]:
    current = asyncio.current_task()
    assert current is not None
    return current


SEEN = contextvars.ContextVar[object]("SEEN", default=None)


def cancel_oneself(kept: list[object]) -> None:
    task().cancel()


def cancel_twice_and_once_back(kept: list[object]) -> None:
    task().cancel()
    task().cancel()
    task().uncancel()


def name_oneself(kept: list[object]) -> None:
    task().set_name("mine")


def be_called_back(kept: list[object]) -> None:
    task().add_done_callback(kept.append)


def keep_oneself(kept: list[object]) -> None:
    kept.append(task())


def keep_a_weak_reference(kept: list[object]) -> None:
    kept.append(weakref.ref(task()))


def keep_an_attribute(kept: list[object]) -> None:
    task().attribute = 1  # type: ignore[attr-defined]


def set_a_variable(kept: list[object]) -> None:
    SEEN.set(b"seen")


def set_a_variable_that_compares_badly(kept: list[object]) -> None:
    class Incomparable:
        def __eq__(self, other: object) -> bool:
            raise ValueError("which element?")

        __hash__ = None  # type: ignore[assignment]

    SEEN.set(Incomparable())


@pytest.mark.parametrize(
    "mark",
    [
        cancel_oneself,
        cancel_twice_and_once_back,
        name_oneself,
        be_called_back,
        keep_oneself,
        keep_a_weak_reference,
        keep_an_attribute,
        set_a_variable,
        set_a_variable_that_compares_badly,
    ],
)
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

    def send(client: Client) -> None:
        for magic in ("MARK", "PLAIN", "NEXT", "QUIET", "NEXT") * 3:
            client.send(magic)

    async def test(client: Client) -> None:
        received = Counter([await client.receive() for _ in range(15)])
        assert received == {b"marked": 6, b"next": 6, b"None": 3}

    client = serve(app, test, send)
    assert client.errors == []
    assert client.slot.counters()["handled"] == 15
    if mark is be_called_back:
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

    async def test(client: Client) -> None:
        for _ in range(5):
            client.send("KEEP")
            client.send("WAIT")
        while len(kept) < 5:
            await asyncio.sleep(0)
        cancelled = [each.cancel() for each in kept]
        assert [await client.receive() for _ in range(5)] == [b"waited"] * 5
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

    async def test(client: Client) -> None:
        for number in range(5_000):
            client.send("CANCEL")
            client.send("WAIT")
            if number % 20 == 19:
                for _ in range(20):
                    assert await client.receive() == b"waited"
        assert client.slot.waiting == 0

    assert serve(app, test).slot.counters()["handled"] == 10_000


def test_cancellation_in_the_first_step_is_that_of_any_task() -> None:
    """Each handler waits after its task was cancelled, or after its timeout has expired."""
    app = App()
    inner_tasks = list[asyncio.Task[None]]()

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
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(60))
                raise ValueError
        except ExceptionGroup:
            return b"group %d" % task().cancelling()

    async def test(client: Client) -> None:
        for magic, reply in {
            "CAUGHT": b"caught",
            "OVER": b"over 0",
            "INNER": b"inner 1",
            "SHIELD": b"shielded 0",
            "GROUP": b"group 0",
        }.items():
            client.send(magic)
            assert await client.receive() == reply

    assert serve(app, test).errors == []


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

    async def test(client: Client) -> None:
        for i in range(100):
            client.send("N", b"%d" % i)
            assert await client.receive() == b"%d" % i

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

    async def test(client: Client) -> None:
        client.send("BAD")
        client.send("TYPE")
        while len(client.errors) < 2:
            await asyncio.sleep(0)
        client.send("GOOD")
        assert await client.receive() == b"good"

    client = serve(app, test)
    assert [type(error) for error in client.errors] == [ValueError, TypeError]
    assert client.slot.counters()["handler_errors"] == 2
    assert client.slot.counters()["handled"] == 3


def test_a_handler_that_cancels_itself_gives_no_answer() -> None:
    app = App()

    @app.handler("CANCEL")
    async def cancel(message: Message) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(60)
        return b"never"

    @app.handler("NEXT")
    async def after(message: Message) -> bytes:
        await asyncio.sleep(0)
        return b"next"

    async def test(client: Client) -> None:
        client.send("CANCEL")
        client.send("NEXT")
        assert await client.receive() == b"next"

    assert serve(app, test).slot.counters()["handled"] == 2


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

    def send_twenty(client: Client) -> None:
        for i in range(20):
            client.send("N", b"%d" % i)

    async def test(client: Client) -> None:
        received = [await client.receive() for _ in range(19)]
        assert received == [b"%d" % i for i in range(20) if i != 3]
        # The last message is counted after its reply.
        while client.slot.unfinished:
            await asyncio.sleep(0)

    # All messages are in the queue before the server starts.
    client = serve(app, test, send_twenty)
    assert [type(error) for error in client.errors] == [asyncio.CancelledError]
    assert client.slot.counters()["handler_errors"] == 1
    assert client.slot.counters()["handled"] == client.slot.counters()["rx_messages"] == 20


@pytest.mark.parametrize("waits", [False, True])
def test_a_base_exception_ends_the_server(waits: bool) -> None:
    class EndOfTheWorld(BaseException):
        pass

    app = App()

    @app.handler("END")
    async def end(message: Message) -> bytes:
        raise EndOfTheWorld

    async def test(client: Client) -> None:
        if waits:
            client.send("END")
        await asyncio.sleep(5)

    with pytest.raises(BaseExceptionGroup) as raised:
        serve(app, test, lambda client: None if waits else client.send("END"))
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

    async def cause_icmp_error(client: Client) -> None:
        errors = client.slot.counters()["icmp_errors"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.connect(client.sock.getpeername())
            if is_forged:
                with forged_icmp.raw_socket(socket.AF_INET) as raw:
                    port, other_port = client.sock.getpeername()[1], gone.getsockname()[1]
                    forged_icmp.forge_icmp_error(raw, 3, 3, port, other_port)
            else:
                gone.send(encode("LATER", "1", b"gone"))
        while client.slot.counters()["icmp_errors"] == errors:
            await asyncio.sleep(0)

    async def test(client: Client) -> None:
        took_s = list[float]()
        for number in range(20):
            await cause_icmp_error(client)
            for magic in ("NOW", "LATER"):
                begun_s = time.monotonic()
                client.send(magic, b"%d" % number)
                assert await client.receive() == b"%d" % number
                took_s.append(time.monotonic() - begun_s)
        # A heartbeat would have read each of these after HEARTBEAT_INTERVAL_S.
        assert statistics.median(took_s) < async_server.HEARTBEAT_INTERVAL_S / 10

    serve(app, test, new_event_loop=new_event_loop)


def test_a_message_without_a_reply_is_handled_when_its_handler_ends() -> None:
    app = App()

    @app.handler("PUT")
    async def put(message: Message) -> None:
        await asyncio.sleep(0.01)

    async def test(client: Client) -> None:
        for _ in range(10):
            client.send("PUT")
        while client.slot.counters()["handled"] < 10:
            await asyncio.sleep(0)

    serve(app, test)


def test_a_bounded_number_of_handlers_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the heartbeat is written and further messages stay in the queue, during a drain, too."""
    monkeypatch.setattr(async_server, "MAX_WAITING", 10)
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

    async def test(client: Client) -> None:
        for _ in range(200):
            client.send("WAIT")
            await asyncio.sleep(0)
        slot = client.slot
        assert slot.waiting == slot.waiting_by_magic["WAIT"] == waiting[0] >= 10
        assert 0 < slot.not_reading_since_ns <= time.monotonic_ns()
        begun_ns = client.slot.heartbeat_ns
        while client.slot.heartbeat_ns < begun_ns + 500_000_000:
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.1, gate.set)  # in the drain

    client = serve(app, test)
    assert client.errors == []
    assert client.slot.counters()["handled"] == 200
    assert (client.slot.waiting, client.slot.waiting_by_magic) == (0, {})
    assert client.slot.not_reading_since_ns == 0


def test_a_full_server_logs_which_magic_codes_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs at the limit, then once per interval."""
    monkeypatch.setattr(async_server, "MAX_WAITING", 4)
    monkeypatch.setattr(async_server, "FULL_LOG_INTERVAL_S", 0.3)
    app = App()
    gate = asyncio.Event()

    @app.handler("HANG")
    async def hang(message: Message) -> None:
        await gate.wait()

    async def test(client: Client) -> None:
        for _ in range(10):
            client.send("HANG")
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)
        gate.set()

    serve(app, test)
    assert all("'HANG': " in record.getMessage() for record in caplog.records)
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

    async def test(client: Client) -> None:
        client.send("SLOW")
        client.send("QUICK")
        assert await client.receive() == b"quick"
        if is_stubborn:
            assert await client.receive() == b"late, but here"
        while client.slot.unfinished:
            await asyncio.sleep(0)

    client = serve(app, test)
    assert [type(error) for error in client.errors] == [TimeoutError] * (not is_stubborn)
    assert client.slot.counters()["handler_errors"] == (not is_stubborn)
    assert not is_stubborn or not client.errors


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

    async def test(client: Client) -> None:
        for number in range(8):
            client.send("ASK", b"%d" % number)
        client.send("OTHER")
        assert await client.receive() == b"other"
        counters = client.slot.counters()
        assert (counters["rx_max_waiting"], counters["handled"]) == (5, 6)
        assert client.slot.waiting_by_magic == {"ASK": 3}
        while not caplog.records:
            await asyncio.sleep(0.01)
        gate.set()
        assert [await client.receive() for _ in range(3)] == [b"0", b"1", b"2"]
        client.send("ASK", b"again")
        assert await client.receive() == b"again"

    serve(app, test)
    assert "dropped 5 messages for 'ASK'" in caplog.text


def test_a_stop_waits_for_handlers_under_way() -> None:
    app = App()

    @app.handler("SLOW")
    async def slow(message: Message) -> bytes:
        await asyncio.sleep(0.2)
        return b"done"

    received = list[bytes]()

    async def test(client: Client) -> None:
        client.send("SLOW")
        while client.slot.counters()["rx_messages"] == 0:
            await asyncio.sleep(0)
        client.receiving = asyncio.create_task(collect(client))  # type: ignore[attr-defined]

    async def collect(client: Client) -> None:
        received.append(await client.receive())

    serve(app, test)
    assert received == [b"done"]


def test_a_timer_of_the_app_runs_through_a_flood() -> None:
    """100 ticks of 5 ms while a sender floods: their pace varies, but all of them come."""
    app = App()

    @app.handler("FLOOD")
    async def flood(message: Message) -> None: ...

    ticks = list[int]()

    async def test(client: Client) -> None:
        async def tick() -> None:
            for number in range(100):
                await asyncio.sleep(0.005)
                ticks.append(number)

        ticking = asyncio.create_task(tick())
        while not ticking.done():
            for _ in range(200):
                with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                    client.send("FLOOD", bytes(20))
            await asyncio.sleep(0)

    client = serve(app, test)
    assert len(ticks) == 100
    assert client.slot.counters()["rx_messages"] > 1000


def test_messages_queued_before_the_start_are_served() -> None:
    app = App()

    @app.handler("EARLY")
    async def early(message: Message) -> bytes:
        return message.body

    async def test(client: Client) -> None:
        assert await client.receive() == b"early"

    serve(app, test, before=lambda client: client.send("EARLY", b"early"))


def test_an_async_app_under_the_supervisor(supervised: Supervised, tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(
        "import asyncio, peerd\napp = peerd.App()\n"
        "@app.handler('CHAT')\nasync def chat(message):\n"
        "    await asyncio.sleep(0.01)\n    return b'hello ' + message.body\n"
    )
    running = supervised.start("--app=chat:app", peers=2)
    running.wait_registered()
    for port in running.ports:
        assert raw_client.request(port, b"CHAT", b"you")[2] == b"hello you"
    send_signal(running.peer(0)["pid"], signal.SIGKILL)
    eventually(
        lambda: raw_client.request(running.ports[0], b"CHAT", b"again", 0.5)[2] == b"hello again"
    )
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert "Traceback" not in running.err
