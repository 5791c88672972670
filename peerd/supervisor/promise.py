"""A result that comes later: a value, or the reason why there is none.

The part that does the work calls resolve() or reject(), once; any number of parts wait with then(). Their
callbacks run in the loop after the current callback, never inside resolve(), reject() or then().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from peerd.supervisor.loop import Loop

T = TypeVar("T")


class Promise(Generic[T]):
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._outcome: tuple[T] | str | None = None
        self._waiting: list[tuple[Callable[[T], object], Callable[[str], object]]] = []

    @property
    def is_settled(self) -> bool:
        return self._outcome is not None

    def resolve(self, value: T) -> None:
        self._settle((value,))

    def reject(self, why: str) -> None:
        self._settle(why)

    def then(self, on_value: Callable[[T], object], on_error: Callable[[str], object]) -> None:
        """Call one of the two when the outcome is known, soon if it is known already."""
        self._waiting.append((on_value, on_error))
        if self.is_settled:
            self._loop.call_soon(self._deliver)

    def _settle(self, outcome: tuple[T] | str) -> None:
        assert not self.is_settled
        self._outcome = outcome
        self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        outcome, waiting = self._outcome, self._waiting
        self._waiting = []
        assert outcome is not None
        for on_value, on_error in waiting:
            if isinstance(outcome, str):
                on_error(outcome)
            else:
                on_value(outcome[0])
