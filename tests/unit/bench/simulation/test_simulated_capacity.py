import math
import multiprocessing
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from bench.loadtest.scenario import OpenLoop
from bench.simulation.capacity import (
    Bound,
    Progress,
    Question,
    Shape,
    _Trial,
    answer,
    answer_all,
    cheapest,
    parse_slo,
    reached_s,
)
from bench.simulation.report import Columns
from bench.simulation.requests import Status
from bench.simulation.run import resolve, simulate
from bench.simulation.scenario import SimulationScenario, TenantLimits, parse_scenario
from model_parallel.errors import ConfigError
from tests.support.effort import by_day, rest_by_night

DURATION_S = by_day(10, by_night=30)


def scenario_with(*, rate: float, model: str = "llama-2-7b", **groups: int) -> SimulationScenario:
    """Some seconds of chat."""
    return parse_scenario(
        {
            "duration_s": DURATION_S,
            "groups": {"model": model, "profile": "a100-80g", "max_num_seqs": 8, "kv_cache_tokens": 8192, **groups},
            "tenants": [{
                "name": "a", "arrivals": {"process": "poisson", "rate": rate},
                "work": {"kind": "synthetic", "input_tokens": 100, "output_tokens": 80},
            }],
        },
        origin="a test",
    )  # fmt: skip


def question(slo: str, *, tp_size: int = 1, model: str = "llama-2-7b", max_groups: int = 20) -> Question:
    """What a dozen requests a second need."""
    shape = Shape(profile="a100-80g", tensor_parallel_size=tp_size, dtype="bfloat16", quantization=None)
    return Question(
        scenario=scenario_with(rate=12, model=model),
        shape=shape,
        slo=parse_slo(slo),
        price_per_gpu_hour=2.0,
        max_groups=max_groups,
    )


def test_a_service_level_is_read() -> None:
    assert parse_slo("ttft_p99=2s, tpot_median=200ms,e2el_p90=1500us") == (
        Bound("ttft", "p99", 2.0), Bound("tpot", "median", 0.2), Bound("e2el", "p90", 0.0015),
    )  # fmt: skip
    for wrong in ("", "ttft=2s", "ttft_p98=2s", "ttft_p99=2", "ttft_p99=-1s", "itl_p99=1s"):
        with pytest.raises(ConfigError, match="slo: "):
            parse_slo(wrong)


def test_the_fewest_groups_keep_it_and_one_fewer_does_not() -> None:
    found = answer(question("ttft_p99=1s,tpot_p99=100ms"))
    best = found["best"]
    assert best["holds"]
    rows = {row["num_groups"]: row["holds"] for row in found["curve"]}
    assert rows[best["num_groups"]]
    assert best["num_groups"] == 1 or not rows[best["num_groups"] - 1]
    assert best["cost_per_million_output_tokens"] > 0
    assert best["kwh_per_million_output_tokens"] > 0
    assert found["is_measured"] is False
    assert cheapest([found, {"best": None}]) is found


def test_what_cannot_be_kept_is_said() -> None:
    found = answer(question("tpot_p99=1ms", max_groups=4))
    assert found["best"] is None
    assert re.search(r"^with 4 groups .* s$|^with [23] groups .* s; more groups do not help$", found["problem"])
    assert cheapest([found]) is None


def test_more_groups_are_not_tried_where_they_do_not_help() -> None:
    found = answer(question("tpot_p99=1ms", max_groups=2000))
    assert len(found["curve"]) < 12 and max(row["num_groups"] for row in found["curve"]) < 100
    assert re.search(r"with \d+ groups the service level is still not kept: tpot_p99 is 0\.\d+ s", found["problem"])


def test_what_a_quota_refuses_needs_no_groups() -> None:
    asked = question("ttft_p99=1s,tpot_p99=100ms")
    greedy = asked.scenario.tenants[0].model_copy(
        update={"name": "greedy", "limits": TenantLimits(requests_per_minute=60)}
    )
    # A quota of a minute is a bucket that is full at first: the load is as long as it takes to empty it.
    both = asked.scenario.model_copy(
        update={"tenants": [*asked.scenario.tenants, greedy], "duration_s": max(15, DURATION_S)}
    )
    best = answer(replace(asked, scenario=both))["best"]
    assert best is not None and best["holds"]
    assert best["refused"] > best["sent"] / 4


def test_a_load_of_which_nothing_can_be_served_has_no_answer() -> None:
    """One group, which does nothing, would keep every service level."""
    asked = question("ttft_p99=1s,tpot_p99=100ms")
    first = asked.scenario.tenants[0]
    beyond_quota = first.model_copy(update={"limits": TenantLimits(tokens_per_minute=1)})
    too_long = first.model_copy(update={"name": "b", "max_tokens": 5000})
    for tenants, told in (
        ([beyond_quota], r"(\S+) of \1 requests are over the quotas of their tenants$"),
        ([too_long], r"(\S+) of \1 requests can never fit$"),
        (
            [beyond_quota, too_long],
            r"\S+ of (\S+) requests are over the quotas of their tenants and \S+ of \1 requests can never fit$",
        ),
    ):
        found = answer(replace(asked, scenario=asked.scenario.model_copy(update={"tenants": tenants})))
        assert found["best"] is None and found["curve"] == []
        assert re.match("nothing of this load can be served: " + told, found["problem"])
    served = first.model_copy(update={"name": "c"})
    found = answer(replace(asked, scenario=asked.scenario.model_copy(update={"tenants": [served, too_long]})))
    assert found["best"]["holds"] and found["best"]["refused"] > found["best"]["sent"] / 4
    assert re.search(
        r"a100-80g TP=1 bfloat16: \d+ of \d+ requests can never fit; the answer is for the others", found["notes"][-1]
    )


def test_what_does_not_fit_is_said() -> None:
    found = answer(question("tpot_p99=1s", model="llama-2-70b"))
    assert found["best"] is None
    assert "GiB" in found["problem"]


def test_a_warm_up_does_not_change_what_a_token_costs() -> None:
    asked = question("ttft_p99=1s")
    warm = replace(asked, scenario=asked.scenario.model_copy(update={"warmup_s": DURATION_S * 5 / 6}))
    one, other = (answer(each)["best"] for each in (asked, warm))
    assert one["num_groups"] == other["num_groups"]
    assert one["sent"] > 4 * other["sent"]
    for name in ("cost_per_million_output_tokens", "kwh_per_million_output_tokens"):
        assert one[name] == other[name] > 0


def test_a_load_without_a_request_or_an_answer_has_no_cost() -> None:
    asked = question("ttft_p99=1s", max_groups=1)
    tenant = asked.scenario.tenants[0]
    none = tenant.model_copy(update={"arrivals": OpenLoop(process="poisson", rate=1e-9)})
    with pytest.raises(
        ConfigError, match=f"no request from warmup_s, 0, to duration_s, {DURATION_S}; capacity needs at least 1"
    ):
        answer(replace(asked, scenario=asked.scenario.model_copy(update={"tenants": [none]})))
    late = tenant.model_copy(update={"deadline_s": 1e-6})
    found = answer(replace(asked, scenario=asked.scenario.model_copy(update={"tenants": [late]})))
    assert found["best"] is None
    assert [row["cost_per_million_output_tokens"] for row in found["curve"]] == [None]


def test_a_refused_request_counts_as_endless() -> None:
    made = scenario_with(rate=200, max_waiting_requests=1)
    _, fleet = simulate(made)
    columns = Columns(fleet)
    everything = columns.status != Status.NOT_SENT
    assert (columns.status == Status.REFUSED_OVERLOADED).sum() > len(columns.status) / 50
    assert math.isinf(reached_s(columns, everything, Bound("ttft", "p99", 1.0)))
    none = columns.status == Status.NOT_SENT
    assert reached_s(columns, none, Bound("ttft", "p99", 1.0)) == 0.0


def test_progress_of_shapes_side_by_side_is_told() -> None:
    told = list[Progress]()
    questions = [question("ttft_p99=1s", tp_size=size) for size in (1, 2)]
    answers = answer_all(questions, 2, told.append)
    assert answers == [answer(each) for each in questions]
    for found in answers:
        of_shape = [each for each in told if each.shape == found["shape"]]
        # One that was given up at first comes a second time, whole.
        outcomes = sorted({(each.num_groups, each.outcome.split(":")[0]) for each in of_shape if each.outcome})
        assert outcomes == [(r["num_groups"], "holds" if r["holds"] else "does not hold") for r in found["curve"]]
        for num_groups in {each.num_groups for each in of_shape}:
            shares = [each.share for each in of_shape if each.num_groups == num_groups]
            ends = [at for at, share in enumerate(shares, 1) if share == 1.0]
            for begin, end in pairwise([0, *ends]):
                assert shares[begin:end] == sorted(shares[begin:end])
            assert len(shares) > 10 and ends[-1] == len(shares)


def test_an_interrupt_ends_the_processes_of_all_shapes() -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_all([question("ttft_p99=1s", tp_size=size) for size in (1, 2, 4)], 2, interrupt)
    assert not multiprocessing.active_children()


SLOS = ["ttft_p99=1s", "tpot_p99=9ms", "e2el_median=4s", "ttft_p50=100ms,tpot_p99=1s"]


@pytest.mark.parametrize("slo", rest_by_night(SLOS, by_day=SLOS[:2]))
def test_a_trial_that_is_given_up_would_not_have_held(slo: str) -> None:
    given_up = 0
    for num_groups in (1, 2, 3, 4, 6):
        asked = question(slo)
        short, whole = (_Trial(asked, resolve(asked.groups), lambda _: None) for _ in range(2))
        assert short.holds(num_groups) == whole.with_groups(num_groups)["holds"]
        given_up += num_groups not in short.tried
    assert given_up, "of so few groups some cannot do it"
