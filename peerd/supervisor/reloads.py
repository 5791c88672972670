"""Reloads: all workers are replaced, one at a time.

A reload that has not begun serves all requests that come meanwhile. Restarts of single peers wait in those
peers' own queues (replacement.py), so they do not wait for a reload.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict

from peerd.supervisor.events import ReloadChanged, Stopping, WorkerReplaced
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop, Promise
from peerd.supervisor.supervised_peer import SupervisedPeer

log = logging.getLogger(__name__)

ReloadResult = dict[str, object]


class Reloads:
    """The first worker that cannot be replaced ends the reload; the workers behind it stay."""

    def __init__(self, loop: Loop, journal: Journal, peers: Mapping[int, SupervisedPeer]) -> None:
        self._loop = loop
        self._journal = journal
        self._peers = peers
        self._next: Promise[ReloadResult] | None = None
        self._current: Promise[ReloadResult] | None = None
        self._todo: deque[SupervisedPeer] = deque()
        self._done: list[WorkerReplaced] = []
        self._total = 0
        self._is_stopping = False
        journal.subscribe(Stopping, lambda _: self._on_stopping())

    @property
    def is_running(self) -> bool:
        return self._current is not None

    def reload(self) -> Promise[ReloadResult]:
        promise = self._next = self._next or Promise[ReloadResult](self._loop)
        if self._current is None:
            self._begin()
        return promise

    def _on_stopping(self) -> None:
        self._is_stopping = True
        promise, self._next = self._next, None
        if promise is not None:
            promise.reject("the supervisor is stopping")

    def _begin(self) -> None:
        self._current, self._next = self._next, None
        self._todo = deque(self._peers.values())
        self._total, self._done = len(self._todo), []
        self._journal.publish(ReloadChanged(is_running=True))
        self._replace_next()

    def _replace_next(self) -> None:
        while self._todo and self._is_being_removed(self._todo[0]):
            self._todo.popleft()
        if self._todo:
            peer = self._todo.popleft()
            peer.replace().then(self._on_replaced, lambda why: self._on_not_replaced(peer, why))
        else:
            result: ReloadResult = {"replaced": [asdict(each) for each in self._done]}
            self._end().resolve(result)

    def _on_replaced(self, replaced: WorkerReplaced) -> None:
        self._done.append(replaced)
        self._replace_next()

    def _on_not_replaced(self, peer: SupervisedPeer, why: str) -> None:
        if self._is_being_removed(peer):
            self._replace_next()
            return
        kept = f"; {len(self._done)} of {self._total} were replaced before" if self._done else ""
        log.error("reload: not replaced%s: %s", kept, why)
        self._end().reject(why + kept)

    def _is_being_removed(self, peer: SupervisedPeer) -> bool:
        """It is being scaled away. (Its slot may have another peer by now.)"""
        return peer.is_stopping and not self._is_stopping

    def _end(self) -> Promise[ReloadResult]:
        """The promise of the reload that has ended; the next one begins when its result is known."""
        promise, self._current = self._current, None
        assert promise is not None
        self._journal.publish(ReloadChanged(is_running=False))
        promise.then(lambda _: self._begin_next(), lambda _: self._begin_next())
        return promise

    def _begin_next(self) -> None:
        if self._next is not None and self._current is None:
            self._begin()
