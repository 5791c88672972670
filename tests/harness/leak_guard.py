"""Finds what a test leaves behind: processes, threads, descriptors and files.

The guard looks once per test, at its end, and compares with the look before. A look reads a few entries of
/proc. Only if it finds something new, the guard collects garbage and waits for it to go away. Fixtures of a
wider scope than one test leave things on purpose: see ``granting()``.

PR_SET_CHILD_SUBREAPER makes every orphan a child of this process. So the guard finds all processes of a test
among its own children, without a search of /proc, and pytest-xdist workers do not see each other's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from harness.eventually import eventually

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

# gRPC closes its event descriptors in its own time; /proc/self/fd is the look itself.
_IGNORED = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]", "anon_inode:[timerfd]", "/proc")

_Found = tuple[str, int, str]
"""Kind, number and name. A process has no name here, because it can change its own."""


class LeakGuard:
    """Watches this process, and the two folders that tests use for temporary and run-time files."""

    def __init__(self, folder: Path, patience_s: float = 20.0) -> None:
        """``patience_s``: the time that leftovers have to go away by themselves."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        self.temporary, self.runtime = folder / "tmp", folder / "run"
        self.temporary.mkdir()
        self.runtime.mkdir()
        self._patience_s = patience_s
        self._known = self._look()

    @contextlib.contextmanager
    def granting(self) -> Iterator[None]:
        """Everything that appears in this block may stay."""
        before = self._look()
        try:
            yield
        finally:
            self._known |= self._look() - before

    def leftovers(self, *, wait: bool = True) -> list[str]:
        """Find everything that was not there at the last look and does not go away.

        Processes are then killed and files removed, so that the next test does not meet them.
        """
        if not self._news():
            return []
        gc.collect()  # a descriptor that only a dead cycle holds is not a leak
        if wait:
            with contextlib.suppress(AssertionError):
                eventually(lambda: not self._news(), self._patience_s)
        left = sorted(map(_description, self._news()))
        self._clean_up()
        return left

    def _news(self) -> set[_Found]:
        look = self._look()
        news = look - self._known
        self._known &= look
        for kind, number, _ in news:
            if kind == "process" and _has_ended(number):
                news = news - {(kind, number, "")}
        return news

    def _look(self) -> set[_Found]:
        return {
            *(("process", pid, "") for pid in _children()),
            *(("thread", each.native_id or 0, each.name) for each in threading.enumerate()),
            *(("descriptor", number, target) for number, target in _descriptors()),
            *(("file", 0, str(path)) for path in self._files()),
        }

    def _files(self) -> Iterator[Path]:
        yield from self.temporary.iterdir()
        yield from self.runtime.glob("peerd/*")

    def _clean_up(self) -> None:
        # The children of a killed process become children of this one: the next look finds them.
        while processes := [pid for kind, pid, _ in self._news() if kind == "process"]:
            for pid in processes:
                os.kill(pid, signal.SIGKILL)  # a child that was not waited for keeps its pid
            for pid in processes:
                os.waitpid(pid, 0)
        for kind, _, name in self._news():
            if kind == "file" and os.path.isdir(name) and not os.path.islink(name):
                shutil.rmtree(name)
            elif kind == "file":
                os.unlink(name)
        self._known = self._look()


def _children() -> set[int]:
    """The pids of this process's children, adopted orphans included."""
    found: set[int] = set()
    # Twice, because the kernel may leave out one child while another ends (proc(5), children).
    for _ in range(2):
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
                found.update(map(int, file.read().split()))
    return found


def _has_ended(pid: int) -> bool:
    """Reaps a child that has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True


def _descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith(_IGNORED):
                yield int(name), target


def _description(found: _Found) -> str:
    kind, number, name = found
    if kind == "process":
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return f"{kind} {name}" if number == 0 else f"{kind} {number} {name}"
