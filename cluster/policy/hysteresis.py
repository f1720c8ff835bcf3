"""When the number of groups may change: at once upwards, after a proven past downwards, and not back and forth."""

import math

import msgspec

from cluster.policy.config import ModelPolicy
from cluster.policy.state import ModelState, Need

UP, DOWN = 1, -1
KNOWN_SHARE = 0.9
"""Of the past that shrinking is decided by. A tick that came late leaves a little of it out."""


def observe_target(state: ModelState, target: int, now_s: float) -> ModelState:
    """Note how the target has changed since the last look, whoever changed it."""
    if state.target is None or target == state.target:
        return msgspec.structs.replace(state, target=target)
    direction = UP if target > state.target else DOWN
    is_reversal = state.direction == -direction
    return msgspec.structs.replace(
        state,
        target=target,
        direction=direction,
        grown_s=now_s if direction == UP else state.grown_s,
        reversed_s=now_s if is_reversal else state.reversed_s,
    )


def note_need(state: ModelState, num_groups: int, shrink_after_s: float, now_s: float) -> ModelState:
    """Remember how many groups are needed, for as long as shrinking looks back."""
    kept = [need for need in state.needs if need.at_s > now_s - shrink_after_s and need.num_groups > num_groups]
    return msgspec.structs.replace(state, needs=(*kept, Need(now_s, num_groups)))


def is_reversal_due(state: ModelState, direction: int, policy: ModelPolicy, now_s: float) -> bool:
    """Whether to change in this direction now. To go on in the last one always is."""
    if state.direction in (0, direction) or state.reversed_s is None:
        return True
    return now_s - state.reversed_s >= policy.cooldown_s


def is_shrink_due(state: ModelState, policy: ModelPolicy, shrink_after_s: float, now_s: float) -> bool:
    """Whether enough of the past is known, and the last growth is long enough ago to have shown what it is good for."""
    known_s = math.fsum(sample.length_s for sample in state.samples if sample.at_s > now_s - shrink_after_s)
    has_settled = state.grown_s is None or now_s - state.grown_s >= shrink_after_s
    return known_s >= KNOWN_SHARE * shrink_after_s and has_settled and is_reversal_due(state, DOWN, policy, now_s)


def forget_the_future(state: ModelState, now_s: float) -> ModelState:
    """The clock was set back: what is from later than now cannot be compared with anything any more."""

    def clamped(at_s: float | None) -> float | None:
        return None if at_s is None else min(at_s, now_s)

    return msgspec.structs.replace(
        state,
        samples=(),
        seen={},
        needs=(),
        grown_s=clamped(state.grown_s),
        reversed_s=clamped(state.reversed_s),
        busy_s=clamped(state.busy_s),
    )
