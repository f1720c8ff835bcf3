"""How many groups a model needs when a group that is started now can serve."""

import math
from dataclasses import dataclass

from cluster.policy.capacity import Capacity, capacity_of, margin_for_bursts
from cluster.policy.config import ModelPolicy
from cluster.policy.decision import Cause
from cluster.policy.demand import Demand, backlog_s, forecast, mean_prompt_tokens, start_time_s
from cluster.policy.observation import GatewayLoad, GroupLoad, GroupObservation, Phase
from cluster.policy.state import GroupTraits, ModelState

NEGLIGIBLE = 0.12
"""Part of a group that is not started a group for. Otherwise a need that is near a whole number starts and stops one again and
again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """The need, and the numbers that it comes from."""

    capacity: Capacity
    demand: Demand
    ahead_s: float
    """How long a start takes."""
    margin: float
    """By how much more than the demand to provide, for bursts."""
    backlog_s: float
    """Seconds of service that will still wait then."""
    by_demand: float
    """Groups needed for what arrives."""
    by_backlog: float
    """Groups needed to catch up as well, while each holds all that it can."""
    by_kv_cache: float
    """Groups needed to hold the contexts."""

    @property
    def needed(self) -> int:
        """Groups, without any bound."""
        by_rate = math.ceil(max(self.by_demand, self.by_backlog) - NEGLIGIBLE)
        return max(by_rate, math.ceil(self.by_kv_cache - 1e-9))

    @property
    def cause(self) -> Cause:
        """Which of the three is the most."""
        if self.by_kv_cache > max(self.by_demand, self.by_backlog):
            return Cause.KV_CACHE
        return Cause.BACKLOG if math.ceil(self.by_backlog) > math.ceil(self.by_demand) else Cause.DEMAND

    def tpot_s(self, num_groups: int) -> float | None:
        """None where it would grow without bound."""
        time_s = self.capacity.tpot_s(self.demand.at_ready / num_groups) if num_groups else math.inf
        return time_s if time_s < math.inf else None

    def ttft_s(self, num_groups: int) -> float | None:
        """None where it would grow without bound."""
        if not num_groups:
            return None
        time_s = self.capacity.ttft_s(self.demand.at_ready / num_groups, self.backlog_s / num_groups)
        return time_s if time_s < math.inf else None

    @property
    def sentence(self) -> str:
        """The numbers."""
        waiting = f"; {self.backlog_s:.1f} s of it will wait by then" if self.backlog_s >= 0.05 else ""
        return (
            f"{self.demand.now:.2f} s of service arrive a second and {self.demand.at_ready:.2f} in {self.ahead_s:.0f} s, "
            f"with {self.margin:.0%} more for bursts{waiting}; a group does {self.capacity.utilisation:.2f} within "
            f"{self.capacity.limit}; groups needed: {self.by_demand:.2f} for what arrives, {self.by_backlog:.2f} to catch up, "
            f"{self.by_kv_cache:.2f} for the KV cache"
        )


def look_ahead(
    observed: tuple[GroupObservation, ...],
    groups: list[GroupLoad],
    gateways: dict[str, GatewayLoad],
    traits: GroupTraits,
    state: ModelState,
    policy: ModelPolicy,
    now_s: float,
) -> Outlook:
    """From all that is known; `groups` and `gateways` are the reports that can be believed."""
    num_held = sum(load.num_held for load in gateways.values())
    held_tokens = sum(load.num_held_tokens for load in gateways.values())
    capacity = capacity_of(traits, mean_prompt_tokens(state.samples, num_held, held_tokens), policy)
    ahead_s = start_time_s(state, policy)
    demand = forecast(state.samples, state.blocks, ahead_s, capacity, now_s)
    margin = margin_for_bursts(demand.at_ready / capacity.service_s, demand.dispersion, demand.wander, capacity, policy)
    provided = demand.at_ready * (1 + margin)
    waiting_s = backlog_s(groups, gateways, capacity) + demand.now * ahead_s
    waiting_s = max(0.0, waiting_s - capacity.saturation * _running_s(observed, ahead_s, now_s))
    catch_up_s = max(policy.ttft_p99_s, ahead_s)
    growth = demand.at_ready / demand.now if demand.now > 0 else 1.0
    kv_tokens = math.fsum(load.kv_usage * load.kv_cache_tokens for load in groups)
    return Outlook(
        capacity=capacity,
        demand=demand,
        ahead_s=ahead_s,
        margin=margin,
        backlog_s=waiting_s,
        by_demand=provided / capacity.utilisation,
        by_backlog=(demand.at_ready + waiting_s / catch_up_s) / capacity.saturation,
        by_kv_cache=growth * kv_tokens / (policy.max_kv_usage * traits.kv_cache_tokens),
    )


def _running_s(observed: tuple[GroupObservation, ...], ahead_s: float, now_s: float) -> float:
    """Seconds that the groups there are will run in the next `ahead_s`, all together; starting ones from when they are ready."""
    running_s = 0.0
    for group in observed:
        if group.phase is Phase.RUNNING:
            running_s += ahead_s
        elif group.phase is Phase.STARTING:
            running_s += min(max(0.0, now_s - group.since_s), ahead_s)
    return running_s
