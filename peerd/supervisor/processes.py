"""Fork, watch, signal and reap. No policy.

Facts this file rests on:

- A child is known by its pidfd (pidfd_open(2)), never by its bare pid: a pid can be reused, and a
  signal to it can hit a stranger. The pidfd is opened before the child can have been reaped.
- Signals are blocked over the fork. A signal to the child before it has dropped the supervisor's
  handlers would run them in the child; before it has dropped the supervisor's wake-up fd, it would
  wake the supervisor.
- PR_SET_PDEATHSIG follows the forking thread (the supervisor has one), survives execve, is not
  inherited, and comes too late when the parent is dead already: so getppid() is compared with the
  pid that the parent had, not with 1 (prctl(2); a subreaper's pid is not 1).
- SIGKILL is the death signal because it also ends a worker that is stopped.
- A child is in a process group of its own: Ctrl-C in the terminal reaches the supervisor alone, and what
  a handler has started can be ended with its worker. While the dead worker is not reaped, its pid names
  its group and nothing else, so the group is killed between waitid(WNOWAIT) and waitid.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, NoReturn

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
# What the shell says for "cannot even start" and BSD's sysexits.h for an internal software error.
EX_SOFTWARE = 70

_own_pids: set[int] = set()
"""Children that are not reaped yet."""

_ALL_SIGNALS = signal.valid_signals()

_libc = ctypes.CDLL(None, use_errno=True)


class Exit(NamedTuple):
    """How a process ended: with a code, or by a signal."""

    code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        try:
            return f"killed by {signal.Signals(self.signal).name}"
        except ValueError:  # the real-time signals between SIGRTMIN and SIGRTMAX have no names
            return f"killed by signal {self.signal}"


class Child(NamedTuple):
    pid: int
    pidfd: int

    def send(self, number: int) -> None:
        """A child that is gone already is no error."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self) -> Exit:
        """The end of the process, once; blocks until it comes. Ends what it has left behind in its process
        group, and closes the pidfd."""
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        _own_pids.discard(self.pid)
        assert result is not None  # only WNOHANG makes it None
        os.close(self.pidfd)
        if result.si_code == os.CLD_EXITED:
            return Exit(result.si_status, None)
        return Exit(None, result.si_status)


class ChildPipes:
    """Pipes between this process and a child that is about to be forked.

    After the ``with`` block the child's ends are closed here, and ours as well unless ``keep`` was called.
    """

    def __enter__(self) -> ChildPipes:
        self._ours, self._childs = contextlib.ExitStack(), contextlib.ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._childs.close()
        self._ours.close()

    def to_child(self) -> tuple[int, int]:
        """(the child's end, ours)"""
        read_fd, write_fd = os.pipe()
        return self._close_later(read_fd, write_fd)

    def from_child(self) -> tuple[int, int]:
        """(the child's end, ours)"""
        read_fd, write_fd = os.pipe()
        return self._close_later(write_fd, read_fd)

    def keep(self) -> None:
        """There is a child: our ends are the caller's."""
        self._ours.pop_all()

    def _close_later(self, childs_fd: int, our_fd: int) -> tuple[int, int]:
        self._childs.callback(os.close, childs_fd)
        self._ours.callback(os.close, our_fd)
        return childs_fd, our_fd


def spawn(
    entry: Callable[[], int],
    keep_fds: Collection[int],
    *,
    die_with_parent: bool,
    output_fd: int | None = None,
) -> Child:
    """Fork a child that runs ``entry`` and exits with what it returns.

    The child has default signal dispositions and no descriptors but 0 to 2 and ``keep_fds``. With an
    ``output_fd``, that is its standard output and error, and there is nothing on its standard input.
    Raises OSError (EAGAIN, ENOMEM, EMFILE) when there is no process to be had; then nothing is left
    behind.
    """
    parent_pid = os.getpid()
    gc.freeze()  # the child's collector then leaves the parent's pages alone, and they stay shared
    try:
        with _signals_blocked() as unblocked:
            pid = os.fork()
            if pid == 0:
                death_of = parent_pid if die_with_parent else None
                _run_child(entry, keep_fds, unblocked, death_of, output_fd)
    finally:
        gc.unfreeze()
    _own_pids.add(pid)
    # As the child does: whichever is first, the group is there when either goes on.
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or called exec
        os.setpgid(pid, pid)
    try:
        return Child(pid, os.pidfd_open(pid))
    except OSError:
        _own_pids.discard(pid)
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still the child's
        os.waitpid(pid, 0)
        raise


def reap_stranger() -> None:
    """As PID 1 of a container: a process whose parent has ended is ours to reap, though it is nobody's child
    here. One of our own that has ended is seen by its pidfd, and is gone at the next look."""
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in _own_pids:
                return
            os.waitpid(found.si_pid, 0)  # a zombie's pid is nobody else's


def redirect_output(fd: int) -> None:
    """Send this process's standard output and error there, and read nothing."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def _run_child(
    entry: Callable[[], int],
    keep_fds: Collection[int],
    unblocked: set[int | signal.Signals],
    parent_pid: int | None,
    output_fd: int | None,
) -> NoReturn:
    code = EX_SOFTWARE
    try:
        if parent_pid is not None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent_pid:
                os._exit(EX_SOFTWARE)
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            # SIGKILL and the like refuse; Python's own SIGPIPE and SIGXFSZ stay ignored.
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        if output_fd is not None:
            redirect_output(output_fd)
        _close_all_but(keep_fds)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        code = entry()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        log.critical("unexpected error", exc_info=True)
    finally:
        # Not sys.exit: the parent's finally blocks and atexit functions are on this stack as well.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _close_all_but(keep_fds: Collection[int]) -> None:
    start = 3
    for fd in sorted(fd for fd in keep_fds if fd >= start):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[set[int | signal.Signals]]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    try:
        yield previous
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
