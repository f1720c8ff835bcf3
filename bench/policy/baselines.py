"""Other systems' rules, after their documents and, for Ray Serve, its source (2.60). Each gets its metrics without delay or loss,
and the setting that suits the simulated group: the number of sequences that it serves within the service level.

Where a rule cannot choose whom to stop, the simulator stops what does not run yet and then the newest, as these systems do.
"""

import math
from collections import deque

from bench.policy.fleet import GroupModel
from bench.policy.simulator import MAX_GROUPS, MIN_GROUPS, PERIOD_S, TPOT_S, TTFT_S, Seen
from cluster.policy import GroupLoad, Phase

NO_VICTIMS: tuple[str, ...] = ()


def loads_of(seen: Seen) -> list[GroupLoad]:
    """Of groups that run and take requests."""
    return [group.load for group in seen.groups if group.phase is Phase.RUNNING and group.load is not None]


class RayServe:
    """`replica_queue_length_autoscaling_policy` with its delays: ongoing requests over what one replica should have, averaged
    over look_back_period_s, up after upscale_delay_s of wanting it all the time and down after downscale_delay_s.

    Ongoing requests are counted as if a stream were one to its end. Stopped replicas are killed after
    graceful_shutdown_timeout_s.
    """

    name = "Ray Serve"
    grace_s = 20.0

    def __init__(
        self,
        target_ongoing_requests: float,
        *,
        look_back_period_s: float = 30.0,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
    ) -> None:
        self._per_replica = target_ongoing_requests
        self._up_s, self._down_s = upscale_delay_s, downscale_delay_s
        self._ongoing: deque[int] = deque(maxlen=max(1, int(look_back_period_s / PERIOD_S)))
        self._wanted_since_s: float | None = None
        self._direction = 0

    def __call__(self, seen: Seen) -> tuple[int, tuple[str, ...]]:
        self._ongoing.append(sum(load.num_open for load in loads_of(seen)) + seen.num_held)
        mean = math.fsum(self._ongoing) / len(self._ongoing)
        current = len(loads_of(seen))
        if not current:
            return max(seen.target, 1 if mean else 0), NO_VICTIMS
        desired = math.ceil(mean / self._per_replica)
        desired = min(max(desired, MIN_GROUPS), MAX_GROUPS)
        return self._delayed(desired, seen.target, seen.now_s), NO_VICTIMS

    def _delayed(self, desired: int, target: int, now_s: float) -> int:
        direction = (desired > target) - (desired < target)
        if direction != self._direction or not direction:
            self._direction, self._wanted_since_s = direction, now_s if direction else None
        if self._wanted_since_s is None:
            return target
        if now_s - self._wanted_since_s < (self._up_s if direction > 0 else self._down_s):
            return target
        self._direction, self._wanted_since_s = 0, None
        return desired


class DynamoPlanner:
    """Aggregated engines, both loops (docs/design-docs/planner-design.md). Every 180 s the throughput loop sets a floor: requests
    expected (the constant predictor: as many as in the last interval) over what an engine does at the SLA. Every 5 s the load
    loop adds one when ALL engines' estimated TTFT or ALL estimated ITL are above the SLA, and takes one away when all of both
    are below 0.8 of it. It orders nothing while a change is under way. Stopped engines abort their streams after 5 s.
    """

    name = "Dynamo planner"
    grace_s = 5.0

    def __init__(
        self, model: GroupModel, rate_of_a_group: float, *, interval_s: float = 180.0, sensitivity: float = 0.8
    ) -> None:
        self._model, self._rate = model, rate_of_a_group
        self._interval_s, self._sensitivity = interval_s, sensitivity
        self._floor, self._next_s, self._num_before = MIN_GROUPS, interval_s, 0

    def __call__(self, seen: Seen) -> tuple[int, tuple[str, ...]]:
        if seen.now_s >= self._next_s:
            expected = (seen.num_requests - self._num_before) / self._interval_s
            self._floor = max(MIN_GROUPS, math.ceil(expected / self._rate))
            self._num_before, self._next_s = seen.num_requests, seen.now_s + self._interval_s
        if any(group.phase is not Phase.RUNNING for group in seen.groups):
            return seen.target, NO_VICTIMS
        line = self._model.line
        ttfts, itls = [], []
        for load in loads_of(seen):
            itl_s = line.step_s(load.num_open)
            itls.append(itl_s)
            num_chunks = math.ceil(load.num_waiting_tokens / self._model.max_num_batched_tokens) or 1
            ttfts.append(num_chunks * itl_s + line.prompt_token_s * load.num_waiting_tokens)
        target = seen.target
        if all(ttft > TTFT_S for ttft in ttfts) or all(itl > TPOT_S for itl in itls):
            target += 1
        elif all(t < TTFT_S * self._sensitivity for t in ttfts) and all(i < TPOT_S * self._sensitivity for i in itls):
            target -= 1
        return max(target, self._floor), NO_VICTIMS


class HorizontalPodAutoscaler:
    """Kubernetes' HPA with its default behaviour: every 15 s replicas = ceil(current · metric / target), nothing within a
    tolerance of a tenth, at most twice as many or four more within 15 s, down to the highest recommendation of the last 300 s.

    Pods have 30 s to end before they are killed.
    """

    name = "HPA, utilisation"
    grace_s = 30.0
    _SYNC_S, _TOLERANCE, _STABILIZATION_S = 15.0, 0.1, 300.0

    def __init__(self, target_utilisation: float = 0.7) -> None:
        self._target_value = target_utilisation
        self._next_s = 0.0
        self._recommended: deque[tuple[float, int]] = deque()

    def ratio(self, seen: Seen) -> float:
        """Metric over its target: here the part of max_num_seqs that runs. (A GPU's own utilisation is 1 at any load.)"""
        loads = loads_of(seen)
        return math.fsum(load.num_running / load.max_num_seqs for load in loads) / len(loads) / self._target_value

    def __call__(self, seen: Seen) -> tuple[int, tuple[str, ...]]:
        if seen.now_s < self._next_s or not loads_of(seen):
            return seen.target, NO_VICTIMS
        self._next_s = seen.now_s + self._SYNC_S
        ratio, num_ready = self.ratio(seen), len(loads_of(seen))
        if ratio > 1 and num_ready < seen.target:  # pods that are not ready count as using nothing
            ratio = max(1.0, ratio * num_ready / seen.target)
            num_ready = seen.target
        wanted = seen.target if abs(ratio - 1) <= self._TOLERANCE else math.ceil(num_ready * ratio)
        wanted = min(max(wanted, MIN_GROUPS), MAX_GROUPS)
        while self._recommended and self._recommended[0][0] < seen.now_s - self._STABILIZATION_S:
            self._recommended.popleft()
        self._recommended.append((seen.now_s, wanted))
        if wanted > seen.target:
            return min(wanted, max(2 * seen.target, seen.target + 4)), NO_VICTIMS
        return min(seen.target, max(number for _, number in self._recommended)), NO_VICTIMS


class KedaOnQueue(HorizontalPodAutoscaler):
    """KEDA's Prometheus scaler on vllm:num_requests_waiting: an HPA on the sum of waiting requests, so many to a replica."""

    name = "KEDA, queue length"

    def __init__(self, threshold: float = 5.0) -> None:
        super().__init__()
        self._threshold = threshold

    def ratio(self, seen: Seen) -> float:
        waiting = sum(load.num_waiting for load in loads_of(seen)) + seen.num_held
        return waiting / self._threshold / len(loads_of(seen))
