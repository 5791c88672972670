"""The process that a client of the registry trial runs in: registry_child.py CLIENT LOG ENDPOINT...

It obeys JSON lines on stdin, one at a time, and answers each with a line on stdout. What the client
and gRPC print goes to the log. It ends with its stdin.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO

import orjson

from registry_clients import CLIENTS, FOR_LISTINGS, Client

Answer = dict[str, Any]

_WATCH_LIMIT_S = 5.0
_READ_PAUSE_S = 0.02
_FORK_LIMIT_S = 3.0


def main() -> None:
    name, log, *endpoints = sys.argv[1:]
    answers = _keep_stdout_to_ourselves(log)
    os.environ["no_proxy"] = "127.0.0.1"  # for gRPC and for requests
    worker = _Worker(name, endpoints)
    _say(answers, {"pid": os.getpid()})
    for line in sys.stdin.buffer:
        command = orjson.loads(line)
        _say(answers, worker.do(command.pop("do"), command))
    # Not sys.exit: threads of a client that hangs would be waited for.
    os._exit(0)


def _keep_stdout_to_ourselves(log: str) -> BinaryIO:
    answers = os.fdopen(os.dup(1), "wb")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return answers


def _say(answers: BinaryIO, answer: Answer) -> None:
    answers.write(orjson.dumps(answer) + b"\n")
    answers.flush()


class _Worker:
    """A method for each command. An answer with ``error`` says what the client raised."""

    def __init__(self, name: str, endpoints: list[str]) -> None:
        spec = (CLIENTS | FOR_LISTINGS)[name]
        self._make: Callable[[], Client] = lambda: spec.make(endpoints)
        self._client = self._make()
        self._watcher: _Watcher | None = None

    def do(self, name: str, arguments: Answer) -> Answer:
        try:
            answer: Answer = getattr(self, name)(**arguments)
        except Exception as error:
            return {"error": _told(error)}
        return answer

    def listing(self, prefix: str) -> Answer:
        began_s = time.perf_counter()
        records = self._client.listing(prefix)
        return {"seconds": time.perf_counter() - began_s, "records": records}

    def watch(self, prefix: str) -> Answer:
        """A new watch with the same client, whatever became of an earlier one."""
        self._watcher = _Watcher(self._client, prefix)
        if not self._watcher.begun.wait(_WATCH_LIMIT_S):
            return {"error": "hangs"}
        return {"error": self._watcher.told} if self._watcher.told else {}

    def seen(self) -> Answer:
        assert self._watcher is not None
        return {"seen": list(self._watcher.seen), "told": self._watcher.told}

    def read_until_answered(self, prefix: str, for_s: float) -> Answer:
        """Again and again, as a program does that needs the answer."""
        errors: Counter[str] = Counter()
        give_up_s = time.monotonic() + for_s
        while time.monotonic() < give_up_s:
            try:
                self._client.listing(prefix)
            except Exception as error:
                errors[_told(error)] += 1
                time.sleep(_READ_PAUSE_S)
            else:
                return {"at_s": time.monotonic(), "errors": errors}
        return {"error": f"no answer in {for_s:g} s", "errors": errors}

    def hold(self, prefix: str, count: int, ttl_s: int) -> Answer:
        self._client.hold(prefix, count, ttl_s)
        return {}

    def keep(self, seconds: float, every_s: float) -> Answer:
        """Where the client does not do it by itself: a round now and then, later when one takes longer."""
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
        """What a forked child gets from a read: with this client, or with one of its own."""
        self._client.listing(prefix)
        outcome, outcome_of_child = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(2 * int(_FORK_LIMIT_S))  # should nobody be left who kills it
            os.write(outcome_of_child, self._read_in_child(prefix, inherited).encode())
            os._exit(0)
        os.close(outcome_of_child)
        answered = bool(select.select([outcome], [], [], _FORK_LIMIT_S)[0])
        text = os.read(outcome, 1000).decode() if answered else "hangs"
        os.close(outcome)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        # End of file without a word: it crashed.
        return {"outcome": text or signal.Signals(os.WTERMSIG(status)).name}

    def _read_in_child(self, prefix: str, inherited: bool) -> str:
        try:
            (self._client if inherited else self._make()).listing(prefix)
        except BaseException as error:
            return type(error).__name__
        return "works"


class _Watcher:
    """One watch in a thread, for as long as it gives anything."""

    def __init__(self, client: Client, prefix: str) -> None:
        self.begun = threading.Event()
        self.seen: list[tuple[str, float]] = []
        """Peer ids, and when each came on the monotonic clock."""

        self.told = ""
        """How it ended."""

        self._client = client
        self._prefix = prefix
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            events = self._client.watch(self._prefix)
            self.begun.set()
            for peer_id in events:
                self.seen.append((peer_id, time.monotonic()))
            self.told = "the watch ended without a word"
        except Exception as error:
            self.told = _told(error)
        finally:
            self.begun.set()


def _told(error: BaseException) -> str:
    """The name says enough for our own and for the clients' errors; that of built-in ones does not."""
    name = type(error).__name__
    text = str(error).strip().split("\n")[0][:80]
    return f"{name}: {text}" if type(error).__module__ == "builtins" and text else name


if __name__ == "__main__":
    main()
