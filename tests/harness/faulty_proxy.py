"""A TCP proxy that fails the way networks and middleboxes do, driven by a seeded random generator.

- delayed: bytes arrive late, in order.
- cut: connections are reset or ended; new ones are closed as soon as they are accepted.
- half-open: connections stay open and new ones are accepted, but all bytes are discarded.
- garbage: the client gets bytes that etcd never sent, on old connections and on new ones.

A connection that has lost bytes or received garbage is reset once the fault is over, because TCP never loses
bytes in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from enum import Enum
from typing import Any

from harness.eventually import eventually
from harness.ports import free_ports
from peerd.address import Address

_FAULT_S = (0.01, 0.08)
_MAX_DELAY_S = 0.03
_CHUNK_BYTES = 1 << 20
_CALL_TIMEOUT_S = 60.0
_RESET = struct.pack("ii", 1, 0)


class Fault(Enum):
    NONE = "none"
    DELAYED = "delayed"
    CUT = "cut"
    HALF_OPEN = "half-open"
    GARBAGE = "garbage"


class FaultyProxy:
    """Between a client and ``target``, for a ``with`` block. It runs in a thread of this process."""

    def __init__(self, target: Address, seed: int) -> None:
        self.address = Address("127.0.0.1", free_ports())
        self.bytes_to_client = 0  # from etcd, in total
        self.connections = 0  # accepted in total
        self._target = target
        self._schedule = random.Random(seed)
        self._random = random.Random(seed)  # drawn from as traffic arrives, so in no fixed order
        self._fault = Fault.NONE
        self._pairs: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy")

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}"

    def begin(self, fault: Fault) -> None:
        """Inject the fault until ``end()`` or the next ``begin()``."""
        self._run(self._set_fault(fault))

    def end(self) -> None:
        """Pass everything again. Damaged connections are reset."""
        self.begin(Fault.NONE)

    def run_faults(self, count: int, reconnected_within_s: float = 1.0) -> dict[Fault, int]:
        """Inject ``count`` faults, one after the other, half of them only after the client has recovered from
        the previous one. Returns the number of faults of each kind. No fault is active at the end.

        ``reconnected_within_s``: how long to wait for the recovery, which is not required.
        """
        kinds = [fault for fault in Fault if fault is not Fault.NONE]
        done: dict[Fault, int] = dict.fromkeys(kinds, 0)
        for _ in range(count):
            fault = self._schedule.choice(kinds)
            self.begin(fault)
            self._run(asyncio.sleep(self._schedule.uniform(*_FAULT_S)))
            self.end()
            done[fault] += 1
            if self._schedule.random() < 0.5:
                before = self.bytes_to_client
                with contextlib.suppress(AssertionError):
                    eventually(lambda: self.bytes_to_client > before, reconnected_within_s)  # noqa: B023
        return done

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._run(self._close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it in the proxy's thread. Called from other threads."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    # In the proxy's thread

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, *self.address, limit=_CHUNK_BYTES)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for pair in list(self._pairs):
            pair.reset()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _set_fault(self, fault: Fault) -> None:
        self._fault = fault
        for pair in list(self._pairs):
            if pair.spoilt:
                pair.reset()
            elif fault is Fault.CUT:
                pair.reset() if self._random.random() < 0.5 else pair.finish()
            elif fault is Fault.GARBAGE:
                pair.spoilt = True
                pair.to_client.write(self._garbage())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._fault is Fault.CUT:
            writer.transport.abort()
            return
        pair = _Pair(writer)
        self._pairs.add(pair)
        try:
            await self._serve(pair, reader)
        except* (OSError, asyncio.CancelledError):
            # etcd does not run, either end has reset its connection, or _close() cancelled this task: asyncio
            # would log a cancelled handler as an error.
            pass
        finally:
            self._pairs.discard(pair)
            pair.reset()

    async def _serve(self, pair: _Pair, reader: asyncio.StreamReader) -> None:
        if self._fault in (Fault.HALF_OPEN, Fault.GARBAGE):
            pair.spoilt = True
            if self._fault is Fault.GARBAGE:
                pair.to_client.write(self._garbage())
            await self._pump(pair, reader, None)
            return
        upstream, pair.to_etcd = await asyncio.open_connection(*self._target, limit=_CHUNK_BYTES)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pump(pair, reader, pair.to_etcd))
            group.create_task(self._pump(pair, upstream, pair.to_client))

    async def _pump(
        self, pair: _Pair, source: asyncio.StreamReader, target: asyncio.StreamWriter | None
    ) -> None:
        """Until ``source`` ends; then close both connections."""
        while data := await source.read(_CHUNK_BYTES):
            if self._fault is Fault.DELAYED:
                await asyncio.sleep(self._random.uniform(0, _MAX_DELAY_S))
            if self._fault is Fault.HALF_OPEN:
                pair.spoilt = True
            if target is None or pair.spoilt:
                continue
            if target is pair.to_client:
                self.bytes_to_client += len(data)
            target.write(data)
            await target.drain()
        pair.finish()

    def _garbage(self) -> bytes:
        return self._random.choice(
            [
                self._random.randbytes(self._random.randrange(1, 4096)),
                b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\nnope",
                b"\x15\x03\x03\x00\x02\x02\x28",  # a TLS alert
                bytes(64),
            ]
        )


class _Pair:
    """The client's connection and the corresponding one to etcd."""

    def __init__(self, to_client: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self.to_etcd: asyncio.StreamWriter | None = None
        self.spoilt = False  # it has lost bytes or received garbage

    def finish(self) -> None:
        """Close both in an orderly way, after all buffered bytes."""
        for writer in filter(None, (self.to_client, self.to_etcd)):
            writer.close()

    def reset(self) -> None:
        for writer in filter(None, (self.to_client, self.to_etcd)):
            sock: socket.socket | None = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
