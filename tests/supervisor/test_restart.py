import itertools

import pytest

from peerd.supervisor.restart import Failure, Restart, RestartPolicy, next_restart

POLICY = RestartPolicy()


def dies_after(life_s: float, ready: bool = True) -> list[Restart]:
    """The restarts of a worker that dies ``life_s`` after each start, over ten minutes."""
    now_s, failures, restarts = 0.0, list[Failure](), list[Restart]()
    while now_s < 600:
        now_s += life_s
        was_parked = bool(restarts) and restarts[-1].crashloop
        failures.append(Failure(now_s, life_s if ready else 0.0, was_parked))
        restarts.append(next_restart(POLICY, failures, 0.5))
        now_s += restarts[-1].delay_s
    return restarts


def test_restarts_are_immediate_then_doubling_then_parked() -> None:
    delays = [restart.delay_s for restart in dies_after(0.01, ready=False)][:6]
    assert delays == [0.0, 0.25, 0.5, 1.0, 2.0, 60.0]
    assert dies_after(0.01)[5].crashloop


@pytest.mark.parametrize("life_s", [0.01, 1.2, 5.0])
def test_staying_alive_for_a_while_does_not_reset_the_delay(life_s: float) -> None:
    starts = itertools.accumulate(restart.delay_s + life_s for restart in dies_after(life_s))
    assert sum(start <= 30 for start in starts) <= 10


@pytest.mark.parametrize("life_s", [0.01, 1.2, 5.0, POLICY.reset_after_ready_s - 1])
def test_a_parked_peer_stays_parked_until_it_has_been_ready_for_a_minute(life_s: float) -> None:
    """Otherwise each minute would begin with as many starts as the first one."""
    failures = [Failure(float(number), 0.0) for number in range(6)]
    assert next_restart(POLICY, failures, 0.5).crashloop
    failures.append(Failure(70.0 + life_s, life_s, was_parked=True))
    assert next_restart(POLICY, failures, 0.5) == Restart(POLICY.parked_delay_s, crashloop=True)
    failures.append(Failure(1000.0, POLICY.reset_after_ready_s, was_parked=True))
    assert next_restart(POLICY, failures, 0.5) == Restart(0.0, crashloop=False)


@pytest.mark.parametrize("life_s", [0.01, 1.2])
def test_a_crash_loop_is_six_starts_and_then_one_per_minute(life_s: float) -> None:
    restarts = dies_after(life_s)
    assert [restart.crashloop for restart in restarts] == [False] * 5 + [True] * (len(restarts) - 5)
    assert len(restarts) <= 6 + 10


def test_a_minute_of_being_ready_resets_the_delay() -> None:
    assert {restart.delay_s for restart in dies_after(61)} == {0.0}


def test_rare_failures_back_off_to_the_cap_and_are_not_parked() -> None:
    restarts = dies_after(30)
    assert max(restart.delay_s for restart in restarts) == POLICY.max_delay_s
    assert not any(restart.crashloop for restart in restarts)


def test_jitter_stays_in_its_bounds() -> None:
    failures = [Failure(0, 0), Failure(1, 0)]
    delays = [next_restart(POLICY, failures, unit).delay_s for unit in (0.0, 1.0)]
    assert delays == pytest.approx([0.2, 0.3])


def test_a_long_history_does_not_overflow() -> None:
    failures = [Failure(100.0 * number, 0) for number in range(5000)]
    assert next_restart(POLICY, failures, 0.5).delay_s == POLICY.max_delay_s
