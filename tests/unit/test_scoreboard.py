from __future__ import annotations

import os

import pytest

from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard, Slot


def test_a_new_slot_is_empty() -> None:
    slot = Scoreboard(3).slots[2]
    assert (slot.index, slot.pid, slot.generation, slot.restarts) == (2, 0, 0, 0)
    assert (slot.state, slot.registered, slot.holder) == (PeerState.STOPPED, False, "")
    assert slot.counters() == dict.fromkeys(COUNTER_NAMES, 0)


def test_a_child_writes_what_the_parent_reads() -> None:
    board = Scoreboard(2)
    pid = os.fork()
    if pid == 0:
        board.slots[1].pid = os.getpid()
        board.slots[1].state = PeerState.READY
        board.slots[1].holder = "someone"
        board.registry_state = RegistryState.CONNECTED
        os._exit(0)
    os.waitpid(pid, 0)
    slot = board.slots[1]
    assert (slot.pid, slot.state, slot.holder) == (pid, PeerState.READY, "someone")
    assert board.registry_state is RegistryState.CONNECTED
    assert board.slots[0].pid == 0


def test_the_holder_is_cut_to_its_room() -> None:
    slot = Scoreboard(1).slots[0]
    slot.holder = "é" * 300
    assert slot.holder == "é" * 255
    slot.holder = "x"
    assert slot.holder == "x"
    slot.holder = ""
    assert slot.holder == ""


def test_a_slot_keeps_the_mapping() -> None:
    slot = Scoreboard(1).slots[0]
    slot.pid = 7
    assert slot.pid == 7


def test_only_a_scoreboard_makes_slots() -> None:
    with pytest.raises(TypeError, match="Scoreboard"):
        Slot()
    with pytest.raises(ValueError, match="at least 1 slot"):
        Scoreboard(0)
    with pytest.raises(ValueError, match="99"):
        Scoreboard(1).slots[0].state = 99  # type: ignore[assignment]
