import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulation.clock import MAX_S, TICK_S, VirtualClock, to_ticks


def test_the_clock_never_runs_backwards() -> None:
    clock = VirtualClock()
    clock.move_to(10)
    clock.move_to(10)
    with pytest.raises(ValueError, match="cannot go back to 9"):
        clock.move_to(9)
    assert clock.tick == 10


@given(st.floats(0, MAX_S))
def test_a_tick_is_exact_in_seconds(seconds: float) -> None:
    tick = to_ticks(seconds)
    assert int(tick * TICK_S / TICK_S) == tick
    assert abs(tick * TICK_S - seconds) <= TICK_S


@given(st.lists(st.integers(0, 1 << 40), min_size=2, max_size=20))
def test_sums_of_seconds_are_sums_of_ticks(steps: list[int]) -> None:
    """What makes a stretch that is taken at once equal to single steps."""
    assert sum(step * TICK_S for step in steps) == sum(steps) * TICK_S == sum(step * TICK_S for step in reversed(steps))
