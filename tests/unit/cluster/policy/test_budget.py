"""Models that share accelerators: whole groups or none, and nobody gives one up for nothing."""

from dataclasses import replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy import ModelPolicy, Observation, PolicyConfig, PolicyState, decide
from cluster.policy.budget import Claim, share
from tests.support.policy_story import RATE_OF_A_GROUP, Story


def claim(wanted: int, target: int, *, per_group: float = 1, priority: int = 0, min_groups: int = 0) -> Claim:
    return Claim(
        wanted=wanted,
        target=target,
        num_held=target,
        min_groups=min_groups,
        per_group=per_group,
        priority=priority,
        may_shrink=True,
    )


def settled(claims: dict[str, Claim], num_accelerators: float) -> list[dict[str, int]]:
    """What is granted look after look, when each time all is done until the next."""
    granted = []
    for _ in range(12):
        granted.append(share(claims, num_accelerators))
        claims = {
            model: replace(one, target=granted[-1][model], num_held=granted[-1][model]) for model, one in claims.items()
        }
    return granted


def test_nothing_is_given_up_for_a_group_that_cannot_be() -> None:
    claims = {"big": claim(1, 0, per_group=8, priority=1), "small": claim(8, 8, min_groups=1)}
    assert share(claims, 8) == {"big": 0, "small": 8}
    assert share(claims | {"small": claim(8, 8)}, 8) == {"big": 0, "small": 0}, "all of it is enough"


def test_one_group_of_several_is_not_refused_for_the_others() -> None:
    claims = {"big": claim(3, 1, per_group=4, priority=1), "small": claim(8, 8)}
    assert [settled(claims, 12)[place] for place in (0, 1, -1)] == [
        {"big": 1, "small": 0},
        {"big": 3, "small": 0},
        {"big": 3, "small": 0},
    ]
    claims = {"big": claim(3, 1, per_group=4, priority=1), "small": claim(8, 8, min_groups=3)}
    assert settled(claims, 12)[-1] == {"big": 2, "small": 4}, "the second is whole, and a third one would not be"


def test_what_is_held_beyond_the_budget_is_given_up() -> None:
    claims = {"first": claim(3, 3, priority=1), "last": claim(3, 3, min_groups=1)}
    assert share(claims, 5) == {"first": 3, "last": 2}
    assert share(claims, 2) == {"first": 1, "last": 1}
    claims["last"] = replace(claims["last"], may_shrink=False)
    assert share(claims, 5) == {"first": 2, "last": 3}


drawn = st.builds(
    lambda wanted, target, extra, per_group, priority, min_groups: Claim(
        wanted=max(wanted, min_groups),
        target=target,
        num_held=target + extra,
        min_groups=min_groups,
        per_group=per_group,
        priority=priority,
        may_shrink=True,
    ),
    wanted=st.integers(0, 6),
    target=st.integers(0, 6),
    extra=st.sampled_from([0, 0, 0, 1, 2]),
    per_group=st.sampled_from([1, 2, 4, 8]),
    priority=st.integers(0, 2),
    min_groups=st.integers(0, 2),
)


@given(claims=st.dictionaries(st.sampled_from("abcd"), drawn, min_size=1), num_accelerators=st.integers(1, 40))
def test_groups_come_to_rest_within_the_budget(claims: dict[str, Claim], num_accelerators: int) -> None:
    looks = settled(claims, num_accelerators)
    assert looks[-1] == looks[-2] == looks[-3], "groups go to and fro although nothing changes"
    least = sum(min(one.min_groups, one.target) * one.per_group for one in claims.values())
    for granted in looks:
        assert all(0 <= granted[model] <= max(one.wanted, one.target) for model, one in claims.items())
        assert sum(granted[model] * one.per_group for model, one in claims.items()) <= max(num_accelerators, least)
    has_grown = any(looks[-1][model] > one.target for model, one in claims.items())
    is_within = sum(one.num_held * one.per_group for one in claims.values()) <= num_accelerators
    if is_within and not has_grown:
        for model, one in claims.items():
            assert looks[-1][model] == min(one.wanted, one.target), f"{model} has given up a group for nobody"


def test_advice_takes_nothing_from_models_that_are_scaled() -> None:
    policy = ModelPolicy(min_groups=1, max_groups=4, ttft_p99_s=1.0, tpot_p99_s=0.05)
    served = Story(policy, num_groups=4, rate=3.5 * RATE_OF_A_GROUP)
    served.run(300)
    looked_at = Story(msgspec.structs.replace(policy, priority=1), num_groups=1, rate=3 * RATE_OF_A_GROUP)
    models = {"served": served.policy, "looked at": looked_at.policy}

    def last_decision(advised: frozenset[str]) -> dict[str, int]:
        state, targets = PolicyState(), {}
        for _ in range(60):
            looked_at.now_s = served.now_s
            for story in (served, looked_at):
                story.is_advice = True
                story.tick()
            looked = Observation(
                models={"served": served.observed(), "looked at": looked_at.observed()}, num_accelerators=5
            )
            config = PolicyConfig(models=models, advised=advised)
            decision, state = decide(looked, state, config, served.now_s)
            targets = {model: made.target for model, made in decision.models.items()}
        return targets

    told = last_decision(frozenset({"looked at"}))
    assert told["served"] == 4
    assert last_decision(frozenset())["served"] < 4, "a model of higher priority that is scaled does take groups"
