from itertools import product

from peerd._scoreboard import PeerState
from peerd.supervisor.lifecycle import TRANSITIONS, LifecycleAction, LifecycleEvent
from peerd.supervisor.replacement import (
    TABLE,
    ReplacementAction,
    ReplacementEvent,
    ReplacementPhase,
)

WITHOUT_WORKER = {PeerState.STOPPED, PeerState.BACKOFF, PeerState.CRASHLOOP}
OF_A_WORKER = {LifecycleEvent.SERVE, LifecycleEvent.LOSE}


def test_each_event_has_a_next_state_except_those_of_a_worker_where_there_is_none() -> None:
    assert set(product(PeerState, LifecycleEvent)) - TRANSITIONS.keys() == set(
        product(WITHOUT_WORKER, OF_A_WORKER)
    )


def test_only_an_end_leaves_stopping() -> None:
    leaving = {
        event
        for event in LifecycleEvent
        if TRANSITIONS[PeerState.STOPPING, event].state is not PeerState.STOPPING
    }
    assert leaving == {LifecycleEvent.END}


def test_ready_is_entered_by_serving_only() -> None:
    entering = {
        event
        for (state, event), transition in TRANSITIONS.items()
        if transition.state is PeerState.READY and state is not PeerState.READY
    }
    assert entering == {LifecycleEvent.SERVE}


def test_every_state_can_be_reached_and_left() -> None:
    assert {transition.state for transition in TRANSITIONS.values()} == set(PeerState)
    for state in PeerState:
        others = {to.state for (start, _), to in TRANSITIONS.items() if start is state} - {state}
        assert others


def test_every_action_is_used() -> None:
    assert {transition.action for transition in TRANSITIONS.values()} == set(LifecycleAction)
    assert {action for _, action in TABLE.values()} == set(ReplacementAction)


def test_a_successor_may_read_only_where_no_worker_does() -> None:
    taking_over = {
        pair for pair, (_, action) in TABLE.items() if action is ReplacementAction.TAKE_OVER
    }
    assert taking_over == {
        (ReplacementPhase.ALONE, ReplacementEvent.PREPARED),
        (ReplacementPhase.HANDING_OVER, ReplacementEvent.WORKER_ENDED),
    }
