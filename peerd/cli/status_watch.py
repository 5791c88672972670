"""``peerd status --watch``: the report every second, full screen on a terminal.

It continues when the supervisor ends: the last report stays, with a line that says for how long there was no
answer. When another supervisor answers at the same socket, a line says so.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from peerd import control
from peerd.cli import status_view
from peerd.cli.text_output import build_table, columns_that_fit, left_out, make_console
from peerd.errors import ControlError, NotRunningError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

INTERVAL_S = 1.0
ANSWER_S = 2.0


def watch_on_screen(path: Path) -> None:
    """Show reports until q or Ctrl-C. Raises NotRunningError if no supervisor answers at the start."""
    with contextlib.suppress(KeyboardInterrupt):
        _watch_screen(_Source(path))


def watch_status(path: Path, show: Callable[[dict[str, Any]], None]) -> None:
    """Print reports one below the other, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        _watch_lines(_Source(path), show)


class _Source:
    """The reports of the supervisors that answer at a socket."""

    def __init__(self, path: Path) -> None:
        """Raises NotRunningError if no supervisor answers."""
        self.report: dict[str, Any] = {}  # The last one
        self.rates: dict[int, tuple[int, int]] = {}
        self.silence = ""  # Why the last request failed; empty if it did not
        self.restarts = ""  # A line about the latest restart of the supervisor; empty without one
        self._path = path
        self._rates = status_view.Rates()
        self._answered_s = 0.0
        self.update()
        if self.silence:
            raise NotRunningError(self.silence)

    def update(self) -> None:
        try:
            report = control.request(self._path, "status", timeout_s=ANSWER_S)
        except (NotRunningError, ControlError) as error:
            self.silence = str(error)
            return
        now_s = time.monotonic()
        self.rates = self._rates.after(report, now_s)
        pid = report["supervisor"]["pid"]
        if self.report and (old_pid := self.report["supervisor"]["pid"]) != pid:
            self.restarts = f"the supervisor was restarted: pid {pid} follows {old_pid}"
        self.report, self.silence, self._answered_s = report, "", now_s

    @property
    def silent_for_s(self) -> float:
        return time.monotonic() - self._answered_s


def _watch_lines(source: _Source, show: Callable[[dict[str, Any]], None]) -> None:
    printed = ""
    while True:
        for text in (source.silence, source.restarts):
            if text and text not in printed:
                click.echo(f"peerd status: {text}", err=True)
        printed = source.silence + source.restarts
        if not source.silence:
            show(source.report)
            sys.stdout.flush()
        time.sleep(INTERVAL_S)
        source.update()


def _watch_screen(source: _Source) -> None:
    from rich.live import Live

    console = make_console()
    with (
        _terminated_by_exception(),
        _keys() as keyboard,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(_screen(source, console), refresh=True)
            if _quits(keyboard):
                return
            source.update()


def _screen(source: _Source, console: Console) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    report = source.report
    head = [Text(line) for line in status_view.head(report)]
    if source.silence:
        silent = status_view.duration(source.silent_for_s)
        head = [
            Text(f"no answer for {silent}; this is the last report", style="bold red"),
            Text(source.silence, style="red"),
            *head[:1],
        ]
    elif source.restarts:
        head.append(Text(source.restarts, style="yellow"))
    tail = [Text(line) for line in status_view.notes(report)]
    tail.append(Text("q or Ctrl-C to quit", style="dim"))
    # The head of the table takes two lines, the empty line before it and the note below it one each.
    room = max(console.height - len(head) - min(len(tail), 5) - 5, 1)
    peers = report["peers"]
    if len(peers) > room:
        tail.insert(0, Text(f"({room} of {len(peers)} peers; those that are not ready come first)"))
        peers = sorted(peers, key=status_view.is_fine)[:room]
    columns = status_view.columns({**report, "peers": peers}, source.rates)
    shown = columns_that_fit(columns, console.width)
    if note := left_out(columns, shown):
        tail.insert(0, Text(note, style="dim"))
    return Group(*head, Text(), build_table(shown), *tail)


def _quits(keyboard: int | None) -> bool:
    """Whether q was pressed within the interval."""
    watched = [] if keyboard is None else [keyboard]
    end_s = time.monotonic() + INTERVAL_S
    while (left_s := end_s - time.monotonic()) > 0:
        if not select.select(watched, [], [], left_s)[0]:
            return False
        keys = os.read(watched[0], 64)
        if not keys or b"q" in keys.lower():
            return True
    return False


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The descriptor of the keyboard, which delivers each key without Enter; None if there is no terminal."""
    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (OSError, ValueError, AttributeError, termios.error):
        yield None
        return
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Restore the terminal on SIGTERM, which would leave it without echo on the alternate screen."""

    def terminate(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
