"""Whole fleets: nothing is lost or counted twice, time goes forward, and the same seed gives the same bytes."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulation.fleet import Fleet
from bench.simulation.report import Columns, counts, goodput, jain_index, tokens_since
from bench.simulation.requests import Status
from bench.simulation.run import build, resolve, simulate
from bench.simulation.scenario import SimulationScenario, parse_scenario
from model_parallel.errors import ConfigError
from serving.gateway.core.resumption import MAX_RECOVERY_PAUSE_S, RECOVERY_TIMEOUT_S
from tests.support.effort import by_day

PROFILE = "a100-80g"


def scenario(**changes: Any) -> SimulationScenario:
    """Two groups of Llama 2 7B that are busy for a few seconds."""
    data: dict[str, Any] = {
        "duration_s": by_day(7, by_night=20),
        "drain_s": 60,
        "groups": {
            "model": "llama-2-7b", "profile": PROFILE, "num_groups": 2, "max_num_seqs": 8, "kv_cache_tokens": 4096,
            "max_waiting_requests": 16,
        },
        "tenants": [tenant("one", rate=4)],
    }  # fmt: skip
    for path, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(path), dict):
            data[path] = data[path] | value
        else:
            data[path] = value
    return parse_scenario(data, origin="a test")


def tenant(name: str, *, rate: float, **more: Any) -> dict[str, Any]:
    """Who sends short prompts."""
    work = {"kind": "synthetic", "input_tokens": {"kind": "uniform", "min": 10, "max": 400}, "output_tokens": 60}
    return {"name": name, "work": work, "arrivals": {"process": "poisson", "rate": rate}} | more


def check_conservation(fleet: Fleet) -> None:
    """sent = finished + refused + failed + cancelled, for everybody; raises when it is not."""
    columns = Columns(fleet)
    for number in range(len(fleet.requests.tenants)):
        found = counts(columns.status[columns.tenant == number])
        assert found["sent"] == found["finished"] + found["refused"] + found["failed"] + found["cancelled"]
    assert Status.OPEN not in columns.status
    assert fleet.num_unsettled == 0


@given(
    seed=st.integers(0, 1 << 30),
    rates=st.lists(st.sampled_from([0.5, 3.0, 30.0]), min_size=1, max_size=3),
    num_gateways=st.integers(1, 3),
    request_s=st.sampled_from([0.0, 0.005]),
    deadline_s=st.sampled_from([None, 2.0]),
    patience_s=st.sampled_from([None, 0.2]),
    limits=st.sampled_from(
        [None, {"tokens_per_minute": 20000}, {"max_concurrent_requests": 3}, {"token_budget": 5000}]
    ),
    failures=st.sampled_from([[], [1.5, 1.5, 4.7]]),
    migration=st.booleans(),
    turns=st.sampled_from([1, 3]),
    max_tokens=st.sampled_from([None, 90]),
    scaling=st.sampled_from([None, "ongoing", "packtrain"]),
    drain_s=st.sampled_from([0.0, 60.0]),
)
def test_nothing_is_lost_whatever_happens(seed: int, rates: list[float], scaling: str | None, **c: Any) -> None:
    tenants = [
        tenant(
            f"t{number}", rate=rate, deadline_s=c["deadline_s"], patience_s=c["patience_s"], max_tokens=c["max_tokens"]
        )
        for number, rate in enumerate(rates)
    ]
    tenants[0]["limits"] = c["limits"]
    tenants[0]["work"]["turns"] = {"count": c["turns"], "think_s": 0.5}
    fleet = build(
        scenario(
            seed=seed,
            duration_s=5,
            drain_s=c["drain_s"],
            tenants=tenants,
            gateways={"num_gateways": c["num_gateways"], "request_s": c["request_s"]},
            groups={"start_s": 2.0},
            failures={"at_s": c["failures"], "migration": c["migration"]},
            scaling=scaling
            and {"policy": scaling, "max_groups": 4, "upscale_delay_s": 1, "downscale_delay_s": 3, "period_s": 1},
        )
    )
    fleet.run(5 + c["drain_s"])  # whose clocks raise when time would go back
    check_conservation(fleet)
    for member in fleet.members.values():
        member.group.engine.check_integrity()


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not() -> None:
    one, again = (simulate(scenario(seed=3, failures={"at_s": [5]}))[0] for _ in range(2))
    other, _ = simulate(scenario(seed=4, failures={"at_s": [5]}))
    assert json.dumps(one) == json.dumps(again)
    assert json.dumps(one) != json.dumps(other)


def test_jumping_changes_nothing_in_a_fleet() -> None:
    made = scenario(gateways={"num_gateways": 2, "request_s": 0.003}, failures={"at_s": [5]})
    jumping, stepping = with_and_without_jumps(made)
    assert jumping.num_jumped > stepping.num_jumped == 0


def with_and_without_jumps(made: SimulationScenario) -> tuple[Fleet, Fleet]:
    """Both have run, to the same end; raises when they have not."""
    jumping, stepping = build(made), build(made, jumps=False)
    for fleet in (jumping, stepping):
        fleet.run(made.duration_s + made.drain_s)
        check_conservation(fleet)
    assert vars(jumping.outcomes) == vars(stepping.outcomes)
    assert jumping.num_steps == stepping.num_steps
    return jumping, stepping


@given(
    seed=st.integers(0, 1 << 30),
    rates=st.lists(st.sampled_from([0.3, 3.0, 10.0]), min_size=1, max_size=3),
    max_tokens=st.lists(st.sampled_from([None, 40, 5000]), min_size=3, max_size=3),
    patience_s=st.sampled_from([None, 0.05]),
    deadline_s=st.sampled_from([None, 0.7]),
    request_s=st.sampled_from([0.0, 0.003]),
    failures=st.sampled_from([[], [1.5]]),
    max_waiting_requests=st.sampled_from([1, 16]),
)
def test_jumping_changes_nothing_whatever_is_sent(
    seed: int, rates: list[float], max_tokens: list[int | None], **c: Any
) -> None:
    """Among it what a group refuses while it decodes: it is full, or the request can never fit into the model's length, 4,096."""
    with_and_without_jumps(
        scenario(
            seed=seed,
            duration_s=3,
            tenants=[
                tenant(f"t{number}", rate=rate, max_tokens=most, patience_s=c["patience_s"], deadline_s=c["deadline_s"])
                for number, (rate, most) in enumerate(zip(rates, max_tokens, strict=False))
            ],
            gateways={"request_s": c["request_s"]},
            groups={"start_s": 1.0, "max_waiting_requests": c["max_waiting_requests"]},
            failures={"at_s": c["failures"]},
        )
    )


def test_what_can_never_fit_leaves_a_decoding_group_as_it_is() -> None:
    good = tenant("good", rate=2)
    alone, fleet = (
        with_and_without_jumps(scenario(tenants=tenants, groups={"num_groups": 1}))[0]
        for tenants in ([good], [good, tenant("too-long", rate=3, max_tokens=5000)])
    )
    columns, others = Columns(fleet), Columns(alone)
    assert (columns.status[columns.tenant == 1] == Status.REFUSED_INVALID).all()
    assert (columns.tenant == 1).sum() > 20 and fleet.num_jumped > 0
    assert columns.e2e_s[columns.tenant == 0] == pytest.approx(others.e2e_s, rel=1e-9)


def test_groups_of_one_machine_slow_each_other_down() -> None:
    """And jumps change nothing about it."""
    made = scenario(
        tenants=[tenant("one", rate=2)], groups={"start_s": 1.0}, gateways={"request_s": 0.003}, failures={"at_s": [5]}
    )
    plan = resolve(made.groups)
    alone, fleets = build(made, plan=plan), []
    for jumps in (True, False):
        shared = replace(plan, shape=replace(plan.shape, sharing=0.5))
        fleets.append(build(made, plan=shared, jumps=jumps))
    for fleet in (alone, *fleets):
        fleet.run()
        check_conservation(fleet)
    assert vars(fleets[0].outcomes) == vars(fleets[1].outcomes)
    assert fleets[0].num_jumped > 0
    before, after = (Columns(fleet).tpot_s(Columns(fleet).status == Status.FINISHED) for fleet in (alone, fleets[0]))
    assert 1.05 * before.mean() < after.mean() < 1.6 * before.mean()
    assert after.min() < 1.2 * before.min()  # somebody was alone
    with pytest.raises(ConfigError, match="share_a_machine"):
        resolve(scenario(groups={"share_a_machine": True}).groups)


def test_twice_the_groups_wait_less() -> None:
    few, many = (simulate(scenario(tenants=[tenant("one", rate=20)], groups={"num_groups": n}))[0] for n in (1, 4))
    assert few["refused"] > many["refused"]
    assert few["p99_ttft_ms"] > many["p99_ttft_ms"]


def test_a_lost_group_costs_answers_only_without_migration() -> None:
    made = {"tenants": [tenant("one", rate=10)], "groups": {"start_s": 1.0}}
    with_it, fleet = simulate(scenario(failures={"at_s": [5], "migration": True}, **made))
    without, _ = simulate(scenario(failures={"at_s": [5], "migration": False}, **made))
    assert with_it["failed"] == 0
    assert with_it["num_migrations"] > 0
    assert without["failed"] == with_it["num_migrations"]
    migrated = Columns(fleet).num_migrations > 0
    assert (Columns(fleet).num_output[migrated] == 60).all()


def test_a_busy_group_gives_tenants_their_shares() -> None:
    tenants = [tenant("heavy", rate=40, weight=3), tenant("light", rate=40, weight=1)]
    summary, _ = simulate(scenario(tenants=tenants, drain_s=0, groups={"max_waiting_requests": 64}))
    heavy, light = (summary["tenants"][name]["total_output_tokens"] for name in ("heavy", "light"))
    assert 2 < heavy / light < 4
    assert summary["jain_index"] > 0.95


def test_a_quota_is_kept_over_all_gateways() -> None:
    limited = tenant("limited", rate=20, limits={"requests_per_minute": 60})
    summary, fleet = simulate(scenario(tenants=[limited], gateways={"num_gateways": 3}, duration_s=20))
    # A full bucket, and 20 seconds of refilling.
    assert 60 <= summary["finished"] <= 60 + 20 + 1
    assert summary["by_status"]["refused_quota"] == summary["sent"] - summary["finished"]
    assert fleet.quotas is not None


def test_sessions_find_their_history_in_the_cache() -> None:
    session = tenant("chat", rate=1)
    session["work"] = {
        "kind": "synthetic", "input_tokens": 64, "output_tokens": 64, "turns": {"count": 3, "think_s": 1},
    }  # fmt: skip
    summary, fleet = simulate(scenario(tenants=[session]))
    assert summary["finished"] == summary["sent"] == len(fleet.requests)
    num_sent = [64 + number * 128 for number in range(3)]
    assert summary["total_input_tokens"] == summary["sent"] // 3 * sum(num_sent)
    # Of a later turn at most the history can be found: the turn before, with its answer.
    assert 0.3 < summary["prefix_hit_share"] < sum(num - 64 for num in num_sent) / sum(num_sent)


def test_jains_index_is_of_service_as_load_tests_count_it() -> None:
    """One reads much and the other writes much: prompt tokens count once, output tokens twice, over the weight."""
    made = [tenant("reads", rate=1), tenant("writes", rate=1)]
    for each, num_in, num_out, weight in zip(made, (400, 32), (8, 192), (1, 2), strict=True):
        each |= {
            "arrivals": {"process": "constant", "rate": 1}, "weight": weight,
            "work": {"kind": "synthetic", "input_tokens": num_in, "output_tokens": num_out},
        }  # fmt: skip
    summary, _ = simulate(scenario(tenants=made))
    assert summary["finished"] == summary["sent"]
    assert summary["jain_index"] == pytest.approx(jain_index([400 + 2 * 8, (32 + 2 * 192) / 2]))


def test_the_autoscaler_grows_under_load_and_shrinks_after_it() -> None:
    wave = tenant("wave", rate=1)
    wave["arrivals"] = {
        "process": "poisson",
        "stages": [
            {"duration_s": 30, "start": 1}, {"duration_s": 60, "start": 30}, {"duration_s": 120, "start": 1},
        ],
    }  # fmt: skip
    made = scenario(
        tenants=[wave], duration_s=210, groups={"num_groups": 1, "start_s": 5.0},
        scaling={"policy": "ongoing", "max_groups": 6, "target_ongoing": 4, "upscale_delay_s": 5, "downscale_delay_s": 30},
    )  # fmt: skip
    _, fleet = simulate(made)
    groups = list(fleet.samples.num_groups)
    assert groups[0] == 1
    assert max(groups) >= 3
    assert groups[-1] < max(groups)


def test_figures_have_the_names_of_vllm_bench() -> None:
    summary, fleet = simulate(scenario())
    assert {
        "duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput",
        "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_e2el_ms",
    } <= summary.keys()  # fmt: skip
    assert 0 < summary["busy_share"] <= 1
    assert goodput(fleet, {"ttft": 1e9}, 0) == 1.0
    assert goodput(fleet, {"ttft": 1e9, "tpot": 0.0}, 0) == 0.0


def test_rates_are_over_the_time_that_groups_computed_and_not_over_the_arrivals_alone() -> None:
    full = {"tenants": [tenant("one", rate=40)], "groups": {"max_waiting_requests": 400}, "duration_s": 20}
    overloaded, _ = simulate(scenario(**full))
    assert overloaded["duration"] > 25  # 20 of arrivals
    assert overloaded["duration"] == pytest.approx(overloaded["group_seconds"] / 2, rel=0.01)
    assert overloaded["output_throughput"] == pytest.approx(
        overloaded["total_output_tokens"] / overloaded["duration"], rel=1e-9
    )
    assert overloaded["request_throughput"] == pytest.approx(overloaded["output_throughput"] / 60, rel=1e-9)
    warm, _ = simulate(scenario(**full, warmup_s=15))
    assert warm["duration"] == pytest.approx(overloaded["duration"] - 15)
    assert warm["run_output_tokens"] == overloaded["run_output_tokens"] > warm["total_output_tokens"]
    # Groups are full all the time, so what comes each second is alike. What arrived in the warm-up counts, when it comes later.
    assert warm["output_throughput"] == pytest.approx(overloaded["output_throughput"], rel=0.05)
    assert warm["tenants"]["one"]["output_throughput"] == warm["output_throughput"]


def test_tokens_since_a_moment() -> None:
    """Beside a count of each token: the first at its time, the others evenly until the end."""
    columns = Columns(simulate(scenario())[1])
    everybody, since_s = columns.status == Status.FINISHED, 10.0
    expected = 0.0
    for index in np.flatnonzero(everybody):
        first_s, ended_s = (columns.arrived_s[index] + part[index] for part in (columns.ttft_s, columns.e2e_s))
        expected += (np.linspace(first_s, ended_s, int(columns.num_output[index])) >= since_s).sum()
    assert tokens_since(columns, everybody, since_s) == pytest.approx(expected, abs=int(everybody.sum()))
    assert tokens_since(columns, everybody, 0.0) == columns.num_output.sum()
    assert tokens_since(columns, everybody, 1e6) == 0


def test_a_request_that_is_counted_twice_is_found() -> None:
    """A negative control of the account."""
    _, fleet = simulate(scenario(duration_s=3))
    fleet.outcomes.status[0] = Status.OPEN
    with pytest.raises(RuntimeError, match="lost or counted twice"):
        counts(Columns(fleet).status)


def test_jain_index() -> None:
    assert jain_index([2.0, 2.0]) == 1.0
    assert jain_index([1.0, 0.0]) == 0.5
    assert jain_index([0.0]) == 1.0


def test_without_a_prefix_cache_tokens_have_no_content_and_take_no_memory() -> None:
    """Else 1,250 groups do not fit the processor's caches, and each request costs half as much again as among 100."""
    fleet = build(scenario(groups={"prefix_caching": False}))
    fleet.run()
    requests = fleet.requests
    length = requests.prompt_tokens[0]
    one, other = (requests.prompt(0, (), with_content=False) for _ in range(2))
    assert one is other
    assert one == (0,) * length
    with_it = build(scenario(groups={"prefix_caching": True}))
    with_it.run()
    assert vars(fleet.outcomes) == vars(with_it.outcomes)  # nobody shares a beginning here


def lost_alone(start_s: float, *, migration: bool = True, **of_tenant: Any) -> tuple[Fleet, Columns]:
    """The only group is lost at 3 s; requests come from 0 to 5 s, of two seconds and more each."""
    long = tenant("one", rate=12, **of_tenant)
    long["work"] |= {"output_tokens": 200}
    data = scenario(
        duration_s=5,
        drain_s=1000,
        tenants=[long],
        groups={"num_groups": 1, "start_s": start_s, "max_num_seqs": 64, "kv_cache_tokens": 65536},
        failures={"at_s": [3.0], "detect_s": 0.5, "migration": migration},
        gateways={"request_s": 0.01},
    )
    fleet = build(data)
    fleet.run(5 + data.drain_s)
    check_conservation(fleet)
    return fleet, Columns(fleet)


@pytest.mark.parametrize("start_s", [0.2, 7.0, 250.0])
def test_what_the_only_group_ran_goes_on_when_it_is_back(start_s: float) -> None:
    fleet, found = lost_alone(start_s)
    back_s = 3.0 + start_s
    had = (found.arrived_s < 3.0) & (found.arrived_s + found.e2e_s > 3.0)
    assert had.sum() > 5
    assert (found.status[had] == Status.FINISHED).all() and (found.num_output[had] == 200).all()
    assert (found.arrived_s + found.e2e_s)[had].min() > max(back_s, 3.5)
    assert found.num_migrations[had].sum() == found.num_migrations.sum() > 5
    came_meanwhile = (found.arrived_s > 3.0) & (found.arrived_s < back_s)
    assert (found.status[came_meanwhile] == Status.FAILED_LOST).all()  # as a gateway ends them: UNAVAILABLE, NO_GROUP
    assert (found.status[~came_meanwhile] != Status.FAILED_LOST).all()
    assert fleet.num_failures == 1


@pytest.mark.parametrize(
    ("start_s", "migration", "of_tenant", "status", "after_s"),
    [
        (400.0, True, {}, Status.FAILED_LOST, 3.5 + RECOVERY_TIMEOUT_S),
        (7.0, False, {}, Status.FAILED_LOST, 3.0),
        (7.0, True, {"deadline_s": 4.0}, Status.FAILED_DEADLINE, None),
    ],
)
def test_how_long_the_lost_wait_for_a_group(
    start_s: float, migration: bool, of_tenant: dict[str, Any], status: Status, after_s: float | None
) -> None:
    _, found = lost_alone(start_s, migration=migration, **of_tenant)
    had = (found.arrived_s < 2.98) & (found.arrived_s + found.e2e_s > 3.01 - (not migration) * 0.02)
    assert had.sum() > 5 and (found.status[had] == status).all()
    ended_s = (found.arrived_s + found.e2e_s)[had]
    if after_s is None:  # at the deadline of each
        assert found.e2e_s[had] == pytest.approx(4.0, abs=0.01)
    else:
        assert after_s <= ended_s.min() and ended_s.max() <= after_s + MAX_RECOVERY_PAUSE_S + 0.01


def test_who_waits_for_a_group_may_lose_patience() -> None:
    """Those that have no token yet."""
    _, found = lost_alone(7.0, patience_s=1.0)
    waited = (found.arrived_s < 3.0) & (found.arrived_s + found.e2e_s > 3.0)
    for index in np.flatnonzero(waited & (found.status == Status.CANCELLED)):
        assert found.num_output[index] == 0 and found.e2e_s[index] == pytest.approx(1.0, abs=0.01)
    assert (found.status[waited] == Status.FINISHED).any()
