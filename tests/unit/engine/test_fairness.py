"""Fair shares at work: the workloads of the VTC paper (Sheng et al., OSDI 2024) on the real engine in virtual time."""

import random
from statistics import fmean

import pytest

from model_parallel.engine.request import FinishReason
from tests.support.effort import by_day
from tests.support.engine import Harness, make_request
from tests.support.simulation import Simulation, arrivals

NUM_STEPS = by_day(600, by_night=1200)


def bound(simulation: Simulation, longest_prompt: int) -> float:
    """2 U of fair_queue.py. All that runs together fits the cache."""
    return 2 * max(1 * longest_prompt, 2 * simulation.cache.num_tokens)


def overload(simulation: Simulation, rates: dict[str, float], *, num_steps: int = NUM_STEPS, **options: float) -> None:
    """Everybody sends more than the group can serve; requests of 20 to 200 prompt and 20 to 100 output tokens."""
    rng = simulation.rng
    for _ in range(num_steps):
        for tenant, rate in rates.items():
            for _ in range(arrivals(simulation.rng, rate)):
                weight = options.get(tenant, 1.0)
                simulation.send(tenant, rng.randint(20, 200), rng.randint(20, 100), weight=weight)
        simulation.step()


def test_the_gap_is_bounded_when_one_tenant_sends_a_hundred_times_more() -> None:
    simulation = Simulation()
    overload(simulation, {"small": 0.3, "large": 30.0})
    assert simulation.num_refused["large"] > 100 * NUM_STEPS / 5
    gap = simulation.max_gap("small", "large")
    assert 0 < gap <= bound(simulation, 200)
    assert simulation.service["small"] == pytest.approx(simulation.service["large"], rel=0.05)


def test_in_order_of_arrival_the_gap_grows_without_bound() -> None:
    """The negative control of the test above: the check is able to fail."""
    simulation = Simulation(is_fair=False)
    overload(simulation, {"small": 0.3, "large": 30.0})
    assert simulation.max_gap("small", "large") > bound(simulation, 200)


def test_shares_follow_weights() -> None:
    simulation = Simulation()
    overload(simulation, {"one": 5.0, "two": 5.0, "four": 5.0}, two=2.0, four=4.0)
    for pair in [("one", "two"), ("one", "four"), ("two", "four")]:
        assert simulation.max_gap(*pair) <= bound(simulation, 200)
    # Service is counted by weight, so equal service is four times as many tokens.
    assert simulation.service["four"] == pytest.approx(simulation.service["one"], rel=0.1)
    assert simulation.service["two"] == pytest.approx(simulation.service["one"], rel=0.1)


def test_a_tenant_that_comes_and_goes_neither_gains_nor_loses() -> None:
    simulation = Simulation()
    during: list[float] = []
    for _ in range(4):
        overload(simulation, {"steady": 5.0}, num_steps=200)
        before = dict(simulation.service)
        overload(simulation, {"steady": 5.0, "on and off": 5.0}, num_steps=300)
        gained = {tenant: served - before.get(tenant, 0.0) for tenant, served in simulation.service.items()}
        during.append(gained["on and off"] / gained["steady"])
    assert simulation.max_gap("steady", "on and off") <= bound(simulation, 200) + simulation.config.max_model_len
    # What it did not use while it was off is gone: each time it gets about as much as the other, and not more.
    assert during == pytest.approx([1.0] * 4, abs=0.25)


def test_what_a_tenant_does_not_use_goes_to_the_others() -> None:
    """Work-conserving: 10 % of the load is one tenant's, and together they get what one alone gets."""
    alone, shared = Simulation(seed=1), Simulation(seed=1)
    overload(alone, {"large": 5.0})
    overload(shared, {"small": 0.02, "large": 5.0})
    assert shared.service["small"] < shared.service["large"] / 5
    assert sum(shared.service.values()) == pytest.approx(alone.service["large"], rel=0.05)


def test_a_newcomer_gets_its_share_at_once() -> None:
    simulation = Simulation()
    overload(simulation, {"old": 5.0}, num_steps=400)
    before = dict(simulation.service)
    overload(simulation, {"old": 5.0, "new": 5.0}, num_steps=400)
    assert simulation.service["new"] == pytest.approx(simulation.service["old"] - before["old"], rel=0.2)
    assert simulation.max_gap("old", "new") <= bound(simulation, 200) + simulation.config.max_model_len


def test_long_prompts_and_long_answers_pay_for_what_they_are() -> None:
    simulation = Simulation(kv_cache_tokens=8192)
    for _ in range(NUM_STEPS):
        for tenant, num_prompt_tokens, max_tokens in [("reads", 700, 10), ("writes", 20, 300), ("chats", 100, 60)]:
            simulation.send(tenant, num_prompt_tokens, max_tokens)
        simulation.step()
    for pair in [("reads", "writes"), ("reads", "chats"), ("writes", "chats")]:
        assert simulation.max_gap(*pair) <= bound(simulation, 700)
    assert len(set(simulation.history[-1][1])) == 3
    services = [simulation.service[tenant] for tenant in ("reads", "writes", "chats")]
    assert max(services) / min(services) < 1.15


def test_the_gap_is_bounded_under_preemption() -> None:
    """Answers are far longer than prompts, so that what is admitted outgrows the cache again and again."""
    simulation = Simulation(kv_cache_tokens=2048)
    for _ in range(2400):
        simulation.send("a", 16, 400)
        simulation.send("b", 16, 200)
        simulation.step()
    assert simulation.engine.stats.num_preemptions > 100
    assert simulation.max_gap("a", "b") <= bound(simulation, 16)
    simulation.engine.check_integrity()


def test_nobody_starves_under_preemption() -> None:
    simulation = Simulation(kv_cache_tokens=1024, max_waiting_requests=200, max_model_len=512)
    rng = random.Random(3)
    for tenant, weight in [("a", 1.0), ("b", 1.0), ("c", 5.0), ("d", 0.2)]:
        for _ in range(20):
            simulation.send(tenant, rng.randint(1, 100), rng.randint(1, 300), weight=weight)
    for _ in range(5000):
        if not simulation.engine.has_work:
            break
        simulation.step()
    assert simulation.engine.stats.num_preemptions > 50
    assert simulation.engine.stats.num_finished_length == len(simulation.sent) == 80


def test_a_lower_class_waits_for_all_of_a_higher_one() -> None:
    simulation = Simulation()
    for _ in range(200):
        simulation.send("batch", 100, 50, priority=1)
        simulation.send("interactive", 100, 50, priority=0)
        simulation.step()
    started = [sent.tenant for sent in simulation.sent if sent.first_token_s is not None and sent.arrived_s > 20]
    assert started.count("interactive") > 30
    assert started.count("batch") == 0


def test_a_small_tenant_waits_about_as_if_it_were_alone() -> None:
    """Beside a tenant that sends a hundred times more, ten times what the group can serve, at the default sizes."""

    def first_tokens(*, with_large: bool, is_fair: bool = True) -> Simulation:
        simulation = Simulation(
            max_num_seqs=64,
            max_num_batched_tokens=512,
            kv_cache_tokens=32768,
            max_model_len=4096,
            max_waiting_requests=256,
            is_fair=is_fair,
        )
        # One sequence of arrivals for the small tenant, whatever else happens.
        small, large = random.Random(4), random.Random(5)
        for _ in range(by_day(1500, by_night=2500)):
            for tenant, rng, rate in [("small", small, 0.04), ("large", large, 4.0)]:
                if tenant == "small" or with_large:
                    for _ in range(arrivals(rng, rate)):
                        num_prompt_tokens = min(3500, max(30, int(rng.lognormvariate(6, 0.8))))
                        simulation.send(tenant, num_prompt_tokens, rng.randint(20, 300))
            simulation.step()
        return simulation

    alone, beside = first_tokens(with_large=False), first_tokens(with_large=True)
    assert beside.num_refused["small"] == 0 < beside.num_refused["large"]
    assert sum(sent.tenant == "small" for sent in beside.sent) > by_day(45, by_night=80)
    assert percentile(beside.ttfts("small"), 99) <= 1.3 * percentile(alone.ttfts("small"), 99)
    assert fmean(beside.ttfts("small")) <= 1.3 * fmean(alone.ttfts("small"))
    # The negative control: the same in order of arrival.
    in_order = first_tokens(with_large=True, is_fair=False)
    assert percentile(in_order.ttfts("small"), 50) > 20 * percentile(alone.ttfts("small"), 99)
    # Giving way costs the large one little: the group does as much work as in order of arrival.
    done, in_order_done = beside.engine.stats, in_order.engine.stats
    assert done.num_generation_tokens > 0.95 * in_order_done.num_generation_tokens
    assert done.num_prompt_tokens > 0.95 * in_order_done.num_prompt_tokens


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(percent / 100 * len(values)))]


def test_prompts_of_a_step_are_bounded_but_for_those_of_who_has_not_used_its_share() -> None:
    harness = Harness(
        max_num_seqs=8, max_num_batched_tokens=64, max_prefill_tokens=10, max_model_len=80, num_blocks=256
    )
    for number in range(4):
        harness.add(make_request(f"a{number}", [1] * 30, max_tokens=30, tenant="large"))
    for _ in range(3):
        harness.step()
        assert sum(row.num_tokens for row in harness.executor.plans[-1].rows) == 10
    for _ in range(15):
        harness.step()
    harness.add(make_request("b9", [2] * 40, max_tokens=3, tenant="small"))
    harness.step()
    prompts = [row.num_tokens for row in harness.executor.plans[-1].rows if row.num_tokens > 1]
    assert 40 in prompts and sum(prompts) <= 50
    harness.run()
    for request_id in harness.outputs:
        assert harness.finish_reason(request_id) is FinishReason.LENGTH
