"""The decision for all models: what each wants, and what it gets of the accelerators that they share."""

from dataclasses import replace

from cluster.policy.budget import Claim, share
from cluster.policy.config import ModelPolicy, PolicyConfig
from cluster.policy.decision import Cause, Decision, ModelDecision
from cluster.policy.observation import ModelObservation, Observation, Phase
from cluster.policy.state import ModelState, PolicyState
from cluster.policy.victims import choose_victims
from cluster.policy.wants import Want, want_of


def decide(
    observation: Observation, state: PolicyState, config: PolicyConfig, now_s: float
) -> tuple[Decision, PolicyState]:
    """How many groups each model should have. `now_s` is of the clock that the observation's times are from.

    A model that is observed and not configured, or the reverse, is left out.
    """
    was_set_back = state.now_s is not None and now_s < state.now_s
    wants: dict[str, Want] = {}
    claims: dict[str, Claim] = {}
    for model, policy in config.models.items():
        observed = observation.models.get(model)
        if observed is None:
            continue
        before = state.models.get(model, ModelState())
        wants[model] = want_of(observed, before, policy, now_s, was_set_back=was_set_back)
        claims[model] = _claim(observed, wants[model], policy)
    granted = share(
        {model: _as_it_is(claim) if model in config.advised else claim for model, claim in claims.items()},
        observation.num_accelerators,
    )
    advised = config.advised & claims.keys()
    if advised:
        granted |= {
            model: num for model, num in share(claims, observation.num_accelerators).items() if model in advised
        }
    models = {model: _decided(observation, model, want, claims[model], granted[model]) for model, want in wants.items()}
    return (
        Decision(now_s=now_s, models=models),
        PolicyState(models={model: want.state for model, want in wants.items()}, now_s=now_s),
    )


def _claim(observed: ModelObservation, want: Want, policy: ModelPolicy) -> Claim:
    num_draining = sum(group.phase is Phase.DRAINING for group in observed.groups)
    num_standing = len(observed.groups) - num_draining
    return Claim(
        wanted=want.wanted,
        target=observed.target,
        num_held=max(observed.target, num_standing) + num_draining,
        min_groups=policy.min_groups,
        per_group=policy.accelerators_per_group,
        priority=policy.priority,
        may_shrink=want.may_shrink,
    )


def _as_it_is(claim: Claim) -> Claim:
    """Of a model whose number of groups is not changed, whatever is decided."""
    return replace(claim, wanted=claim.target, min_groups=0, may_shrink=False)


def _decided(observation: Observation, model: str, want: Want, claim: Claim, num_groups: int) -> ModelDecision:
    observed, cause, reason = observation.models[model], want.cause, want.reason
    if num_groups != want.wanted:
        cause = Cause.BUDGET
        reason = (
            f"{want.wanted} groups of {claim.per_group:g} are wanted and {num_groups} fit into "
            f"{observation.num_accelerators:g} accelerators beside other models; {reason}"
        )
    is_change = num_groups != observed.target
    return ModelDecision(
        target=num_groups,
        before=observed.target,
        cause=cause,
        reason=f"{observed.target} → {num_groups}: {reason}" if is_change else f"stays at {num_groups}: {reason}",
        victims=choose_victims(observed.groups, observed.target - num_groups),
        warnings=want.warnings,
        demand_s=want.outlook.demand.at_ready if want.outlook else None,
        capacity_s=want.outlook.capacity.utilisation if want.outlook else None,
        predicted_ttft_s=want.outlook.ttft_s(num_groups) if want.outlook else None,
        predicted_tpot_s=want.outlook.tpot_s(num_groups) if want.outlook else None,
    )
