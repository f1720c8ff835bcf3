"""Who decides how many groups there are: the autoscaler's own policy, or Ray Serve's rule to compare it with."""

import math
from collections import deque
from collections.abc import Sequence

from bench.simulation.clock import TICK_S
from bench.simulation.fleet import Controller, Fleet
from bench.simulation.parts import MODEL, GroupShape, Member
from bench.simulation.scenario import Scaling
from cluster.policy import (
    GatewayLoad,
    GatewayObservation,
    GroupLoad,
    GroupObservation,
    ModelObservation,
    ModelPolicy,
    Observation,
    Phase,
    PolicyConfig,
    PolicyState,
    StepLine,
    decide,
)


def make_controller(scaling: Scaling | None) -> Controller | None:
    """Of a scenario; None keeps the number of groups."""
    if scaling is None:
        return None
    return OngoingController(scaling) if scaling.policy == "ongoing" else PolicyController(scaling)


def step_line(shape: GroupShape, mean_context_tokens: float) -> StepLine:
    """The straight line that a leader would fit to steps of this cost: from one sequence to a full batch, and over prompt tokens
    up to a full step."""
    cost, batch, chunk = shape.costs.cost, shape.scheduler.max_num_seqs, shape.scheduler.max_num_batched_tokens
    base_s = cost.tokens_s(1)
    a_sequence_s = cost.row_s + cost.context_s * mean_context_tokens
    if batch > 1:
        a_sequence_s += (cost.tokens_s(batch) - base_s) / (batch - 1)
    prompt_token_s = (cost.tokens_s(chunk) - base_s) / max(1, chunk - 1) + cost.pair_s * mean_context_tokens / 2
    return StepLine(base_s=base_s, sequence_s=a_sequence_s, prompt_token_s=prompt_token_s)


class PolicyController:
    """cluster.policy, told what leaders and gateways would tell it."""

    def __init__(self, scaling: Scaling) -> None:
        self.period_s = scaling.period_s
        self.reasons: list[tuple[float, str]] = []
        """When the number of groups was changed, and why."""
        self._config = PolicyConfig(
            models={
                MODEL: ModelPolicy(
                    min_groups=scaling.min_groups,
                    max_groups=scaling.max_groups,
                    ttft_p99_s=scaling.ttft_p99_s,
                    tpot_p99_s=scaling.tpot_p99_s,
                    shrink_after_s=scaling.downscale_delay_s,
                )
            }
        )
        self._state = PolicyState()

    def decide(self, fleet: Fleet) -> tuple[int, Sequence[str]]:
        members = list(fleet.members.values())
        target = sum(member.phase != "draining" for member in members)
        observed = ModelObservation(
            target=target,
            groups=tuple(self._group(fleet, member) for member in members),
            gateways=tuple(
                GatewayObservation(
                    gateway=gateway.name,
                    load=GatewayLoad(
                        measured_s=fleet.clock.now_s,
                        num_sequences=gateway.num_sequences,
                        num_prompt_tokens=gateway.num_prompt_tokens,
                    ),
                )
                for gateway in fleet.gateways
            ),
        )
        decision, self._state = decide(
            Observation(models={MODEL: observed}), self._state, self._config, fleet.clock.now_s
        )
        made = decision.models[MODEL]
        if made.target != made.before:
            self.reasons.append((fleet.clock.now_s, made.reason))
        return made.target, made.victims

    def _group(self, fleet: Fleet, member: Member) -> GroupObservation:
        shape, phase, since_s = fleet.spec.shape, Phase(member.phase), member.since_tick * TICK_S
        if phase is Phase.STARTING:
            return GroupObservation(group=member.name, phase=phase, since_s=since_s)
        stats = member.group.engine.stats
        lengths = member.group.engine.answer_lengths
        mean_output = lengths.mean()
        prompts = max(1, stats.num_finished_stop + stats.num_finished_length + stats.num_running)
        context = stats.num_prompt_tokens / prompts + (mean_output or 0.0) / 2
        load = GroupLoad(
            measured_s=fleet.clock.now_s,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens,
            kv_usage=stats.kv_usage,
            max_num_seqs=shape.scheduler.max_num_seqs,
            kv_cache_tokens=shape.cache.num_tokens,
            line=None if mean_output is None else step_line(shape, context),
            mean_output_tokens=mean_output,
            num_ended_answers=lengths.num_ended,
            cached_share=stats.num_prefix_hit_tokens / max(1, stats.num_prefix_query_tokens),
        )
        start_s = None if member.start_ticks is None else member.start_ticks * TICK_S
        return GroupObservation(group=member.name, phase=phase, since_s=since_s, load=load, start_s=start_s)


class OngoingController:
    """Ray Serve's default: open requests over target_ongoing, once that has been asked for long enough without a break."""

    def __init__(self, scaling: Scaling) -> None:
        self.period_s = scaling.period_s
        self._scaling = scaling
        self._asked: deque[tuple[float, int]] = deque()
        """(time, groups) of the longest delay."""

    def decide(self, fleet: Fleet) -> tuple[int, Sequence[str]]:
        scaling, now_s = self._scaling, fleet.clock.now_s
        standing = [member for member in fleet.members.values() if member.phase != "draining"]
        num_open = sum(len(member.jobs) for member in standing)
        wanted = min(max(math.ceil(num_open / scaling.target_ongoing), scaling.min_groups), scaling.max_groups)
        self._asked.append((now_s, wanted))
        longest_s = max(scaling.upscale_delay_s, scaling.downscale_delay_s)
        while self._asked and self._asked[0][0] < now_s - longest_s:
            self._asked.popleft()
        target = len(standing)
        if now_s >= scaling.upscale_delay_s:
            lately = [groups for at_s, groups in self._asked if at_s >= now_s - scaling.upscale_delay_s]
            target = max(target, min(lately))
        if target == len(standing) and now_s >= scaling.downscale_delay_s:
            since = [groups for at_s, groups in self._asked if at_s >= now_s - scaling.downscale_delay_s]
            target = min(target, max(since))
        # Serve stops those that do not run yet first, and otherwise the newest.
        order = sorted(standing, key=lambda member: (member.phase == "running", -member.born_tick))
        return target, [member.name for member in order]
