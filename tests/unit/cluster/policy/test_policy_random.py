"""Random histories: what no decision may ever do, and that the checker would notice."""

from collections.abc import Callable

import msgspec
import pytest

from cluster.policy import Decision, Observation, PolicyConfig, PolicyState, decide
from tests.support.policy_worlds import ViolationError, World

NUM_BY_DAY = 20_000
NUM_TOGETHER = 1_000
"""Histories of one test."""
NUM_NIGHTLY = 1_000_000


@pytest.mark.parametrize("first", range(0, NUM_BY_DAY, NUM_TOGETHER))
def test_no_history_breaks_an_invariant(first: int) -> None:
    for seed in range(first, first + NUM_TOGETHER):
        run(seed, num_ticks=5)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_no_history_of_a_million_breaks_an_invariant() -> None:
    for seed in range(NUM_BY_DAY, NUM_BY_DAY + NUM_NIGHTLY):
        run(seed)


def run(seed: int, num_ticks: int = 15) -> None:
    try:
        World(seed, num_ticks=num_ticks).run()
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
