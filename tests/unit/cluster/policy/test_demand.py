"""How far the demand wanders, and how soon a fall is seen, on arrivals drawn from a seed."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cluster.policy.capacity import Capacity, capacity_of
from cluster.policy.config import ModelPolicy
from cluster.policy.demand import ENOUGH_ANSWERS, MAX_BLOCKS, MAX_WANDER, forecast, remember, remember_block, traits_of
from cluster.policy.observation import GroupLoad, StepLine
from cluster.policy.state import Block, GroupTraits, Sample
from tests.support.policy_worlds import group_load

PERIOD_S, START_S = 5.0, 90.0
HOUR_S = 3600.0


def capacity() -> Capacity:
    traits = GroupTraits(
        line=StepLine(base_s=0.02, sequence_s=0.0005, prompt_token_s=0.0001),
        mean_output_tokens=100,
        cached_share=0.0,
        max_num_seqs=256,
        kv_cache_tokens=1 << 20,
    )
    return capacity_of(traits, 200, ModelPolicy(max_groups=8))


def arrivals(
    rate_at: Callable[[float], float], until_s: float, seed: int = 1
) -> tuple[Sequence[Sample], Sequence[Block]]:
    """Poisson arrivals of that rate, as the policy remembers them at `until_s`."""
    rng = np.random.default_rng(seed)
    samples: tuple[Sample, ...] = ()
    blocks: tuple[Block, ...] = ()
    at_s = 0.0
    while at_s < until_s:
        at_s += PERIOD_S
        number = int(rng.poisson(rate_at(at_s) * PERIOD_S))
        sample = Sample(at_s, PERIOD_S, number, 200 * number, 0, 0.0)
        samples, blocks = remember(samples, sample, at_s, 4 * START_S), remember_block(blocks, sample, START_S)
    return samples, blocks


def wander(rate_at: Callable[[float], float], seed: int = 1) -> float:
    return forecast(*arrivals(rate_at, HOUR_S, seed), START_S, capacity(), HOUR_S).wander


def a_walk(deviation: float, seed: int) -> Callable[[float], float]:
    """The logarithm of the rate is an Ornstein-Uhlenbeck process with a memory of five minutes."""
    rng, memory = np.random.default_rng(seed), math.exp(-PERIOD_S / 300)
    values = [0.0]
    for _ in range(int(HOUR_S / PERIOD_S) + 1):
        values.append(memory * values[-1] + float(rng.normal(0, deviation * math.sqrt(1 - memory**2))))
    return lambda at_s: 20 * math.exp(values[int(at_s / PERIOD_S)])


@pytest.mark.parametrize("seed", range(4))
def test_a_demand_that_wanders_is_told_from_one_that_does_not(seed: int) -> None:
    steady, little, much = (wander(a_walk(deviation, seed), seed) for deviation in (0.0, 0.15, 0.4))
    assert steady <= 0.03
    assert 0.04 <= little <= 0.25
    assert 0.15 <= much <= 0.7


@pytest.mark.parametrize(
    "rate_at",
    [
        lambda at_s: 5.0 if at_s < 1800 else 20.0,
        lambda at_s: 25.0 if 1500 < at_s < 2400 else 5.0,
        lambda at_s: 0.01,
        lambda at_s: 0.0,
    ],
)
def test_a_step_a_crowd_and_silence_are_no_wandering(rate_at: Callable[[float], float]) -> None:
    rare = wander(rate_at)
    assert rare <= 0.1 or rate_at(0.0) == 0.01  # a request in a block or none says little


def test_what_is_remembered_is_bounded() -> None:
    _, blocks = arrivals(lambda at_s: 3.0, 10 * HOUR_S)
    assert len(blocks) == MAX_BLOCKS
    assert all(block.length_s == START_S / 2 for block in blocks[:-1])
    assert wander(lambda at_s: 40.0 * (int(at_s) // 135 % 2)) <= MAX_WANDER


def test_a_sample_that_is_longer_than_a_block_is_one() -> None:
    blocks: tuple[Block, ...] = ()
    for at_s in (1000.0, 2000.0):
        blocks = remember_block(blocks, Sample(at_s, 1000.0, 5, 1000, 0, 0.0), START_S)
    assert [block.length_s for block in blocks] == [1000.0, 1000.0]
    assert remember_block(blocks, None, START_S) == blocks


@pytest.mark.parametrize("seed", range(4))
def test_a_fall_is_seen_while_the_high_demand_is_still_remembered(seed: int) -> None:
    fell_s = 1800.0
    samples, blocks = arrivals(lambda at_s: 40.0 if at_s < fell_s else 8.0, fell_s + 90, seed)
    assert samples[0].at_s < fell_s - 200
    demand = forecast(samples, blocks, START_S, capacity(), fell_s + 90)
    price_s = capacity().service_s
    assert 0.7 * 8 * price_s <= demand.now <= 1.5 * 8 * price_s


def _group(mean: float, num_ended: int) -> GroupLoad:
    return group_load(0.0, mean_output_tokens=mean, num_ended_answers=num_ended)


def test_a_group_counts_by_the_answers_that_it_has_seen() -> None:
    """A group that has just started has seen the short answers end, and lowered the mean of all."""
    traits = traits_of([_group(600, 90), _group(100, 10)], None)
    assert traits is not None
    assert (traits.mean_output_tokens, traits.num_ended_answers) == (550, 100)


def test_what_was_known_makes_up_for_what_has_not_been_seen() -> None:
    """A model that slept wakes up, and its first answer to end is a short one."""
    before = traits_of([_group(600, 400)], None)
    first = traits_of([_group(100, 1)], before)
    assert first is not None and first.mean_output_tokens == pytest.approx(595)
    later = traits_of([_group(100, ENOUGH_ANSWERS)], first)
    assert later is not None and later.mean_output_tokens == 100


def test_what_little_was_known_at_first_does_not_outweigh_what_is_known_later() -> None:
    first = traits_of([_group(200, 2)], None)
    later = traits_of([_group(300, 4)], first)
    assert later is not None and (later.mean_output_tokens, later.num_ended_answers) == (300, 4)
