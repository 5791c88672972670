"""One peer in the calling process: no supervisor, no fork."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Self

from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard
from peerd.errors import SettingsError
from peerd.serving.app import App, builtin_app
from peerd.serving.worker import make_loop
from peerd.settings import ANONYMOUS, DEFAULT_PREFIX, EtcdAccess, SupervisorSettings
from peerd.supervisor.socket_queue import KernelDrops
from peerd.supervisor.sockets import bind_all

DRAIN_S = 1.0


class Peer:
    """Binds a UDP port, serves an App on it and, if asked, keeps a record in etcd.

    In a thread::

        with Peer(app, port=5001, peer_id="seedId", etcd="http://localhost:23790") as peer:
            ...

    or in the foreground, until :meth:`stop` (from another thread or a signal handler) or Ctrl-C::

        Peer(app, port=5001).serve_forever()

    On close the record is revoked first, then what the socket's queue holds is served. Handlers share
    the GIL with the rest of the process; ``peerd supervise`` runs peers in their own processes, which
    are restarted after a crash.
    """

    def __init__(
        self,
        app: App | None = None,
        *,
        host: str = "localhost",
        port: int = 5001,
        peer_id: str | None = None,
        advertise: str | None = None,
        partition_key: str | None = None,
        metadata: Mapping[str, object] | None = None,
        etcd: str | None = None,
        access: EtcdAccess = ANONYMOUS,
        prefix: str = DEFAULT_PREFIX,
        lease_ttl_s: int = 10,
        recv_buffer_bytes: int = SupervisorSettings.recv_buffer_bytes,
    ) -> None:
        """Open nothing yet.

        ``app``: None for the built-in one (PING, ECHO). ``etcd``: the endpoint of the registry; None
        to register nowhere. ``access``: its login and certificates. ``advertise``: the host in the
        record; None for ``host``, or this machine's name when that is a wildcard. Raises SettingsError
        for a port out of range, and for an app with coroutine handlers, which need a worker process.
        """
        if app is not None and app.coroutine_handlers:
            raise SettingsError(
                "a Peer calls plain functions only: run an app with async handlers by "
                "'peerd supervise --app module:attr'"
            )
        settings = SupervisorSettings(
            host=host, base_port=port, advertise=advertise, recv_buffer_bytes=recv_buffer_bytes
        )
        self._app = app or builtin_app()
        self._settings = settings
        self.peer_id = peer_id or settings.peer_id(0)
        self.port = port
        self._partition_key = partition_key
        self._metadata = metadata or {}
        self._etcd = etcd
        self._access = access
        self._prefix = prefix
        self._lease_ttl_s = lease_ttl_s
        self._slot = Scoreboard(1).slots[0]
        self._drops = KernelDrops()
        self._loop: DatagramLoop | None = None
        self._thread: threading.Thread | None = None
        self._open = contextlib.ExitStack()

    def start(self) -> None:
        """Bind, serve in a thread, register.

        Raises BindError, PeerConflictError or RegistryUnavailableError, and leaves nothing open then.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            loop = self._bind()
            self._thread = threading.Thread(target=loop.run, name=f"peer {self.peer_id}")
            self._thread.start()
            self._register()
            undo.pop_all()

    def serve_forever(self) -> None:
        """Bind, register, and serve in this thread. Raises as :meth:`start` does."""
        try:
            loop = self._bind()
            with _deferred_interrupt():
                self._register()
            loop.run()
        finally:
            self.close()

    def stop(self) -> None:
        """Make :meth:`serve_forever` return; safe in a signal handler."""
        if self._loop is not None:
            self._loop.stop(drain_s=DRAIN_S)

    def close(self) -> None:
        """Revoke the record, drain, close the socket. Does nothing when called again."""
        try:
            self._open.pop_all().close()
        finally:
            self._loop = None
            self._thread = None

    def counters(self) -> dict[str, int]:
        """What this peer has received, sent and dropped since it was made, by name."""
        return {**self._slot.counters(), "rx_kernel_drops": self._drops.read()[1]}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self) -> DatagramLoop:
        if self._loop is not None:
            raise RuntimeError(f"peer {self.peer_id} is running already")
        buffer_bytes = self._settings.recv_buffer_bytes
        (sock,) = bind_all(self._settings.host, self.port, 1, buffer_bytes, flag="port")
        self._open.callback(sock.close)
        self._drops.follow(sock)
        self._open.callback(self._drops.leave)
        self._loop = make_loop(
            self._app,
            sock.fileno(),
            self._slot,
            self._settings.datagrams,
            about=f"peer={self.peer_id} ",
        )
        self._open.callback(self._end_loop)
        return self._loop

    def _end_loop(self) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _register(self) -> None:
        if self._etcd is None:
            return
        # Only a peer that registers pays for gRPC.
        from peerd.registry import PeerRecord, Registry

        registry = self._open.enter_context(
            Registry(self._etcd, self._prefix, access=self._access, lease_ttl_s=self._lease_ttl_s)
        )
        record = PeerRecord(
            url=self._settings.advertised_host,
            port=self.port,
            peer_id=self.peer_id,
            partition_key=self._partition_key,
            metadata=self._metadata,
        )
        registry.register(record)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Delay Ctrl-C to the end: a KeyboardInterrupt within gRPC can leave its locks held."""
    received: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[0])
