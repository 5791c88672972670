"""The process that an etcd client runs in: ``python -m etcd_clients.client_child CLIENT FD ENDPOINT...``

Commands come through a pipe of multiprocessing, and each is answered through it. The process exits when
the other end is closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from etcd_clients.clients import CLIENTS, LISTING_CLIENTS, Client

Answer = dict[str, Any]

_WATCH_TIMEOUT_S = 5.0
_READ_PAUSE_S = 0.02
_FORK_TIMEOUT_S = 3.0


def main() -> None:
    name, fd, *endpoints = sys.argv[1:]
    os.environ["no_proxy"] = "127.0.0.1"  # for gRPC and for requests
    worker = _Worker(name, endpoints)
    pipe = Connection(int(fd))
    pipe.send({})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            command, arguments = pipe.recv()
            pipe.send(worker.do(command, arguments))
    # Not sys.exit, which would wait for the threads of a client that hangs.
    os._exit(0)


class _Worker:
    """Has a method per command. An answer with ``error`` contains what the client raised."""

    def __init__(self, name: str, endpoints: list[str]) -> None:
        spec = (CLIENTS | LISTING_CLIENTS)[name]
        self._make: Callable[[], Client] = lambda: spec.make(endpoints)
        self._client = self._make()
        self._watcher: _Watcher | None = None

    def do(self, name: str, arguments: Answer) -> Answer:
        try:
            answer: Answer = getattr(self, name)(**arguments)
        except Exception as error:
            return {"error": _describe(error)}
        return answer

    def listing(self, prefix: str) -> Answer:
        began_s = time.perf_counter()
        records = self._client.listing(prefix)
        return {"seconds": time.perf_counter() - began_s, "records": records}

    def watch(self, prefix: str) -> Answer:
        """Start a new watch with the same client, even if an earlier one has failed."""
        self._watcher = _Watcher(self._client, prefix)
        if not self._watcher.started.wait(_WATCH_TIMEOUT_S):
            return {"error": "hangs"}
        return {"error": self._watcher.end} if self._watcher.end else {}

    def seen(self) -> Answer:
        assert self._watcher is not None
        return {"seen": list(self._watcher.seen), "end": self._watcher.end}

    def read_until_answered(self, prefix: str, for_s: float) -> Answer:
        """Repeat the read like a program that needs the answer."""
        errors: Counter[str] = Counter()
        give_up_s = time.monotonic() + for_s
        while time.monotonic() < give_up_s:
            try:
                self._client.listing(prefix)
            except Exception as error:
                errors[_describe(error)] += 1
                time.sleep(_READ_PAUSE_S)
            else:
                return {"at_s": time.monotonic(), "errors": errors}
        return {"error": f"no answer in {for_s:g} s", "errors": errors}

    def hold(self, prefix: str, count: int, ttl_s: int) -> Answer:
        self._client.hold(prefix, count, ttl_s)
        return {}

    def keep(self, seconds: float, every_s: float) -> Answer:
        """Refresh all leases every ``every_s`` or as often as possible, unless the client does it."""
        rounds_s: list[float] = []
        gone = 0
        end_s = time.monotonic() + seconds
        while (began_s := time.monotonic()) < end_s:
            gone_now = self._client.refresh()
            if gone_now is None:
                time.sleep(end_s - began_s)
                break
            gone = max(gone, gone_now)
            rounds_s.append(time.monotonic() - began_s)
            time.sleep(max(0.0, min(began_s + every_s, end_s) - time.monotonic()))
        return {"rounds_s": rounds_s, "gone": gone}

    def fork(self, prefix: str, inherited: bool) -> Answer:
        """The outcome of a read in a forked child, with this client or with a new one."""
        self._client.listing(prefix)
        outcome, outcome_of_child = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(2 * int(_FORK_TIMEOUT_S))  # its parent may die before it kills it
            os.write(outcome_of_child, self._read_in_child(prefix, inherited).encode())
            os._exit(0)
        os.close(outcome_of_child)
        answered = bool(select.select([outcome], [], [], _FORK_TIMEOUT_S)[0])
        text = os.read(outcome, 1000).decode() if answered else "hangs"
        os.close(outcome)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        # End of file without an outcome: the child crashed.
        return {"outcome": text or signal.Signals(os.WTERMSIG(status)).name}

    def _read_in_child(self, prefix: str, inherited: bool) -> str:
        try:
            (self._client if inherited else self._make()).listing(prefix)
        except BaseException as error:
            return type(error).__name__
        return "works"


class _Watcher:
    """One watch in a thread, until it ends."""

    def __init__(self, client: Client, prefix: str) -> None:
        self.started = threading.Event()
        self.seen: list[tuple[str, float]] = []
        """Peer ids, and the monotonic time at which each arrived."""

        self.end = ""  # How the watch ended; empty while it runs
        self._client = client
        self._prefix = prefix
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            events = self._client.watch(self._prefix)
            self.started.set()
            for peer_id in events:
                self.seen.append((peer_id, time.monotonic()))
            self.end = "the watch ended silently"
        except Exception as error:
            self.end = _describe(error)
        finally:
            self.started.set()


def _describe(error: BaseException) -> str:
    """The name is enough for the errors of peerd and of the clients, but not for built-in errors."""
    name = type(error).__name__
    text = str(error).strip().split("\n")[0][:80]
    return f"{name}: {text}" if type(error).__module__ == "builtins" and text else name


if __name__ == "__main__":
    main()
