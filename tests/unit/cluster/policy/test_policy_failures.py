"""What other autoscalers are known to get wrong, each as a test. The numbers are of their issues."""

import math

import pytest

from cluster.autoscaler import ScaledModel
from cluster.policy import (
    Cause,
    GroupObservation,
    ModelObservation,
    ModelPolicy,
    Observation,
    Phase,
    PolicyConfig,
    PolicyState,
    decide,
)
from model_parallel.errors import ConfigError
from serving.autoscaling.settings import settings_of
from serving.config import parse_config
from tests.support.policy_story import NUM_PROMPT, RATE_OF_A_GROUP, Story
from tests.support.policy_worlds import BAD_LOADS, running, starting

POLICY = ModelPolicy(
    min_groups=1, max_groups=8, ttft_p99_s=1.0, tpot_p99_s=0.05, expected_start_s=30.0, shrink_after_s=60.0
)


def test_two_and_one_do_not_alternate() -> None:
    """Dynamo PR 9294: two groups look idle, one looks overloaded, for survivors take N/(N−1) of the load."""
    story = Story(POLICY, num_groups=2, rate=1.2 * RATE_OF_A_GROUP)
    story.run(900)
    assert set(story.targets) == {2}


def test_what_a_stopped_group_knew_is_gone() -> None:
    """Our own: arrivals are priced by the mean length of the groups' answers. The group with short ones was stopped, the price
    rose, and another one was started: 2, 1, 2."""
    mixed = {"g1": {"mean_output_tokens": 30.0}, "g2": {"mean_output_tokens": 100.0}}
    story = Story(POLICY, num_groups=2, rate=0.9 * RATE_OF_A_GROUP, changed_of=mixed)
    story.run(900)
    assert set(story.targets) == {2}
    story.rate = 0.5 * RATE_OF_A_GROUP
    story.run(900)
    assert story.target == 1
    assert sum(made.target != made.before for made in story.decisions) == 1


def test_no_traffic_is_no_missing_number() -> None:
    """Dynamo #6985: zero requests gave NaN, and the fleet stayed as it was for ever."""
    story = Story(POLICY, num_groups=4, rate=0.0)
    assert story.run(300).target == 1


def test_a_pending_group_is_counted_once() -> None:
    """llm-d PR 549, AIBrix #2670: while a group started, every look ordered another."""
    story = Story(POLICY, num_groups=1, rate=0.3 * RATE_OF_A_GROUP, start_s=120.0)
    story.run(120)
    story.rate = 2.2 * RATE_OF_A_GROUP
    story.run(115)
    assert story.num_running == 1
    assert max(story.targets) <= 4
    assert story.run(600).target in (3, 4)


def test_a_start_that_never_ends_blocks_only_more_starts() -> None:
    """Dynamo #14251, #12428: a pod without a GPU stopped the planner altogether."""
    story = Story(POLICY, num_groups=2, rate=1.5 * RATE_OF_A_GROUP, start_s=math.inf)
    story.run(120)
    story.rate = 3 * RATE_OF_A_GROUP
    story.run(POLICY.start_timeout_s + 60)
    assert story.target > 2
    story.rate = 6 * RATE_OF_A_GROUP
    decision = story.run(60)
    assert decision.cause is Cause.STUCK_START
    assert "under way" in decision.reason
    story.rate = 0.2 * RATE_OF_A_GROUP
    shrunk = story.run(300)
    assert shrunk.target == 1
    assert all(group.phase == "running" for group in story.groups)


def test_a_long_prompt_does_not_keep_groups() -> None:
    """Dynamo PR 11624: one prompt of 32,000 tokens held the floor at two for ever."""
    story = Story(POLICY, num_groups=2, rate=0.2 * RATE_OF_A_GROUP)
    story.run(60)
    story.num_tokens += 32_000
    story.num_sequences += 1
    assert story.run(600).target == 1


@pytest.mark.parametrize("bad", BAD_LOADS, ids=str)
def test_an_outage_of_metrics_changes_nothing(bad: dict[str, object]) -> None:
    """Dynamo PR 14575: without metrics the floor was forgotten."""
    story = Story(POLICY, num_groups=4, rate=3.2 * RATE_OF_A_GROUP)
    story.run(120)
    before = story.target
    story.changed = bad
    story.rate = 0.0
    decision = story.run(400)
    assert decision.target == before
    assert decision.cause is Cause.NO_METRICS


def test_one_silent_group_keeps_the_others_from_stopping_and_not_from_growing() -> None:
    """AIBrix #617: one pod that was not ready stopped all scaling."""
    story = Story(POLICY, num_groups=3, rate=0.1 * RATE_OF_A_GROUP, silent={"g1"})
    assert story.run(600).target == 3
    story.rate = 5 * RATE_OF_A_GROUP
    assert story.run(120).target > 3


def test_a_silent_gateway_changes_nothing() -> None:
    story = Story(POLICY, num_groups=3, rate=2 * RATE_OF_A_GROUP)
    story.run(120)
    story.gateway_is_silent = True
    decision = story.run(600)
    assert (decision.target, decision.cause) == (story.targets[20], Cause.NO_METRICS)


def test_shrinking_takes_minutes_and_not_half_an_hour() -> None:
    """AIBrix #1159."""
    story = Story(POLICY, num_groups=8, rate=7 * RATE_OF_A_GROUP)
    story.run(300)
    story.rate = 0.5 * RATE_OF_A_GROUP
    story.run(240)
    assert story.target == 1


def test_a_full_queue_counts_and_not_the_share_of_the_cache() -> None:
    """llm-d #1500: requests were dropped at 16 % of the cache, because a stock was watched and a rate was the limit."""
    story = Story(POLICY, num_groups=1, rate=0.5 * RATE_OF_A_GROUP, changed={"kv_usage": 0.16})
    story.run(120)
    story.rate = 4 * RATE_OF_A_GROUP
    story.run(60)
    assert story.target >= 4
    growing = {made.cause for made in story.decisions if made.target > made.before}
    assert growing <= {Cause.DEMAND, Cause.BACKLOG}


def test_full_groups_are_not_trusted_to_catch_up_faster_than_they_can() -> None:
    """Our own: hundreds waited for minutes after a crowd had come, since each group counted as if every second of it were
    service. The base of its steps is none, and with `max_num_seqs` 32 only 0.53 of each second is."""
    full: dict[str, object] = {"num_running": 32, "num_waiting": 300, "num_waiting_tokens": 300 * NUM_PROMPT}
    story = Story(POLICY, num_groups=2, rate=1.1 * RATE_OF_A_GROUP, changed=full)
    story.run(60)
    assert story.target > 2


def test_long_contexts_need_groups_for_their_cache_alone() -> None:
    """The reverse: few arrivals, and streams that hold the cache for long."""
    story = Story(POLICY, num_groups=2, rate=0.1, changed={"kv_usage": 0.95, "num_running": 8}, is_advice=True)
    decision = story.run(300)
    assert decision.target == 3
    assert decision.cause is Cause.KV_CACHE


def test_a_group_over_several_nodes_is_one_group() -> None:
    """llm-d PR 1303: pods were counted where groups were meant, and multi-host fleets were stuck for ever."""
    policy = ModelPolicy(min_groups=1, max_groups=4, accelerators_per_group=16, tpot_p99_s=0.05)
    groups = (running("g1", 1000.0), starting("g2", 990.0))
    observed = ModelObservation(target=2, groups=groups, gateways=())
    observation = Observation(models={"m": observed}, num_accelerators=32 + 12)
    decision, _ = decide(observation, PolicyState(), PolicyConfig(models={"m": policy}), 1000.0)
    assert decision.models["m"].target == 2


def test_a_level_that_nothing_can_reach_is_told_and_not_chased() -> None:
    """A step of one sequence takes 20.5 ms."""
    policy = ModelPolicy(min_groups=1, max_groups=8, tpot_p99_s=0.02, expected_start_s=30.0, shrink_after_s=60.0)
    story = Story(policy, num_groups=1, rate=0.3 * RATE_OF_A_GROUP)
    decision = story.run(600)
    assert decision.target == 1
    assert "tpot_p99_s is 0.02" in "; ".join(decision.warnings)


def test_a_step_is_taken_in_one_step() -> None:
    """Dynamo and others go one by one, each a start time later."""
    story = Story(POLICY, num_groups=1, rate=0.5 * RATE_OF_A_GROUP, start_s=60.0)
    story.run(300)
    story.rate = 5 * RATE_OF_A_GROUP
    story.run(30)
    assert story.target >= 5
    assert story.num_running == 1


def test_users_do_not_wait_for_the_cooldown_when_a_model_wakes() -> None:
    policy = ModelPolicy(min_groups=0, max_groups=4, idle_s=30.0, tpot_p99_s=0.05, cooldown_s=600.0)
    story = Story(policy, num_groups=1, rate=0.5)
    story.run(60)
    story.rate = 0.0
    assert story.run(60).target == 0
    story.num_held = 3
    woken = story.tick()
    assert (woken.target, woken.cause) == (1, Cause.WAKE)


def test_a_sleeping_model_wakes_with_as_many_as_the_crowd_needs() -> None:
    policy = ModelPolicy(min_groups=0, max_groups=8, idle_s=30.0, tpot_p99_s=0.05, ttft_p99_s=1.0)
    story = Story(policy, num_groups=1, rate=0.5 * RATE_OF_A_GROUP)
    story.run(60)
    story.rate = 0.0
    story.run(60)
    story.num_held, story.rate = 250, 4 * RATE_OF_A_GROUP
    assert story.tick().target >= 3


def test_a_model_does_not_sleep_before_it_could_serve() -> None:
    """Our own: idle_s was counted from the order on, and a model that loads for longer lost its only group while that loaded."""
    policy = ModelPolicy(min_groups=0, max_groups=1, idle_s=5.0, cooldown_s=1.0, start_timeout_s=600.0)
    story = Story(policy, num_groups=0, start_s=60.0)
    story.target = 1
    story.groups = [GroupObservation(group="first", phase=Phase.STARTING, since_s=story.now_s)]
    story.run(60)
    assert story.num_running == 1 and set(story.targets) == {1}
    assert story.run(15).target == 0, "the time in which nobody asks counts from then on"
    assert Cause.IDLE in {decision.cause for decision in story.decisions}


def test_a_start_that_is_stuck_does_not_keep_a_model_awake() -> None:
    policy = ModelPolicy(min_groups=0, max_groups=1, idle_s=5.0, cooldown_s=1.0, start_timeout_s=600.0)
    story = Story(policy, num_groups=0, start_s=math.inf)
    story.target = 1
    story.groups = [GroupObservation(group="first", phase=Phase.STARTING, since_s=story.now_s)]
    story.run(600)
    assert set(story.targets) == {1}
    assert story.run(30).target == 0


def test_starts_that_fail_again_and_again_do_not_keep_a_model_awake() -> None:
    policy = ModelPolicy(min_groups=0, max_groups=1, idle_s=5.0, cooldown_s=1.0, start_timeout_s=600.0)
    story = Story(policy, num_groups=0, start_s=math.inf)
    story.target = 1
    for number in range(126):
        if not story.target:
            break
        story.groups = [GroupObservation(group=f"g{number}", phase=Phase.STARTING, since_s=story.now_s)]
        story.tick()
    assert story.target == 0 and len(story.targets) > 120


def test_what_was_learned_outlives_a_restart() -> None:
    from cluster.policy import decode_state, encode_state  # noqa: PLC0415 - told here because it is what the test is about

    story = Story(POLICY, num_groups=4, rate=3 * RATE_OF_A_GROUP)
    story.run(300)
    restored = decode_state(encode_state(story.state))
    assert restored == story.state
    assert decode_state(b"damaged") is None


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    story = Story(POLICY, num_groups=4, rate=3 * RATE_OF_A_GROUP)
    story.run(300)
    before = story.target
    story.now_s -= 7200
    assert story.tick().cause is Cause.CLOCK
    assert story.run(50).target == before


def test_steady_traffic_is_left_alone() -> None:
    story = Story(POLICY, num_groups=3, rate=2.3 * RATE_OF_A_GROUP)
    story.run(900)
    assert story.num_reversals == 0


SLEEPY = ModelPolicy(min_groups=0, max_groups=4, ttft_p99_s=1.0, tpot_p99_s=0.05, idle_s=600)


@pytest.mark.parametrize("blinded", ["nobody looks", "gateways are silent"])
@pytest.mark.parametrize("num_arrived", [0, 700])
def test_what_came_while_nobody_saw_it_counts_against_sleep(blinded: str, num_arrived: int) -> None:
    """Our own: after 700 s without a look, with a request each second, a model slept at the first look that found none open."""
    story = Story(SLEEPY, num_groups=2, rate=0.01, changed={"num_running": 0})
    story.run(60)
    story.rate = 0.0
    story.num_sequences += num_arrived
    if blinded == "nobody looks":
        story.now_s += 700
    else:
        story.gateway_is_silent = True
        story.run(700)
        story.gateway_is_silent = False
    assert story.tick().target > 0, "the gap is no proof of idleness"
    story.run(500)
    assert story.target > 0
    assert story.run(200).target == 0


def test_a_clock_that_is_set_ahead_puts_nobody_to_sleep() -> None:
    story = Story(SLEEPY, num_groups=1, rate=RATE_OF_A_GROUP / 4, changed={"num_running": 0})
    story.run(60)
    story.rate = 0.0
    story.tick()
    story.now_s += 3600
    assert story.tick().target == 1


@pytest.mark.parametrize("period_s", [1.0, 5.0, 15.0, 16.0, 30.0, 31.0, 45.0, 60.0])
def test_demand_is_seen_however_seldom_somebody_looks(period_s: float) -> None:
    """Our own: beyond 30 s between two looks nothing was measured, and a busy model went to sleep."""
    (scaled,) = scaled_models({"min_groups": 0, "max_groups": 8}, period_s=period_s)
    story = Story(scaled.policy, num_groups=1, rate=20 * RATE_OF_A_GROUP, period_s=period_s)
    assert story.run(1800).target == 8
    assert min(story.targets) >= 1


def scaled_models(autoscaling: dict[str, object], **autoscaler: object) -> list[ScaledModel]:
    """As `packtrain serve` makes them of a configuration."""
    model = {"name": "m", "source": "/models/m", "autoscaling": autoscaling}
    config = parse_config({"models": [model], "autoscaler": autoscaler}, origin="the test")
    settings = settings_of(config.models, config.autoscaler, "Gateway")
    assert settings is not None
    return [each.scaled for each in settings.models.values()]


@pytest.mark.parametrize(
    ("model", "max_ranks", "told"),
    [
        ({"tensor_parallel_size": 8, "autoscaling": {"max_groups": 1}}, 7, "8 ranks (8 of 'm')"),
        ({"num_groups": 4, "autoscaling": {"max_groups": 4}}, 3, "4 ranks (4 of 'm')"),
    ],
)
def test_a_budget_that_the_beginning_exceeds_is_refused(model: dict[str, object], max_ranks: int, told: str) -> None:
    data = {"models": [{"name": "m", "source": "/models/m", **model}], "autoscaler": {"max_ranks": max_ranks}}
    with pytest.raises(ConfigError) as caught:
        parse_config(data, origin="c.yaml")
    assert str(caught.value) == (
        f"c.yaml: autoscaler.max_ranks is {max_ranks}, and the groups to begin with have {told}; raise it, or lower num_groups"
    )
    parse_config(data | {"autoscaler": {"max_ranks": max_ranks + 1}}, origin="c.yaml")
