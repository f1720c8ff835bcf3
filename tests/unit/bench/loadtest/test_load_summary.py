"""What a run comes to."""

import csv
import io
import json
import math
from array import array
from typing import Any

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.json_files import write_json
from bench.loadtest.assertions import parse_assertion
from bench.loadtest.campaign import _line
from bench.loadtest.compare import compare
from bench.loadtest.html_report import curve_report, report
from bench.loadtest.leader import Run
from bench.loadtest.live import print_result
from bench.loadtest.outputs import of_repeats, write_csv
from bench.loadtest.records import Health, Record
from bench.loadtest.replies import Outcome
from bench.loadtest.scenario import Scenario, parse_scenario
from bench.loadtest.sharing import in_flight, jain, service_gap
from bench.loadtest.summary import summarise
from tests.support.load import record, records_at

VLLM_KEYS = (
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_concurrent_requests",
    *(f"{what}_{name}_ms" for what in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
)  # fmt: skip
"""Of a result of `vllm bench serve` 0.32."""


def health(**changes: Any) -> Health:
    fields = {
        "process": 0, "wall_s": 10.0, "cpu_s": 1.0, "lags_s": [0.0001] * 50, "max_lag_s": 0.001, "loop_delays_s": [0.0] * 50,
        "max_loop_delay_s": 0.0, "num_held_back": 0, "num_held_back_by_bound": 0, "num_unsent": 0, "num_gaps_dropped": 0,
    } | changes  # fmt: skip
    return Health(**fields)


def scenario(*tenants: dict[str, Any], **run: Any) -> Scenario:
    return parse_scenario({"duration_s": 100, "tenants": list(tenants or ({},)), **run}, origin="x")


def summary(records: list[Record], of: Scenario | None = None, **healthy: Any) -> dict[str, Any]:
    return summarise(of or scenario(), Run(records=records, healths=[health(**healthy)]))


def test_names_and_values_are_those_of_vllm_bench_serve() -> None:
    records = [
        record(intended_s=0.0, sent_s=0.0, first_s=0.1, last_s=0.4, ended_s=0.4, output_tokens=4, prompt_tokens=10,
               gaps=array("f", [0.1, 0.2]).tobytes()),
        record(intended_s=0.0, sent_s=0.0, first_s=0.3, last_s=0.3, ended_s=2.0, output_tokens=1, prompt_tokens=10),
        record(
            outcome=Outcome.REFUSED, code="RESOURCE_EXHAUSTED", reason="OVERLOADED", first_s=None, last_s=None, output_tokens=0
        ),
    ]  # fmt: skip
    result = summary(records, scenario({"slo": {"ttft_ms": 200}}))
    assert set(VLLM_KEYS) <= set(result)
    duration = 1.2  # the refusal ended last
    expected = {
        "duration": duration, "completed": 2, "failed": 1, "total_input_tokens": 20, "total_output_tokens": 5,
        "request_throughput": 2 / duration, "request_goodput": 1 / duration, "output_throughput": 5 / duration,
        "total_token_throughput": 25 / duration, "mean_ttft_ms": 200, "median_ttft_ms": 200, "mean_tpot_ms": 100,
        "mean_itl_ms": 150, "mean_e2el_ms": 350,
    }  # fmt: skip
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert result["rejects_by_reason"] == {"RESOURCE_EXHAUSTED: OVERLOADED": 1}
    assert result["refused"] == 1 and result["errors"] == 0


def test_nothing_finished_gives_no_throughput_no_latency_and_no_goodput() -> None:
    result = summary([record(outcome=Outcome.FAILED, code="UNAVAILABLE", first_s=None, last_s=None, output_tokens=0)])
    assert result["request_goodput"] is None and result["p99_ttft_ms"] is None and result["output_throughput"] == 0
    assert result["num_ttft"] == 0 and result["errors_by_code"] == {"UNAVAILABLE": 1}
    assert summary([])["sent"] == 0


def test_latency_counts_from_when_a_request_was_due() -> None:
    late = records_at([float(at) for at in range(40)])
    late = [record(intended_s=r.intended_s, sent_s=r.sent_s + 0.5, first_s=r.first_s + 0.5, last_s=r.last_s + 0.5,
                   ended_s=r.ended_s + 0.5) for r in late]  # fmt: skip
    result = summary(late)
    assert result["median_ttft_ms"] == pytest.approx(600)
    assert result["coordinated_omission"]["p99_ttft_from_send_ms"] == pytest.approx(100)
    assert result["coordinated_omission"]["p99_wait_before_send_ms"] == pytest.approx(500)


def test_warm_up_and_cool_down_are_cut() -> None:
    records = records_at(list(np.arange(0, 100, 0.5)), took_s=0.25)
    result = summary(records, scenario(warmup_s=20, cooldown_s=29.5))
    assert result["window"]["begin_s"] == 20 and result["window"]["end_s"] == pytest.approx(70)
    assert result["sent"] == result["completed"] == 100
    assert result["request_throughput"] == pytest.approx(2, rel=0.02)
    assert result["output_throughput"] == pytest.approx(20, rel=0.02)


@given(begin_s=st.floats(0.1, 1e5), gaps_s=st.lists(st.floats(1e-3, 1), min_size=1, max_size=200))
def test_the_answer_that_ends_last_is_counted(begin_s: float, gaps_s: list[float]) -> None:
    """The window closes with it, and the sum of its rounded gaps may be more."""
    times = begin_s + np.concatenate(([0.0], np.cumsum(gaps_s)))
    last = record(
        intended_s=begin_s, sent_s=begin_s, first_s=times[0], last_s=times[-1], ended_s=times[-1],
        gaps=array("f", np.diff(times)).tobytes(), output_tokens=len(times), seen_tokens=len(times), seen_chunks=len(times),
    )  # fmt: skip
    result = summary([last], scenario(warmup_s=begin_s / 2, duration_s=2 * begin_s))
    assert result["request_throughput"] * result["duration"] == pytest.approx(1)
    assert result["output_throughput"] * result["duration"] == pytest.approx(len(times))


def test_what_was_not_measured_was_not_left_out_either() -> None:
    nothing = summary([record(first_s=None, last_s=None, output_tokens=0, outcome=Outcome.REFUSED)])[
        "coordinated_omission"
    ]
    assert nothing["p99_ttft_from_send_ms"] is None and nothing["p99_ttft_from_due_ms"] is None
    assert nothing["p99_wait_before_send_ms"] == 0
    assert set(summary([])["coordinated_omission"].values()) == {None}


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"lags_s": [0.05] * 50}, "sent late"),
        ({"loop_delays_s": [0.05] * 50}, "event loop was late"),
        ({"cpu_s": 9.5}, "95% of a core"),
        ({"num_held_back_by_bound": 30}, "max_in_flight"),
        ({"num_unsent": 30}, "not sent before"),
    ],
)
def test_a_client_that_was_the_bottleneck_makes_the_run_invalid(bad: dict[str, Any], expected: str) -> None:
    records = records_at([float(at) for at in range(100)])
    assert summary(records)["valid"]
    result = summary(records, **bad)
    assert not result["valid"] and expected in result["invalid_because"][0]


def test_a_run_that_sent_nothing_says_so_and_nothing_of_the_client() -> None:
    result = summary([], cpu_s=0.099, wall_s=0.1)
    assert result["invalid_because"] == ["nothing was sent: no request was due before the run ended"]
    assert "not sent before" in summary([], num_unsent=5)["invalid_because"][0]
    refused = record(outcome=Outcome.REFUSED, code="HTTP_429", first_s=None, last_s=None, output_tokens=0)
    (late,) = summary([refused], lags_s=[0.05])["invalid_because"]
    assert "and 5.0 ms are allowed where nothing finished" in late


def test_waiting_for_the_loads_own_limit_is_no_fault_of_the_client() -> None:
    result = summary(records_at([0.0] * 100), scenario({"max_concurrency": 1}), num_unsent=30)
    assert result["valid"] and any("not sent before" in note for note in result["notes"])


def test_a_lost_sender_makes_the_run_invalid() -> None:
    run = Run(records=records_at([0.0, 1.0]), healths=[health()], lost=["sender 1: gone"])
    assert summarise(scenario(), run)["invalid_because"] == ["a sending process was lost: sender 1: gone"]


def test_littles_law_holds_of_a_steady_run_and_not_of_wrong_times() -> None:
    draw = np.random.default_rng(0)
    times = list(np.cumsum(draw.exponential(0.1, 1000)))
    assert summary(records_at(times, took_s=0.5))["little"]["ratio"] == pytest.approx(1, abs=0.02)
    lasting = records_at([0.0] * 100, took_s=50.0)  # all edge
    lasting[-1] = record(intended_s=40.0, sent_s=40.0, first_s=41.0, last_s=42.0, ended_s=42.0)
    assert any("Little" in note for note in summary(lasting)["notes"])


def test_a_queue_that_grows_is_not_steady() -> None:
    growing = [
        record(intended_s=at, sent_s=at, first_s=2 * at + 0.1, last_s=2 * at + 0.2, ended_s=2 * at + 0.2)
        for at in np.arange(0, 50, 0.25).tolist()
    ]
    result = summary(growing)
    assert result["steady_state"]["is_steady"] is False and any("not steady" in note for note in result["notes"])
    draw = np.random.default_rng(1)
    steady = records_at(list(np.cumsum(draw.exponential(0.25, 400))), took_s=0.5)
    assert summary(steady)["steady_state"]["is_steady"] is True


def test_tenants_are_told_apart_and_shares_compared() -> None:
    two = scenario({"name": "a", "weight": 2}, {"name": "b"})
    times = list(np.arange(0, 20, 0.1))
    records = sorted(records_at(times) + records_at(times, tenant=1, output_tokens=2), key=lambda each: each.intended_s)
    result = summary(records, two)
    assert result["tenants"]["a"]["total_output_tokens"] == 5 * result["tenants"]["b"]["total_output_tokens"]
    # Service: 20 + 2 · 10 = 40 a request over weight 2, and 20 + 2 · 2 = 24 over 1.
    assert result["jain_index"] == pytest.approx((20 + 24) ** 2 / (2 * (20**2 + 24**2)))
    assert result["max_service_gap"] == pytest.approx(4 * 200, rel=0.05)


def test_jain_and_gap_of_corner_cases() -> None:
    assert jain([1, 1, 1]) == 1 and jain([1, 0, 0]) == pytest.approx(1 / 3) and jain([0, 0]) is None
    assert service_gap([record()], [1.0], 0.0) is None
    # One after the other: never busy together, so never apart while both were.
    alone = records_at([0.0]) + records_at([5.0], tenant=1)
    assert service_gap(alone, [1.0, 1.0], 0.0) == 0
    assert in_flight(alone, np.array([0.1, 1.0, 5.1])).tolist() == [1, 0, 1]


def test_intervals_and_stages_are_there() -> None:
    result = summary(records_at(list(np.arange(0, 50, 0.1))))
    interval = result["confidence"]["median_ttft_ms"]
    assert interval["low"] <= 100.001 and interval["high"] >= 99.999
    assert result["server_stages"]["queue"]["median_ms"] == pytest.approx(10)


def test_repeats_are_summed_and_averaged() -> None:
    results = [summary(records_at(list(np.arange(0, 10, 0.1)), took_s=took)) for took in (0.2, 0.4)]
    both = of_repeats(results)
    assert both["completed"] == 200 and both["median_ttft_ms"] == pytest.approx(150)
    assert len(both["runs"]) == 2 and len(both["requests"]["ttft_s"]) == 200
    assert both["between_runs"]["median_ttft_ms"]["std"] == pytest.approx(70.71, rel=1e-3)
    assert both["tenants"]["default"]["completed"] == 200


def test_what_stands_beside_averages_of_runs_is_of_all_of_them() -> None:
    times = list(np.arange(0, 10, 0.1))
    clients = [{"cpu_s": 2.0}, {"cpu_s": 7.0}, {"cpu_s": 1.0, "lags_s": [0.003] * 50, "bound_reached_s": 99.5}]
    results = [
        summary(records_at(times, took_s=took_s), **client)
        for took_s, client in zip((0.2, 0.4, 0.6), clients, strict=True)
    ]
    both = of_repeats(results)
    for name in ("mean_ttft_ms", "median_ttft_ms", "p99_e2el_ms"):
        interval, spread = both["confidence"][name], both["between_runs"][name]
        assert (interval["low"], interval["high"]) == (spread["low"], spread["high"])
        assert interval["low"] < both[name] < interval["high"] and interval["effective_samples"] == 3
    assert both["max_ttft_ms"] == pytest.approx(300) and both["min_ttft_ms"] == pytest.approx(100)
    assert not parse_assertion("ttft_max<250ms").check(both).holds
    assert both["max_concurrent_requests"] == max(result["max_concurrent_requests"] for result in results)
    assert both["client"]["max_cpu"] == pytest.approx(0.7) and both["client"]["median_send_lag_ms"] == pytest.approx(3)
    assert both["client"]["bound_reached_s"] == 99.5
    assert both["server_stages"]["queue"]["median_ms"] == pytest.approx(10)
    for name in ("window", "coordinated_omission", "steady_state", "little"):
        assert both[name] is None and all(run[name] is not None for run in both["runs"])
    page = report(scenario(), both, records_at(times))
    assert "Over time, run 1" in page and ", run 1" not in report(scenario(), results[0], records_at(times))
    print_result(both, Console(file=io.StringIO()))


def test_each_repeat_tells_as_much_as_another() -> None:
    """They have draws of their own: Student's t of all of them, also where they happen to lie in a row."""
    times = list(np.arange(0, 10, 0.1))
    took = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    both = of_repeats([summary(records_at(times, took_s=took_s)) for took_s in took])
    means_ms = [run["mean_ttft_ms"] for run in both["runs"]]
    expected = scipy.stats.t.interval(0.95, len(took) - 1, np.mean(means_ms), scipy.stats.sem(means_ms))
    interval = both["confidence"]["mean_ttft_ms"]
    assert (interval["low"], interval["high"]) == pytest.approx(expected) and interval["effective_samples"] == len(took)


@pytest.mark.parametrize("place", range(3))
def test_a_repeat_that_measured_nothing_is_no_part_of_an_average(place: int) -> None:
    measured = [summary(records_at(list(np.arange(0, 10, 0.1)), took_s=took)) for took in (0.2, 0.4)]
    refused = record(outcome=Outcome.REFUSED, code="HTTP_429", first_s=None, last_s=None, output_tokens=0)
    results = [*measured[:place], summary([refused]), *measured[place:]]
    merged = of_repeats(results)
    for of in (merged, merged["tenants"]["default"]):
        assert of["median_ttft_ms"] == pytest.approx(150) and of["num_ttft"] == 200 and of["sent"] == 201
    assert merged["between_runs"]["median_ttft_ms"]["std"] == pytest.approx(70.71, rel=1e-3)
    told = f"nothing was measured in run {place + 1}"
    for bound in ("ttft_median<10s", "ttft_median>1ms", "default:ttft_median<10s"):
        checked = parse_assertion(bound).check(merged)
        assert not checked.holds and told in str(checked)
    assert parse_assertion("refused==1").check(merged).holds
    nothing = of_repeats([summary([refused])] * 3)
    assert nothing["p99_ttft_ms"] is None and nothing["between_runs"].get("p99_ttft_ms") is None
    assert "median_ttft_ms" not in {row.name for row in compare(merged, nothing)}
    for shown in (merged, nothing):
        print_result(shown, Console(file=io.StringIO()))
        curve_report("sweep", [], [(1.0, shown)], "requests/s")
        assert "requests/s" in _line(shown)


def test_files_are_written(tmp_path: Any) -> None:
    records = [*records_at([0.0, 1.0]), record(outcome=Outcome.REFUSED, reason="=cmd()", first_s=None, last_s=None)]
    result = summary(records) | {"odd": math.inf}
    write_json(result, tmp_path / "r.json")
    read = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert read["completed"] == 2 and read["odd"] is None
    write_csv(scenario(), [records], tmp_path / "r.csv")
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("run,tenant,session") and "'=cmd()" in lines[3]
    with (tmp_path / "r.csv").open(newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["", "", "'=cmd()"]
