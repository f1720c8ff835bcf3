"""Health by progress, on a clock of the test's own."""

import pytest

from model_parallel.runtime.health import GroupHealth


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_idle_group_is_healthy_for_ever() -> None:
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    clock.now += 1e6
    assert health.problem() is None


def test_step_is_healthy_until_it_takes_too_long() -> None:
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    health.step_began()
    clock.now += 2.0
    assert health.problem() is None
    assert health.seconds_left() == 0
    clock.now += 0.1
    assert health.problem() == "a step has been running for 2.1 s; the limit is 2 s"
    health.step_ended()
    assert health.problem() is None


def test_every_step_counts_from_its_own_beginning() -> None:
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    for _ in range(10):
        health.step_began()
        clock.now += 1.5
        assert health.problem() is None
        health.step_ended()


def test_failure_is_for_good_and_the_first_reason_stays() -> None:
    health = GroupHealth(2.0, clock=Clock())
    assert health.fail("rank 1 is lost")
    assert not health.fail("rank 0 is lost")
    health.step_began()
    health.step_ended()
    assert health.problem() == health.failure == "rank 1 is lost"


def test_no_time_is_left_of_no_step() -> None:
    with pytest.raises(RuntimeError, match="no step"):
        GroupHealth(2.0).seconds_left()
