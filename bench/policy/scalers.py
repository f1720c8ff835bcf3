"""Our policy, and an oracle, as the simulator drives them."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.policy.fleet import GroupModel
from bench.policy.simulator import MAX_GROUPS, MIN_GROUPS, PERIOD_S, TPOT_S, TTFT_S, Seen
from bench.policy.workload import SLOT_S, Trace
from cluster.policy import (
    Cause,
    GatewayLoad,
    GatewayObservation,
    ModelObservation,
    ModelPolicy,
    Observation,
    PolicyConfig,
    PolicyState,
    decide,
)
from cluster.policy.capacity import capacity_of
from cluster.policy.state import GroupTraits

_MODEL = "model"


class Packtrain:
    """cluster.policy with its default settings."""

    name = "packtrain"
    grace_s = math.inf
    """What a group has runs to its end."""

    def __init__(self, policy: ModelPolicy | None = None) -> None:
        self._config = PolicyConfig(
            models={
                _MODEL: policy
                or ModelPolicy(min_groups=MIN_GROUPS, max_groups=MAX_GROUPS, ttft_p99_s=TTFT_S, tpot_p99_s=TPOT_S)
            }
        )
        self._state = PolicyState()
        self.reasons: list[tuple[float, Cause, str]] = []

    def __call__(self, seen: Seen) -> tuple[int, tuple[str, ...]]:
        gateway = GatewayLoad(
            measured_s=seen.now_s,
            num_sequences=seen.num_requests,
            num_prompt_tokens=seen.num_prompt_tokens,
            num_held=seen.num_held,
            num_held_tokens=seen.num_held_tokens,
        )
        observed = ModelObservation(
            target=seen.target,
            groups=seen.groups,
            gateways=(GatewayObservation(gateway="gateway", load=gateway),),
        )
        decision, self._state = decide(Observation(models={_MODEL: observed}), self._state, self._config, seen.now_s)
        made = decision.models[_MODEL]
        if made.target != made.before:
            self.reasons.append((seen.now_s, made.cause, made.reason))
        return made.target, made.victims


class Oracle:
    """Knows how many requests are to be expected, the lengths' means and what a group can do, and never errs about them.

    Blind to what comes, it learns of a rise when it happens, and a start takes as long for it as for anybody. It keeps a group
    that it will need again within the time that two starts take. Seeing ahead, it has ordered every group before it is needed.
    `margin` is what it provides beyond the mean, for chance.
    """

    grace_s = math.inf

    def __init__(self, trace: Trace, model: GroupModel, *, sees_ahead: bool, margin: float) -> None:
        self.name = "oracle, sees ahead" if sees_ahead else "oracle"
        needed = np.ceil(trace.intensity * (1 + margin) / group_capacity(trace, model) - 1e-9)
        needed = np.clip(needed, MIN_GROUPS, MAX_GROUPS)
        self._needed = _highest_ahead(needed, int((model.start_s + PERIOD_S) / SLOT_S)) if sees_ahead else needed
        self._kept = _highest_ahead(self._needed, int(2 * model.start_s / SLOT_S))

    def __call__(self, seen: Seen) -> tuple[int, tuple[str, ...]]:
        slot = min(int(seen.now_s / SLOT_S), len(self._needed) - 1)
        idle_first = sorted(seen.groups, key=lambda g: g.load.num_open if g.load else -1)
        target = max(self._needed[slot], min(seen.target, self._kept[slot]))
        return int(target), tuple(group.group for group in idle_first)


def group_capacity(trace: Trace, model: GroupModel) -> float:
    """Requests a second that a group serves within the service level, by the formula of cluster.policy.capacity."""
    traits = GroupTraits(
        line=model.line,
        mean_output_tokens=float(np.mean(trace.num_output_tokens)),
        cached_share=0.0,
        max_num_seqs=model.max_num_seqs,
        kv_cache_tokens=model.kv_cache_tokens,
    )
    policy = ModelPolicy(max_groups=MAX_GROUPS, ttft_p99_s=TTFT_S, tpot_p99_s=TPOT_S)
    return capacity_of(traits, float(np.mean(trace.num_prompt_tokens)), policy).rate


def _highest_ahead(values: NDArray[np.float64], num: int) -> NDArray[np.float64]:
    """The maximum over each slot and the next `num`."""
    if num == 0:
        return values
    padded = np.concatenate([values, np.full(num, values[-1])])
    highest: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(padded, num + 1).max(axis=1)
    return highest


def margins() -> Sequence[float]:
    """What the oracles are tried with."""
    return (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45)
