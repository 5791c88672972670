import os
import socket

import pytest

from peerd import Message, encode
from peerd._loop import DatagramLoop
from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard, Slot

DIED = 7


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


def test_it_grows_up_to_its_capacity_in_every_process() -> None:
    board = Scoreboard(2, capacity=4)
    assert (board.capacity, len(board.slots)) == (4, 2)
    board.slots[1].restarts = 7
    pid = os.fork()
    if pid == 0:
        board.grow(3)
        board.slots[2].generation = 5
        os._exit(0)
    os.waitpid(pid, 0)
    assert [slot.index for slot in board.slots] == [0, 1, 2]
    assert (board.slots[1].restarts, board.slots[2].generation) == (7, 5)
    for asked, there_are in ((1, 3), (4, 4)):  # it never shrinks
        board.grow(asked)
        assert len(board.slots) == there_are
    with pytest.raises(ValueError, match="4"):
        board.grow(5)
    assert Scoreboard(2).capacity == 2


def die(_message: Message) -> None:
    os._exit(DIED)


def test_the_unfinished_datagrams_of_a_dead_worker_are_counted_once() -> None:
    slot = Scoreboard(1).slots[0]
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        sock.bind(("127.0.0.1", 0))
        for _ in range(2):
            for _ in range(3):
                client.sendto(encode("LAST", "1"), sock.getsockname())
            pid = os.fork()
            if pid == 0:
                try:
                    DatagramLoop(sock.fileno(), {"LAST": die}, {}, slot, print, gro=False).turn()
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == DIED
            assert slot.unfinished == 3
            assert slot.settle() == 3
            # The next worker may die before it has read anything.
            assert (slot.unfinished, slot.settle()) == (0, 0)


def test_the_holder_is_cut_to_its_room() -> None:
    slot = Scoreboard(1).slots[0]
    slot.holder = "é" * 300
    assert slot.holder == "é" * 255
    slot.holder = "x"
    assert slot.holder == "x"
    slot.holder = ""
    assert slot.holder == ""


def test_only_a_scoreboard_makes_slots() -> None:
    with pytest.raises(TypeError, match="Scoreboard"):
        Slot()
    with pytest.raises(ValueError, match="at least 1 slot"):
        Scoreboard(0)
    with pytest.raises(ValueError, match="99"):
        Scoreboard(1).slots[0].state = 99  # type: ignore[assignment]
