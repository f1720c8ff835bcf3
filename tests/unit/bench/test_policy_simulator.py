"""What the simulator of policies counts."""

import math

import numpy as np
import pytest

from bench.policy.fleet import GroupModel
from bench.policy.simulator import Seen, simulate
from bench.policy.workload import Trace

DURATION_S = 100


class _StopsTheBusyGroup:
    """Of two groups, before the trace ends."""

    name = "stops the busy group"
    grace_s = math.inf

    def __call__(self, seen: Seen) -> tuple[int, tuple[str, ...]]:
        busy = tuple(group.group for group in seen.groups if group.load and group.load.num_open)
        return (2 if seen.now_s < 95 else 1), busy


def test_a_group_that_drains_when_the_trace_ends_is_counted_once() -> None:
    trace = Trace(
        name="one long answer",
        arrivals_s=np.array([90.0]),
        num_prompt_tokens=np.array([100]),
        num_output_tokens=np.array([2000]),
        intensity=np.full(DURATION_S, 0.01),
    )
    outcome = simulate(trace, _StopsTheBusyGroup(), GroupModel(), first_groups=2)
    assert outcome.attainment == 1.0
    assert outcome.group_hours == pytest.approx(2 * DURATION_S / 3600)
