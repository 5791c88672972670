"""The account of returned numbers, and the schedule of a seed."""

from collections.abc import Iterable

from hypothesis import example, given
from hypothesis import strategies as st

from peerd_chaos.accounts import Count, Stream
from peerd_chaos.schedule import SLOT_KINDS, SPARE_PEERS, Kind, schedule

SENT = 8


def after(numbers: Iterable[int]) -> Count:
    stream = Stream(1, 5001)
    for _ in range(SENT):
        stream.next_number()
    for number in numbers:
        assert stream.take(number)
    return stream.count()


@given(st.lists(st.integers(0, SENT - 1), max_size=3 * SENT))
@example([0, 2, 1, 1, 3, 4, 5, 6, 7])  # one doubled, one out of order
@example([7, 0, 7])  # and six missing
def test_each_kind_of_fault_is_counted(numbers: list[int]) -> None:
    count = after(numbers)
    first = [number for at, number in enumerate(numbers) if number not in numbers[:at]]
    assert count.sent == SENT
    assert count.received == len(first)
    assert count.missing == SENT - len(first)
    assert count.doubled == len(numbers) - len(first)
    late = [number for at, number in enumerate(first) if number < max(first[:at], default=-1)]
    assert count.out_of_order == len(late)


def test_a_number_that_was_never_sent_is_refused() -> None:
    stream = Stream(0, 5001)
    assert not stream.take(0)
    stream.next_number()
    assert not stream.is_complete
    assert stream.take(0)
    assert not stream.take(1)
    assert not stream.take(-1)
    assert stream.is_complete


@given(
    st.integers(0), st.floats(0, 60), st.integers(1, 64), st.sets(st.sampled_from(Kind), min_size=1)
)
def test_a_seed_is_a_schedule(seed: int, seconds: float, peers: int, kinds: set[Kind]) -> None:
    actions = schedule(seed, seconds, peers, kinds)
    assert actions == schedule(seed, seconds, peers, sorted(kinds, reverse=True))
    assert {action.kind for action in actions} <= kinds
    assert [action.at_s for action in actions] == sorted(action.at_s for action in actions)
    for action in actions:
        assert 0 < action.at_s < seconds
        assert (action.slot is not None) == (action.kind in SLOT_KINDS)
        assert action.slot is None or 0 <= action.slot < peers + SPARE_PEERS
        assert (action.peers is not None) == (action.kind is Kind.SCALE)
        assert action.peers is None or 1 <= action.peers <= peers + SPARE_PEERS


def test_another_seed_is_another_schedule() -> None:
    assert schedule(1, 20, 4) != schedule(2, 20, 4)
