from __future__ import annotations

from itertools import product

from peerd._scoreboard import PeerState
from peerd.supervisor.lifecycle import TRANSITIONS, Event

WITHOUT_A_PROCESS = {PeerState.STOPPED, PeerState.BACKOFF, PeerState.CRASHLOOP}


def test_every_event_has_a_next_state_but_serving_without_a_process() -> None:
    assert set(product(PeerState, Event)) - TRANSITIONS.keys() == {
        (state, Event.SERVE) for state in WITHOUT_A_PROCESS
    }


def test_only_an_end_leads_out_of_stopping() -> None:
    ends = {event: TRANSITIONS[PeerState.STOPPING, event] for event in Event}
    assert {event for event, state in ends.items() if state is not PeerState.STOPPING} == {
        Event.END
    }


def test_ready_is_reached_by_serving_only() -> None:
    assert {event for (_, event), state in TRANSITIONS.items() if state is PeerState.READY} == {
        Event.SERVE
    }


def test_every_state_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS.values()) == set(PeerState)
    for state in PeerState:
        others = {to for (start, _), to in TRANSITIONS.items() if start is state} - {state}
        assert others
