"""Health by progress, on a clock of the test's own."""

import pytest

from model_parallel.runtime.health import MAX_COUNTED_S, GroupHealth


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_idle_group_is_healthy_for_ever() -> None:
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    clock.now += 1e6
    assert health.problem() is None


def test_step_is_healthy_until_nothing_has_moved_for_too_long() -> None:
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    health.moved()
    clock.now += 2.0
    assert health.problem() is None
    clock.now += 0.1
    assert health.problem() == "nothing has moved in a step for 2.1 s; the limit is 2 s"
    health.step_ended()
    assert health.problem() is None


def test_a_long_step_that_moves_is_healthy() -> None:
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    for _ in range(10):
        health.moved()
        clock.now += 1.5
        assert health.problem() is None


def test_silence_adds_up_from_look_to_look_and_ends_with_a_movement() -> None:
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    health.moved()
    for looks in range(1, 5):
        clock.now += 0.25
        assert health.look() == 0.25 * looks
    health.moved()
    clock.now += 0.25
    assert health.look() == 0.25


def test_starvation_adds_up_until_something_moves() -> None:
    health = GroupHealth(2.0, clock=Clock())
    health.moved()
    assert [health.starved(0.25), health.starved(0.0), health.starved(0.5)] == [0.25, 0.25, 0.75]
    health.moved()
    assert health.starved(0.125) == 0.125


def test_who_was_held_up_itself_does_not_blame_the_ranks() -> None:
    """The leader stood still for an hour, and so perhaps did they."""
    clock = Clock()
    health = GroupHealth(2.0, clock=clock)
    health.moved()
    clock.now += 3600.0
    assert health.look() == MAX_COUNTED_S


def test_failure_is_for_good_and_the_first_reason_stays() -> None:
    health = GroupHealth(2.0, clock=Clock())
    assert health.fail("rank 1 is lost")
    assert not health.fail("rank 0 is lost")
    health.moved()
    health.step_ended()
    assert health.problem() == health.failure == "rank 1 is lost"


def test_nothing_is_silent_without_a_step() -> None:
    with pytest.raises(RuntimeError, match="no step"):
        GroupHealth(2.0).look()
