"""Random histories: what no decision may ever do, and that the checker would notice."""

from collections.abc import Callable

import msgspec
import pytest

from cluster.policy import Decision, Observation, PolicyConfig, PolicyState, decide
from tests.support.effort import by_day, is_night
from tests.support.policy_worlds import ViolationError, World

NUM_PARTS = 20
NUM_BY_DAY, NUM_BY_NIGHT = 20_000, 1_000_000
"""Histories."""


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_no_history_breaks_an_invariant(part: int) -> None:
    for number in range(by_day(NUM_BY_DAY, by_night=NUM_BY_NIGHT) // NUM_PARTS):
        seed = number * NUM_PARTS + part
        try:
            # Most are short, since most of what can go wrong does so at once.
            World(seed, num_ticks=15 if number % 10 == 0 or is_night() else 4).run()
        except Exception as error:
            raise AssertionError(f"history {seed}: {error}") from error


Broken = Callable[[Observation, PolicyState, PolicyConfig, float], tuple[Decision, PolicyState]]


def changed(change: Callable[[Observation, Decision], Decision]) -> Broken:
    """The policy, with its answer changed."""

    def broken(
        observation: Observation, state: PolicyState, config: PolicyConfig, now_s: float
    ) -> tuple[Decision, PolicyState]:
        decision, after = decide(observation, state, config, now_s)
        return change(observation, decision), after

    return broken


def with_config(**fields: object) -> Broken:
    """The policy, told other bounds than it is checked by."""

    def broken(
        observation: Observation, state: PolicyState, config: PolicyConfig, now_s: float
    ) -> tuple[Decision, PolicyState]:
        models = {name: msgspec.structs.replace(policy, **fields) for name, policy in config.models.items()}
        return decide(observation, state, PolicyConfig(models=models), now_s)

    return broken


def without_budget(
    observation: Observation, state: PolicyState, config: PolicyConfig, now_s: float
) -> tuple[Decision, PolicyState]:
    return decide(msgspec.structs.replace(observation, num_accelerators=None), state, config, now_s)


def believing_everything(
    observation: Observation, state: PolicyState, config: PolicyConfig, now_s: float
) -> tuple[Decision, PolicyState]:
    """A group that has told nothing is taken to be idle: what does a missing metric count? 0."""
    models = {}
    for name, observed in observation.models.items():
        answering = tuple(group for group in observed.groups if group.load is not None or group.phase != "running")
        models[name] = msgspec.structs.replace(observed, groups=answering)
    return decide(msgspec.structs.replace(observation, models=models), state, config, now_s)


def forgetting(
    observation: Observation, state: PolicyState, config: PolicyConfig, now_s: float
) -> tuple[Decision, PolicyState]:
    """As after a restart without its state, between any two decisions: no cooldown outlives one."""
    models = {
        name: msgspec.structs.replace(known, reversed_s=None, grown_s=None, direction=0)
        for name, known in state.models.items()
    }
    return decide(observation, msgspec.structs.replace(state, models=models), config, now_s)


def each_model(change: Callable[[object], object]) -> Callable[[Observation, Decision], Decision]:
    return lambda _, decision: msgspec.structs.replace(
        decision, models={name: change(made) for name, made in decision.models.items()}
    )


BROKEN = {
    "one more than the most": changed(each_model(lambda made: msgspec.structs.replace(made, target=made.target + 1))),
    "one fewer than the least": changed(each_model(lambda made: msgspec.structs.replace(made, target=made.target - 1))),
    "no upper bound": with_config(max_groups=50),
    "no lower bound": with_config(min_groups=0, idle_s=1.0, shrink_after_s=1.0, cooldown_s=0.001),
    "no budget": without_budget,
    "missing is idle": believing_everything,
    "no cooldown": forgetting,
    "stale counts": with_config(stale_after_s=1e9),
    "no reason": changed(each_model(lambda made: msgspec.structs.replace(made, reason=""))),
    "the same victim twice": changed(each_model(lambda made: msgspec.structs.replace(made, victims=made.victims * 2))),
    "no victims": changed(each_model(lambda made: msgspec.structs.replace(made, victims=()))),
    "infinite": changed(each_model(lambda made: msgspec.structs.replace(made, predicted_ttft_s=float("inf")))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_checker_finds_a_broken_policy(name: str) -> None:
    with pytest.raises(ViolationError):
        for seed in range(2_000):
            World(seed, decide=BROKEN[name], num_ticks=15).run()
