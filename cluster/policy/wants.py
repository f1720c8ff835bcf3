"""What one model wants before accelerators are shared: more now, fewer after a proven past, or no change, and why."""

import math
from dataclasses import dataclass, field

import msgspec

from cluster.policy import hysteresis
from cluster.policy.capacity import replay
from cluster.policy.checks import fresh_gateways, fresh_groups
from cluster.policy.config import ModelPolicy
from cluster.policy.decision import Cause
from cluster.policy.demand import (
    MAX_START_TIMES,
    remember,
    remember_block,
    shrink_after_s,
    start_time_s,
    take_sample,
    traits_of,
)
from cluster.policy.observation import GatewayLoad, GroupLoad, ModelObservation, Phase
from cluster.policy.outlook import Outlook, look_ahead
from cluster.policy.state import ModelState

LONGEST_SAMPLE = 2.0
"""Times `stale_after_s`. After a longer gap the mean hides too much of what was in it."""
STARTS_BACK = 4
"""To look one start time ahead, the trend is taken over so many at least."""
ENOUGH_WITHIN = 0.99
"""Share of requests that the service level is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """What a model wants, and why."""

    wanted: int
    """Groups."""
    cause: Cause
    reason: str
    warnings: tuple[str, ...]
    may_shrink: bool
    """Groups may be taken from it for another model."""
    state: ModelState
    outlook: Outlook | None


@dataclass(kw_only=True, slots=True)
class _Case:
    """One model at one time."""

    observed: ModelObservation
    policy: ModelPolicy
    now_s: float
    state: ModelState
    groups: list[GroupLoad]
    gateways: dict[str, GatewayLoad]
    warnings: list[str]
    is_certain: bool
    """All groups and gateways have told something that can be believed."""
    outlook: Outlook | None = field(default=None)

    def want(self, num_groups: int, cause: Cause, reason: str) -> Want:
        """Within the bounds, whatever was computed."""
        return Want(
            wanted=min(max(num_groups, self.policy.min_groups), self.policy.max_groups),
            cause=cause,
            reason=reason,
            warnings=tuple(self.warnings),
            may_shrink=self.is_certain
            and hysteresis.is_reversal_due(self.state, hysteresis.DOWN, self.policy, self.now_s),
            state=self.state,
            outlook=self.outlook,
        )

    @property
    def has_work(self) -> bool:
        """Something has arrived, or is there."""
        return self.state.busy_s == self.now_s

    @property
    def num_held(self) -> int:
        """Sequences that wait in gateways."""
        return sum(load.num_held for load in self.gateways.values())


def want_of(
    observed: ModelObservation, before: ModelState, policy: ModelPolicy, now_s: float, *, was_set_back: bool
) -> Want:
    """`was_set_back`: the clock shows less than at the last decision."""
    if was_set_back:
        before = hysteresis.forget_the_future(before, now_s)
    groups, group_problems = fresh_groups(observed.groups, now_s, policy.stale_after_s)
    gateways, gateway_problems = fresh_gateways(observed.gateways, now_s, policy.stale_after_s)
    case = _Case(
        observed=observed,
        policy=policy,
        now_s=now_s,
        state=_learn(observed, before, policy, groups, gateways, now_s),
        groups=groups,
        gateways=gateways,
        warnings=[*group_problems, *gateway_problems],
        is_certain=not group_problems and not gateway_problems,
    )
    target = observed.target
    if not policy.min_groups <= target <= policy.max_groups:
        bounds = f"min_groups is {policy.min_groups} and max_groups {policy.max_groups}"
        return case.want(target, Cause.BOUNDS, f"{target} groups were ordered; {bounds}")
    if was_set_back:
        return case.want(target, Cause.CLOCK, "the clock was set back, and the past is measured anew")
    is_running = any(group.phase is Phase.RUNNING for group in observed.groups)
    if not gateways or (is_running and not groups):
        return case.want(
            target, Cause.NO_METRICS, "nothing is changed without metrics: " + "; ".join(case.warnings[:3])
        )
    if idle := _idle(case):
        return idle
    if case.state.traits is None:
        return _unmeasured(case)
    case.outlook = look_ahead(observed.groups, groups, gateways, case.state.traits, case.state, policy, now_s)
    return _measured(case, case.outlook)


def _learn(
    observed: ModelObservation,
    before: ModelState,
    policy: ModelPolicy,
    groups: list[GroupLoad],
    gateways: dict[str, GatewayLoad],
    now_s: float,
) -> ModelState:
    """The state with what the observation adds."""
    state = hysteresis.observe_target(before, observed.target, now_s)
    known = {gateway.gateway for gateway in observed.gateways}
    seen, sample = take_sample(state, gateways, groups, now_s)
    starts = [group for group in observed.groups if group.start_s is not None and group.group not in state.started]
    running = [group for group in observed.groups if group.phase is Phase.RUNNING]
    busy_s, longest_s = state.busy_s, LONGEST_SAMPLE * policy.stale_after_s
    is_open = any(load.num_open for load in groups) or any(load.num_held for load in gateways.values())
    if is_open or (sample is not None and sample.num_sequences > 0):
        busy_s = now_s
    elif running and all(group in starts for group in running):
        busy_s = now_s  # Only from now on somebody could be answered.
    elif busy_s is None or (sample is None and _last_seen_s(before) < now_s - longest_s):
        busy_s = now_s  # Nobody knows whether something came.
    elif sample is not None and sample.length_s > longest_s:
        busy_s = min(now_s, busy_s + sample.length_s)  # The clock may have been set, and so this is no idle time.
    if sample is not None and sample.length_s > longest_s:
        sample = None
    # A start that took longer was stuck, waiting for a machine perhaps, and says nothing of the next one.
    start_times_s = [
        min(group.start_s, policy.start_timeout_s)
        for group in starts
        if group.start_s is not None and 0 < group.start_s < math.inf
    ]
    window_s = max(shrink_after_s(state, policy), STARTS_BACK * start_time_s(state, policy))
    return msgspec.structs.replace(
        state,
        samples=remember(state.samples, sample, now_s, window_s),
        blocks=remember_block(state.blocks, sample, start_time_s(state, policy)),
        seen={gateway: totals for gateway, totals in seen.items() if gateway in known},
        traits=traits_of(groups, state.traits),
        start_times_s=(*state.start_times_s, *start_times_s)[-MAX_START_TIMES:],
        started=frozenset(group.group for group in observed.groups if group.start_s is not None),
        busy_s=busy_s,
    )


def _last_seen_s(state: ModelState) -> float:
    """When a gateway last told what had arrived."""
    return max((seen.measured_s for seen in state.seen.values()), default=math.inf)


def _idle(case: _Case) -> Want | None:
    """Whether the model can go to sleep."""
    policy, state, now_s = case.policy, case.state, case.now_s
    if policy.min_groups or not case.observed.target or not case.is_certain or state.busy_s is None:
        return None
    idle_s = now_s - state.busy_s
    is_running = any(group.phase is Phase.RUNNING for group in case.observed.groups)
    # A start may take longer than `idle_s`, and would never come to its end. One that is stuck is not waited for.
    least_s = policy.idle_s if is_running else max(policy.idle_s, policy.start_timeout_s)
    if idle_s < least_s or not hysteresis.is_reversal_due(state, hysteresis.DOWN, policy, now_s):
        return None
    return case.want(0, Cause.IDLE, f"nobody has asked for {idle_s:.0f} s and idle_s is {policy.idle_s:g}")


def _unmeasured(case: _Case) -> Want:
    if not case.observed.target and case.num_held:
        return case.want(1, Cause.WAKE, f"{case.num_held} sequences wait for a first group")
    return case.want(case.observed.target, Cause.NOT_MEASURED, "no group has measured its steps and answers yet")


def _measured(case: _Case, outlook: Outlook) -> Want:
    target = case.observed.target
    if not target:
        if not case.has_work:
            return case.want(0, Cause.STEADY, "the model sleeps, and nobody asks for it")
        return case.want(max(1, outlook.needed), Cause.WAKE, f"{case.num_held} sequences wait; {outlook.sentence}")
    if outlook.capacity.unreachable:
        case.warnings.append(
            f"no number of groups keeps the service level, and none is started for it: {outlook.capacity.unreachable}"
        )
    needed = max(outlook.needed, 1)
    past_s = shrink_after_s(case.state, case.policy)
    case.state = hysteresis.note_need(case.state, needed, past_s, case.now_s)
    if needed > case.policy.max_groups:
        case.warnings.append(f"{needed} groups are needed and max_groups is {case.policy.max_groups}")
    if min(needed, case.policy.max_groups) > target:
        return _grow(case, outlook, needed)
    return _shrink_if_proven(case, outlook, past_s)


def _grow(case: _Case, outlook: Outlook, needed: int) -> Want:
    policy, target, now_s = case.policy, case.observed.target, case.now_s
    stuck = [
        f"the start of group {group.group} is under way for {now_s - group.since_s:.0f} s, start_timeout_s is "
        f"{policy.start_timeout_s:g}"
        for group in case.observed.groups
        if group.phase is Phase.STARTING and now_s - group.since_s > policy.start_timeout_s
    ]
    if stuck:
        case.warnings.extend(stuck)
        return case.want(
            target, Cause.STUCK_START, f"{needed} are needed, and more would wait for room as well: {stuck[0]}"
        )
    if not hysteresis.is_reversal_due(case.state, hysteresis.UP, policy, now_s):
        return case.want(
            target, Cause.COOLDOWN, f"{needed} are needed, cooldown_s is {policy.cooldown_s:g}: {outlook.sentence}"
        )
    return case.want(needed, outlook.cause, outlook.sentence)


def _shrink_if_proven(case: _Case, outlook: Outlook, past_s: float) -> Want:
    """The fewest groups that would have kept the service level through the last minutes, and were ever enough in that time."""
    policy, target = case.policy, case.observed.target
    least = max(case.state.needs[0].num_groups, policy.min_groups, 1)
    if least >= target or not case.is_certain:
        return case.want(target, Cause.STEADY, outlook.sentence)
    if not hysteresis.is_shrink_due(case.state, policy, past_s, case.now_s):
        reason = f"{least} may do, if they are for {past_s:.0f} s: {outlook.sentence}"
        return case.want(target, Cause.STEADY, reason)
    since_s = case.now_s - past_s
    low, high = least, target  # `high` is enough, since no fewer are asked for
    while low < high:
        middle = (low + high) // 2
        past = replay(case.state.samples, since_s, middle, outlook.capacity, policy)
        if past.share_within >= ENOUGH_WITHIN:
            high = middle
        else:
            low = middle + 1
    past = replay(case.state.samples, since_s, min(high, target - 1), outlook.capacity, policy)
    numbers = (
        f"the last {past_s:.0f} s on {min(high, target - 1)} have {past.share_within:.1%} of the requests in time, the "
        f"worst TTFT {past.worst_ttft_s:.2f} s and TPOT {past.worst_tpot_s * 1e3:.0f} ms"
    )
    if high == target:
        return case.want(target, Cause.STEADY, f"{numbers}; {outlook.sentence}")
    rest = _outlook_of_those_left(case, high)
    if rest.needed > high:
        reason = f"{numbers}; but those with the longest answers may be the ones that stay: {rest.sentence}"
        return case.want(target, Cause.STEADY, reason)
    return case.want(high, Cause.FEWER_SUFFICE, f"{numbers}; {outlook.sentence}")


def _outlook_of_those_left(case: _Case, num_left: int) -> Outlook:
    """What will be asked for when so many groups are left, whichever those are. What has arrived is priced by the mean length of
    answers, each group knows that of its own alone, and what a stopped group knew is gone."""
    traits = case.state.traits
    if traits is None:
        raise AssertionError("nothing is shrunk that was not measured")
    lengths = sorted((load.mean_output_tokens or 0.0 for load in case.groups), reverse=True)[:num_left]
    mean = math.fsum(lengths) / max(1, len(lengths))
    longer = msgspec.structs.replace(traits, mean_output_tokens=max(traits.mean_output_tokens, mean))
    return look_ahead(case.observed.groups, case.groups, case.gateways, longer, case.state, case.policy, case.now_s)
