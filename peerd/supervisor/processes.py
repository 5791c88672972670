"""Fork, watch, signal and reap. No policy.

Facts this file rests on:

- A child is identified by its pidfd (pidfd_open(2)), never by its bare pid: a pid can be reused, and the
  signal would hit an unrelated process. The pidfd is opened before the child can have been reaped.
- Signals are blocked across the fork. A signal that the child gets before it has removed the supervisor's
  handlers would run them in the child; before it has removed the supervisor's wake-up fd, it would wake
  the supervisor.
- PR_SET_PDEATHSIG follows the forking thread (the supervisor has one), survives execve, is not inherited, and
  has no effect if the parent is dead already. So getppid() is compared with the parent's pid, not with 1
  (prctl(2); a subreaper's pid is not 1).
- SIGKILL is the death signal because it also ends a stopped worker.
- Each child has its own process group: Ctrl-C in the terminal reaches the supervisor only, and processes
  that a handler has started can be ended with its worker. Until a dead worker is reaped, its pid can name no
  other group, so the group is killed between waitid(WNOWAIT) and waitid.
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

_own_pids: set[int] = set()  # Children that have not been reaped
_ALL_SIGNALS = signal.valid_signals()

_libc = ctypes.CDLL(None, use_errno=True)


class Exit(NamedTuple):
    """How a process ended: with an exit code or by a signal. The other field is None."""

    code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        try:
            return f"killed by {signal.Signals(self.signal).name}"
        except ValueError:  # real-time signals between SIGRTMIN and SIGRTMAX have no names
            return f"killed by signal {self.signal}"


class Child(NamedTuple):
    pid: int
    pidfd: int

    def send(self, number: int) -> None:
        """Does nothing if the child has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self) -> Exit:
        """Wait for the end of the process, once. Kills what is left of its process group, and closes the
        pidfd."""
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

    The end of the ``with`` block closes the child's ends here, and ours unless ``keep`` was called.
    """

    def __enter__(self) -> ChildPipes:
        self._ours, self._childs = contextlib.ExitStack(), contextlib.ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._childs.close()
        self._ours.close()

    def to_child(self) -> tuple[int, int]:
        """(the child's end, ours)"""
        return self._close_later(*os.pipe())

    def from_child(self) -> tuple[int, int]:
        """(the child's end, ours)"""
        return self._close_later(*reversed(os.pipe()))

    def keep(self) -> None:
        """The fork has worked: our ends belong to the caller now."""
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

    The child has default signal dispositions and no descriptors but 0 to 2 and ``keep_fds``. An ``output_fd``
    becomes its standard output and error, with an empty standard input. Raises OSError (EAGAIN, ENOMEM,
    EMFILE) when the machine has no process or descriptor left; then nothing is left behind.
    """
    parent_pid = os.getpid()
    gc.freeze()  # so the child's collector does not touch the parent's pages, which stay shared
    try:
        with _signals_blocked() as unblocked:
            pid = os.fork()
            if pid == 0:
                death_of = parent_pid if die_with_parent else None
                _run_child(entry, keep_fds, unblocked, death_of, output_fd)
    finally:
        gc.unfreeze()
    _own_pids.add(pid)
    # The child does the same: whichever is first, the group exists when either of them goes on.
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or called exec
        os.setpgid(pid, pid)
    try:
        return Child(pid, os.pidfd_open(pid))
    except OSError:
        _own_pids.discard(pid)
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still the child's
        os.waitpid(pid, 0)
        raise


def reap_orphans() -> None:
    """Reap orphans as PID 1 of a container, which inherits processes whose parent has ended.

    Our own children are left to wait(), after their pidfd has reported the end; a later call goes on then.
    """
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in _own_pids:
                return
            os.waitpid(found.si_pid, 0)  # a zombie keeps its pid


def redirect_output(fd: int) -> None:
    """Make it this process's standard output and error, and its standard input empty."""
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
    code = os.EX_SOFTWARE
    try:
        if parent_pid is not None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent_pid:
                os._exit(os.EX_SOFTWARE)
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            # SIGKILL and SIGSTOP cannot be set; SIGPIPE and SIGXFSZ, which Python ignores, stay ignored.
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
        # Not sys.exit: the parent's finally blocks and atexit functions are on this stack too.
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
