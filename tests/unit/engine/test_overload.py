"""A group that is asked for more than it can do: who is refused, what they are told, and how it gets well again."""

import math
import random
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from model_parallel.engine.overload import WINDOW_S, Deadlines, Pace, StepTimes
from model_parallel.engine.request import FinishReason
from model_parallel.errors import RequestError
from tests.support.effort import by_day
from tests.support.engine import Harness, make_request
from tests.support.simulation import Simulation, arrivals

CAPACITY = 0.25
"""Requests of `send_some` that a `Simulation` serves a step, about."""


def send_some(
    simulation: Simulation, tenant: str, rate: float, *, deadline_s: float | None = None
) -> list[RequestError]:
    """A step's arrivals. Returns the refusals."""
    rng = simulation.rng
    refusals = []
    for _ in range(arrivals(rng, rate)):
        refusal = simulation.send(tenant, rng.randint(20, 200), rng.randint(20, 100), deadline_s=deadline_s)
        refusals += [refusal] if refusal else []
    return refusals


def test_a_full_queue_refuses_exactly_what_it_has_no_room_for() -> None:
    simulation = Simulation(max_waiting_requests=10)
    tenants = "aaaaaaaaaaaabbbccd"
    refusals = [simulation.send(tenant, 10, 5) for tenant in tenants]
    accepted = "".join(tenant for tenant, refusal in zip(tenants, refusals, strict=True) if refusal is None)
    assert accepted == "aaaaaaaabb"
    assert all(refusal.kind == "overloaded" for refusal in refusals if refusal)
    for _ in range(30):
        simulation.step()
    assert simulation.engine.stats.num_finished_length == 10
    assert simulation.engine.stats.num_refused == 8


def test_one_tenant_never_fills_the_queue() -> None:
    simulation = Simulation(max_waiting_requests=256)
    refusal = None
    while refusal is None:
        refusal = simulation.send("large", 10, 5)
    assert len(simulation.sent) == 205
    assert "205 requests of this tenant are waiting; it may have 4 times as many as there is room left" in str(refusal)
    assert [simulation.send("small", 10, 5) for _ in range(40)] == [None] * 40


def test_the_waiting_tokens_of_one_tenant_are_bounded_too() -> None:
    harness = Harness(max_waiting_tokens=100)
    for number in range(8):
        harness.add(make_request(f"a{number}", [1] * 10, tenant="large"))
    with pytest.raises(
        RequestError, match="80 prompt tokens of this tenant are waiting and this prompt has 10; it may"
    ):
        harness.add(make_request("a9", [1] * 10, tenant="large"))
    harness.add(make_request("b1", [1] * 20, tenant="small"))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 60)), max_size=80), st.integers(5, 20))
def test_whoever_has_nothing_waiting_is_let_in_beside_any_one_tenant(sends: list[tuple[str, int]], limit: int) -> None:
    simulation = Simulation(max_waiting_requests=limit)
    for tenant, num_tokens in sends:
        simulation.send(tenant, num_tokens, 5)
        waiting = [sequence.request.tenant for sequence in simulation.scheduler._queue]
        assert len(waiting) <= limit
        if len(set(waiting)) == 1:
            assert len(waiting) < limit
        # The last place went to somebody who had fewer than four.
        if len(waiting) == limit:
            assert min(waiting.count(tenant) for tenant in set(waiting)) <= 4


def test_choices_are_accepted_all_or_none() -> None:
    harness = Harness(max_waiting_requests=5)
    choices = [make_request(f"r{number}", [1, 2], seed=1) for number in range(4)]
    harness.scheduler.add(*choices)
    with pytest.raises(RequestError, match="4 requests are waiting; at most 5 may"):
        harness.scheduler.add(*(make_request(f"s{number}", [1, 2]) for number in range(2)))
    with pytest.raises(RequestError, match="'t1' is in use"):
        harness.scheduler.add(make_request("t1", [1]), make_request("t1", [1]))
    assert harness.engine.stats.num_waiting == 4
    with pytest.raises(RequestError, match="there are 6 sequences; at most 5 may wait") as caught:
        harness.scheduler.add(*(make_request(f"u{number}", [1, 2]) for number in range(6)))
    assert caught.value.kind == "invalid"
    harness.engine.step()
    assert [new.seq_id for new in harness.executor.plans[0].new_sequences] == [1, 2, 3, 4]


def test_choices_of_one_request_run_one_after_the_other_beside_other_tenants() -> None:
    harness = Harness(max_num_seqs=3)
    harness.scheduler.add(*(make_request(f"a{number}", [1] * 4, tenant="a") for number in range(4)))
    harness.scheduler.add(make_request("b1", [1] * 4, tenant="b"))
    harness.engine.step()
    assert [new.seq_id for new in harness.executor.plans[0].new_sequences] == [1, 5, 2]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_be_divided_by_is_refused(weight: float) -> None:
    harness = Harness()
    with pytest.raises(RequestError, match=r"the tenant's weight is .*; it must be greater than 0"):
        harness.add(make_request("r1", [1], weight=weight))


def test_pace_is_measured_while_something_waits() -> None:
    pace = Pace()
    assert pace.wait_s(100) is None
    pace.record_step(0.0, 500, is_backlogged=False)
    pace.record_step(10.0, 500, is_backlogged=True)
    assert pace.wait_s(100) is None
    pace.record_step(12.0, 100, is_backlogged=True)
    assert pace.wait_s(100) == pytest.approx(2.0)
    pace.record_step(14.0, 0, is_backlogged=False)
    assert 3.9 < (pace.wait_s(100) or 0) < 4.3
    before_s = pace.wait_s(100)
    pace.record_step(1000.0, 7, is_backlogged=True)
    assert pace.wait_s(100) == before_s


@given(steps=st.lists(st.tuples(st.floats(0.001, 20), st.sampled_from([0, 0, 0, 50, 700])), min_size=1, max_size=40))
def test_steps_that_admit_nothing_only_let_time_pass(steps: list[tuple[float, int]]) -> None:
    every, some = Pace(), Pace()
    now_s = 0.0
    for pace in (every, some):
        pace.record_step(now_s, 0, is_backlogged=True)
    for passed_s, num_tokens in steps:
        now_s += passed_s
        every.record_step(now_s, num_tokens, is_backlogged=True)
        if num_tokens:
            some.record_step(now_s, num_tokens, is_backlogged=True)
    some.record_step(now_s, 0, is_backlogged=True)
    assert every.wait_s(100) == some.wait_s(100)


def test_a_run_is_expected_to_be_at_most_twice_as_long_as_others() -> None:
    pace = Pace()
    pace.record_decodes(8, 10.0, 10.2)
    assert pace.run_s(100, 8) == 0
    for _ in range(10):
        pace.record_end(20)
    assert pace.run_s(10, 8) == pytest.approx(2.0)
    assert pace.run_s(1000, 8) == pytest.approx(8.0)


def record_steps(times: StepTimes, steps: Iterable[tuple[int, float]], now_s: float = 0.0) -> float:
    """Of so many sequences each, one after the other. Returns when the last one ends."""
    for num_rows, step_s in steps:
        times.record(num_rows, now_s, now_s + step_s)
        now_s += step_s
    return now_s


@given(
    runs=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 300), st.floats(0.001, 0.5)), min_size=1, max_size=12),
    num_rows=st.integers(1, 64),
)
def test_each_step_of_a_run_weighs_less_the_longer_ago_it_was(
    runs: list[tuple[int, int, float]], num_rows: int
) -> None:
    assume(all(one[0] != other[0] for one, other in pairwise(runs)))
    times, weights, xs, ys, now_s = StepTimes(), [], [], [], 0.0
    for rows, num_steps, step_s in runs:
        now_s = record_steps(times, [(rows, step_s)] * num_steps, now_s)
        xs += [rows] * num_steps
        ys += [step_s] * num_steps
    left_s = 0.0
    for step_s in reversed(ys):
        weights.append(math.exp(-left_s / WINDOW_S))
        left_s += step_s
    weights.reverse()
    mean_x, mean_y = np.average(xs, weights=weights), np.average(ys, weights=weights)
    variance = np.average((xs - mean_x) ** 2, weights=weights)
    slope = np.average((xs - mean_x) * (ys - mean_y), weights=weights) / variance if variance > 0.01 else 0.0
    expected_s = mean_y + min(max(0.0, slope), mean_y / mean_x) * (num_rows - mean_x)
    assume(abs(variance - 0.01) > 1e-6)
    assert times.estimate_s(num_rows) == pytest.approx(expected_s, rel=1e-4, abs=1e-9)


def test_a_step_that_brings_drafted_tokens_counts_as_several() -> None:
    times = StepTimes()
    times.record(4, 0.0, 0.3, num_steps=3)
    assert times.estimate_s(4) == pytest.approx(0.1)


def test_step_times_lie_on_a_line_over_the_number_of_sequences() -> None:
    times = StepTimes()
    assert times.estimate_s(4) == 0
    record_steps(times, [(num_rows, 0.01 + 0.002 * num_rows) for num_rows in (1, 2, 8, 12) * 5])
    assert [times.estimate_s(n) for n in (1, 10, 32)] == pytest.approx([0.012, 0.03, 0.074])


@pytest.mark.parametrize(
    ("measured", "num_rows", "expected_s"),
    [
        ([(16, 0.5)], 32, 0.5),  # one number of sequences tells nothing of others
        ([(16, 0.5)], 1, 0.5),
        ([(10, 0.1), (20, 0.8)], 1, 0.45 / 15),  # steeper than in proportion: fewer do not come out below nothing
        ([(10, 0.8), (20, 0.1)], 40, 0.45),  # falling: noise
    ],
)
def test_a_line_through_little_is_no_wild_guess(
    measured: list[tuple[int, float]], num_rows: int, expected_s: float
) -> None:
    times = StepTimes()
    record_steps(times, measured * 3)
    assert times.estimate_s(num_rows) == pytest.approx(expected_s, rel=0.1)


def test_the_estimate_is_about_what_the_wait_is_then() -> None:
    simulation = Simulation(max_waiting_requests=64, step_s=0.05)
    told: dict[int, float] = {}
    for step in range(1500):
        for tenant in ("a", "b"):
            num_before = len(simulation.sent)
            send_some(simulation, tenant, 5 * CAPACITY)
            if step > 200 and len(simulation.sent) == num_before + 1:
                told[num_before] = simulation.engine.stats.estimated_wait_s
        simulation.step()
    ratios = sorted(
        (sent.first_token_s - sent.arrived_s) / told[number]
        for number, sent in enumerate(simulation.sent)
        if number in told and sent.first_token_s is not None
    )
    assert len(ratios) > 100
    assert 0.7 < ratios[len(ratios) // 20] < ratios[-len(ratios) // 20] < 1.5


def test_a_refusal_says_how_long_the_queue_takes() -> None:
    simulation = Simulation(max_waiting_requests=64, step_s=0.05)
    refusals = []
    for _ in range(1000):
        refusals += send_some(simulation, "a", 10 * CAPACITY)
        simulation.step()
    # 52 requests of one tenant wait, and one leaves each 4 steps.
    told = [refusal.retry_after_s for refusal in refusals[-500:]]
    assert min(told) > 0.5 * 52 / CAPACITY * 0.05
    assert max(told) < 2 * 52 / CAPACITY * 0.05


def test_what_would_expire_while_it_waits_is_refused_at_once() -> None:
    simulation = Simulation(max_waiting_requests=256, step_s=0.05)
    refusals = []
    for _ in range(1500):
        refusals += send_some(simulation, "a", 10 * CAPACITY, deadline_s=10.0)
        simulation.step()
    late = [refusal for refusal in refusals if "its deadline is in 10.0 s" in str(refusal)]
    assert len(late) > 1000
    assert all(refusal.kind == "overloaded" and refusal.retry_after_s > 0 for refusal in late)
    stats = simulation.engine.stats
    # Of those accepted most come to their end in time; nothing is computed for most of the others.
    accepted = [sent for sent in simulation.sent if sent.arrived_s < simulation.now_s - 12]
    in_time = [sent for sent in accepted if sent.finish_reason is FinishReason.LENGTH]
    assert len(in_time) > 0.75 * len(accepted)
    # Goodput: tokens of whole answers, of all that the group made.
    assert sum(sent.max_tokens for sent in in_time) > 0.8 * stats.num_generation_tokens * len(accepted) / len(
        simulation.sent
    )


def test_a_batch_does_not_grow_until_nobody_is_in_time() -> None:
    """Sixteen at a time would take 0.17 s a step and 10 s an answer, and none has more than 6 s."""
    simulation = Simulation(step_s=0.01, row_s=0.01)
    for _ in range(4000):
        send_some(simulation, "a", 0.5, deadline_s=6.0)
        simulation.step()
    settled = [sent for sent in simulation.sent if 40 < sent.arrived_s < simulation.now_s - 7]
    in_time = sum(sent.max_tokens for sent in settled if sent.finish_reason is FinishReason.LENGTH)
    assert in_time > 0.8 * sum(sent.max_tokens for sent in settled)
    # What a step brings without any deadline is 16 tokens in 0.17 s.
    assert in_time / (simulation.now_s - 47) > 0.75 * 16 / 0.17


def test_nothing_is_computed_for_who_cannot_be_in_time_any_more() -> None:
    """Answers of one length end together, so that some wait for a whole run more than was estimated."""
    simulation = Simulation(step_s=0.05, max_num_seqs=8)
    for _ in range(2000):
        simulation.send("a", 20, 50, deadline_s=6.0)
        simulation.step()
    settled = [sent for sent in simulation.sent if 20 < sent.arrived_s < simulation.now_s - 7]
    late = [sent for sent in settled if sent.finish_reason is FinishReason.DEADLINE]
    assert 0 < len(late) < len(settled) / 2
    assert all(sent.first_token_s is None for sent in late)


def storm(num_retries: int) -> tuple[int, int]:
    """Ten times too much from clients who send again at once what was refused or has expired, so many times.

    Returns the tokens of answers that were in time, and all that were made.
    """
    simulation = Simulation(step_s=0.05, max_waiting_requests=256)
    left: dict[int, int] = {}
    """Retries that are left, by the number of the one that is waited for."""
    again: list[int] = []
    for _ in range(by_day(1000, by_night=2000)):
        refused = []
        for retries in again + [num_retries] * arrivals(simulation.rng, 10 * CAPACITY):
            if simulation.send("a", 60, simulation.rng.randint(20, 100), deadline_s=10.0):
                refused.append(retries)
            else:
                left[len(simulation.sent) - 1] = retries
        simulation.step()
        expired = [number for number in left if simulation.sent[number].finish_reason is FinishReason.DEADLINE]
        again = [retries - 1 for retries in refused + [left.pop(number) for number in expired] if retries]
    in_time = sum(sent.max_tokens for sent in simulation.sent if sent.finish_reason is FinishReason.LENGTH)
    return in_time, simulation.engine.stats.num_generation_tokens


def test_a_storm_of_retries_multiplies_no_work() -> None:
    (in_time, _), (in_time_of_storm, made) = storm(0), storm(5)
    assert in_time_of_storm > 0.95 * in_time
    assert made < 1.1 * in_time_of_storm


def test_little_is_computed_in_vain_on_a_machine_that_gets_slower_and_faster() -> None:
    """By a quarter, within twenty seconds. Among several who wait, one is taken who is in time even then."""
    simulation = Simulation(max_num_seqs=8)
    while simulation.now_s < 200:
        speed = 1 + 0.25 * math.sin(simulation.now_s / 7)
        simulation.step_s, simulation.row_s = 0.01 * speed, 0.004 * speed
        if simulation.rng.random() < 0.8:
            simulation.send("a", 16, simulation.rng.randrange(40, 80), deadline_s=5.0)
        simulation.step()
    in_vain = [sent for sent in simulation.sent if sent.first_token_s and sent.finish_reason is FinishReason.DEADLINE]
    assert len(in_vain) < 0.02 * sum(sent.finish_reason is FinishReason.LENGTH for sent in simulation.sent)


def test_an_idle_group_tries_whatever_it_has_measured() -> None:
    simulation = Simulation(step_s=1.0)
    assert simulation.send("a", 10, 100) is None
    for _ in range(110):
        simulation.step()
    assert simulation.send("a", 10, 100, deadline_s=50.0) is None
    assert "run 100.0 s, and its deadline is in 50.0 s" in str(simulation.send("a", 10, 100, deadline_s=50.0))


def test_a_small_tenant_is_neither_refused_nor_late_beside_an_overload() -> None:
    simulation = Simulation(max_waiting_requests=64, step_s=0.05)
    for _ in range(1000):
        send_some(simulation, "large", 10 * CAPACITY, deadline_s=10.0)
        assert send_some(simulation, "small", CAPACITY / 10, deadline_s=10.0) == []
        simulation.step()
    assert max(simulation.ttfts("small")) < 1.0
    assert all(sent.finish_reason is not FinishReason.DEADLINE for sent in simulation.sent if sent.tenant == "small")


def test_ten_times_too_much_and_then_normal_again() -> None:
    def run(rate: float, num_steps: int) -> tuple[float, int]:
        """Tokens a step, and how many were refused."""
        before = simulation.engine.stats
        for _ in range(num_steps):
            send_some(simulation, "a", rate)
            simulation.step()
            assert simulation.engine.stats.num_waiting <= 16 + 16  # preempted ones may come on top
        after = simulation.engine.stats
        return (
            after.num_generation_tokens - before.num_generation_tokens
        ) / num_steps, after.num_refused - before.num_refused

    simulation = Simulation(max_waiting_requests=16, step_s=0.05)
    peak, _ = run(CAPACITY, 600)
    overloaded, num_refused = run(10 * CAPACITY, 1200)
    assert overloaded > 0.9 * peak
    assert num_refused > 1000
    run(CAPACITY / 4, 100)
    mark = len(simulation.sent)
    _, num_refused = run(CAPACITY / 4, 300)
    assert num_refused == 0
    late = simulation.sent[mark:-10]
    assert max((sent.first_token_s or 1e9) - sent.arrived_s for sent in late) < 1.0
    for _ in range(300):
        simulation.step()
    assert not simulation.engine.has_work
    assert simulation.engine.stats.kv_usage == 0
    simulation.engine.check_integrity()


def test_deadlines_are_kept_in_order_and_in_proportion() -> None:
    deadlines, rng = Deadlines(), random.Random(1)
    living: dict[int, float] = {}
    for number in range(20000):
        living[number] = rng.uniform(0, 1000)
        deadlines.add(living[number], number)
        if len(living) > 50:
            del living[rng.choice(list(living))]
        deadlines.keep(living.keys())
        assert len(deadlines._heap) <= 2 * 51 + 65
    for now_s in range(0, 1001, 100):
        expired = set(deadlines.take_expired(now_s)) & living.keys()
        assert expired == {number for number, at_s in living.items() if now_s - 100 < at_s <= now_s}


def test_expired_ones_are_ended_before_anything_is_computed_for_them() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(make_request("r0", [1], max_tokens=20))
    for number in range(1, 6):
        harness.add(make_request(f"r{number}", [1], deadline_s=float(number)))
    for _ in range(3):
        harness.step()
        harness.clock.now_s += 1.5
    harness.step()
    assert [harness.finish_reason(f"r{number}") for number in range(1, 5)] == [FinishReason.DEADLINE] * 4
    assert harness.engine.stats.num_finished_deadline == 4
    harness.engine.abort("r0")
    harness.run()
    assert harness.finish_reason("r5") is FinishReason.LENGTH
    assert [new.seq_id for plan in harness.executor.plans for new in plan.new_sequences] == [1, 6]
