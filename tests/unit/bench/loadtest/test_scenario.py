"""Scenarios are read whole, or refused by the field that is wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from bench.loadtest.campaign import Search, Wanted, _unit, found_lines, run_campaign
from bench.loadtest.flags import parse_address, parse_percentiles, parse_sweep, scenario_from
from bench.loadtest.leader import Senders
from bench.loadtest.scenario import (
    Closed,
    Fixed,
    OpenLoop,
    Scenario,
    Trace,
    parse_scenario,
    read_scenario,
    with_rate,
    with_seed,
    with_users,
)
from bench.loadtest.search import Found
from bench.loadtest.targets import check_allowed, parse_target
from model_parallel.errors import ConfigError

BURSTS = {"every_s": 9, "length_s": 1, "times": 5}
EXAMPLES = Path(__file__).parents[4] / "examples" / "load"


def tenants(*changes: dict[str, Any], **run: Any) -> Scenario:
    return parse_scenario({"tenants": [{"name": f"t{i}"} | each for i, each in enumerate(changes)], **run}, origin="x")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"wrok": {}}, r"'tenants.0.wrok'; did you mean 'work'\?"),
        ({"work": {"kind": "synthetic", "input_token": 3}}, "'tenants.0.work.synthetic.input_token'; did you mean 'input_tok"),
        ({"work": {"kind": "poem"}}, "tenants.0.work.*'synthetic'"),
        ({"work": {"kind": "synthetic", "input_tokens": 0}}, "input_tokens.fixed.tokens.*got 0"),
        ({"work": {"kind": "synthetic", "input_tokens": {"kind": "uniform", "min": 5, "max": 4}}}, "min is 5 and must not"),
        ({"arrivals": {"process": "poisson", "rate": 0}}, "tenants.0.arrivals.poisson.rate"),
        ({"arrivals": {"process": "poisson", "burstiness": 2}}, "burstiness is of process gamma"),
        ({"arrivals": {"process": "constant", "rate": 1, "stages": [{"duration_s": 1, "start": 1}]}}, "exclude each other"),
        ({"arrivals": {"process": "constant", "stages": [{"duration_s": 1, "start": 0}]}}, "no rate above 0"),
        ({"arrivals": {"process": "closed", "stages": [{"duration_s": 1, "start": 0, "end": 0}]}}, "no number of users above 0"),
        ({"arrivals": {"process": "trace"}}, "go together"),
        ({"arrivals": {"process": "once"}}, "needs max_requests"),
        ({"target": "ftp://x"}, "tenants.0.target.*grpc://"),
        ({"target": "grpc://x/path"}, "has a path"),
        ({"target": "http://u:p@x"}, "no user"),
        ({"target": "http://@x"}, "no user"),
        ({"target": "http://:p@x"}, "no user"),
        ({"target": "http://127.0.0.1:0"}, "port 0"),
        ({"target": "grpc://127.0.0.1:0"}, "port 0"),
        ({"target": "http://x", "extra_body": {"a": [b"\xff"]}}, "tenants.0.extra_body.*nothing but what JSON has.*bytes"),
        ({"target": "http://x", "extra_body": {"a": float("nan")}}, "tenants.0.extra_body"),
        ({"target": "http://x", "extra_body": {"a": "\ud800"}}, "tenants.0.extra_body.*surrogates not allowed"),
        ({"work": {"kind": "synthetic", "input_tokens": 2.5}}, "input_tokens.fixed.tokens.*got 2.5"),
        ({"api": "chat"}, "target grpc://127.0.0.1:50051 takes generate-stream"),
        ({"target": "http://x", "api": "chat", "form": "ids"}, "takes chat alone"),
        ({"api": "score", "work": {"kind": "synthetic", "turns": {"count": 2}}}, "of one turn"),
        ({"stream": False}, "HTTP targets"),
        ({"api_key_env": "A", "api_key_file": "b"}, "exclude each other"),
        ({"name": ""}, "tenants.0.name"),
        ({"slo": {"ttft": 5}}, "did you mean 'ttft_ms'"),
        ({"max_concurrency": 0}, "tenants.0.max_concurrency"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        tenants(change)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"duration_s": 1, "warmup_s": 1}, "must be below"),
        ({"duration": 1}, "did you mean 'duration_s'"),
        ({"tenants": []}, "tenants"),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "'a' stands 2 times"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_wrong_of_the_run_is_named(run: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_scenario(run, origin="x")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_scenario_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.yaml"):
        read_scenario(path)


def test_the_example_is_a_scenario_and_survives_being_sent() -> None:
    scenario = parse_scenario(read_scenario(EXAMPLES / "mix.yaml"), origin="the example")
    assert [tenant.chosen_api for tenant in scenario.tenants] == ["generate-stream", "generate-stream", "chat"]
    assert Scenario.model_validate_json(scenario.model_dump_json(exclude_unset=True)) == scenario


def test_file_names_are_relative_to_the_scenario(tmp_path: Path) -> None:
    data = {"tenants": [{"work": {"kind": "jsonl", "path": "prompts.jsonl"}, "api_key_file": "key"}]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
    (tenant,) = parse_scenario(read_scenario(tmp_path / "s.yaml"), origin="x").tenants
    assert tenant.work.path == tmp_path / "prompts.jsonl"  # type: ignore[union-attr]
    assert tenant.api_key_file == tmp_path / "key"


def test_a_rate_is_shared_out_as_before() -> None:
    scenario = with_rate(tenants(*({"arrivals": {"process": "poisson", "rate": rate}} for rate in (1, 3))), 8)
    assert [tenant.arrivals.rate for tenant in scenario.tenants] == [2, 6]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="'t0' has arrivals without one rate"):
        with_rate(tenants({"arrivals": {"process": "closed"}}), 1)


@pytest.mark.parametrize("number", [1e7, 1e300, math.inf, math.nan, 0.0, -1.0])
def test_rates_and_users_of_sweeps_are_checked_as_those_of_files(number: float) -> None:
    with pytest.raises(ConfigError, match=r"arrivals of tenant 't0': rate: Input should be"):
        with_rate(tenants({}), number)
    if number > 1e5 and math.isfinite(number):
        with pytest.raises(
            ConfigError, match=r"arrivals of tenant 't0': users: Input should be less than or equal to 100000"
        ):
            with_users(tenants({"arrivals": {"process": "closed"}}), int(number))


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (Wanted(search=Search(slo=[], highest=1e8)), "rate: Input should be less than or equal to 1000000"),
        (Wanted(search=Search(slo=[], start=1e8, highest=1e9)), "rate: Input should be less than or equal to 1000000"),
        (Wanted(sweep=[1.0, 1e7]), "rate: Input should be less than or equal to 1000000"),
    ],
)
async def test_a_rate_that_nobody_may_send_is_refused_before_anybody_is_asked(wanted: Wanted, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        await run_campaign(Scenario(), Senders(), None, wanted, Console())


def test_every_run_has_a_seed_of_its_own_and_a_good_one() -> None:
    last = parse_scenario({"seed": 2**63 - 1}, origin="x")
    seeds = [with_seed(last, number).seed for number in range(3)]
    assert seeds == [2**63 - 1, 0, 1]


@pytest.mark.parametrize(
    ("arrivals", "told"),
    [
        (
            {"bursts": {"every_s": 1e-6, "length_s": 1e-7, "times": 2}},
            "arrivals.bursts.every_s 1e-06; of a run of 60 s it must",
        ),
        (
            {"diurnal": {"period_s": 1e-6}},
            "arrivals.diurnal.period_s 1e-06; of a run of 60 s it must be at least 0.003",
        ),
        ({"rate": math.inf}, "rate: Input should be .* finite"),
    ],
)
def test_rates_that_would_take_for_ever_to_work_out_are_refused(arrivals: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tenants({"arrivals": {"process": "poisson", **arrivals}})


def test_users_are_shared_out_whole_and_all() -> None:
    three = tenants(*({"arrivals": {"process": "closed", "users": users}} for users in (1, 2, 4)))
    for total in range(7, 40):
        scenario = with_users(three, total)
        assert sum(tenant.arrivals.users for tenant in scenario.tenants) == total  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="leave none for tenant"):
        with_users(three, 2)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "[::1]"])
def test_loopback_is_always_allowed(host: str) -> None:
    check_allowed([parse_target(f"grpc://{host}:1")], owns_them=False)


@pytest.mark.parametrize("host", ["10.0.0.1", "example.com", "localhost.example.com", "0.0.0.0", "[2001:db8::1]"])
def test_everything_else_only_when_it_is_said_to_be_ones_own(host: str) -> None:
    target = parse_target(f"http://{host}:80")
    with pytest.raises(ConfigError, match="--yes-i-own-this"):
        check_allowed([target], owns_them=False)
    check_allowed([target], owns_them=True)


def test_flags_make_a_scenario() -> None:
    scenario = scenario_from(
        {"request_rate": 5.0, "burstiness": 2.0, "input_len": 7, "goodput": ["ttft:500"], "warmup": 2.0}
    )
    (tenant,) = scenario.tenants
    assert tenant.arrivals == OpenLoop(process="gamma", rate=5, burstiness=2)
    assert tenant.slo.bounds_s == {"ttft": 0.5}
    assert scenario.warmup_s == 2


def test_flags_that_say_nothing_are_refused() -> None:
    for flags, expected in (
        ({"dataset_name": "poem"}, "--dataset-name is 'poem'"),
        ({"dataset_name": "jsonl"}, "needs --dataset-path"),
        ({"dataset_path": Path("x")}, "needs a --dataset-name"),
        ({"dataset_name": "azure", "dataset_path": Path("x"), "output_len": 3}, "--output-len"),
        ({"dataset_name": "azure", "dataset_path": Path("x"), "request_rate": 3.0}, "--request-rate"),
        ({"users": 2, "request_rate": 3.0}, "--request-rate"),
        ({"think_time": 2.0}, "--think-time"),
        ({"num_prefixes": 2}, "--prefix-len"),
        ({"request_rate": float("inf")}, "--num-prompts"),
        ({"request_rate": float("inf"), "num_prompts": 2, "burstiness": 2.0}, "--burstiness"),
        ({"scenario": Path("x"), "input_len": 3}, "--input-len: with --scenario"),
        ({"goodput": ["ttft"]}, "like ttft:500"),
        ({"goodput": ["speed:3"]}, "measures are"),
        ({"goodput": ["ttft:500", "tpot:5", "ttft:100"]}, "another bound of ttft is given"),
    ):
        with pytest.raises(ConfigError, match=expected):
            scenario_from(flags)


def test_a_whole_number_of_tokens_may_have_a_point() -> None:
    (tenant,) = tenants({"work": {"kind": "synthetic", "input_tokens": 2.0}}).tenants
    assert tenant.work.input_tokens == Fixed(tokens=2)


def test_addresses_are_read_or_refused() -> None:
    assert parse_address("[::1]:50060", "--join") == ("::1", 50060)
    assert parse_address("127.0.0.1:0", "--listen", lowest_port=0) == ("127.0.0.1", 0)
    for wrong in (
        "127.0.0.1:²",
        "127.0.0.1:٣",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        ":5",
        "x:",
        "x",
        "x:-1",
        "x:1_0",
        "x:" + "9" * 5000,
    ):
        with pytest.raises(ConfigError, match=r"--join is .*; it must be HOST:PORT"):
            parse_address(wrong, "--join")


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ([{}], "requests/s sent"),
        ([{"work": {"kind": "synthetic", "turns": {"count": 3}}}], "sessions/s begun"),
        ([{}, {"work": {"kind": "sharegpt", "path": "x", "max_turns": 2}}], "sessions/s begun"),
        ([{"arrivals": {"process": "poisson", "bursts": BURSTS}}], "requests/s sent between bursts"),
        ([{"arrivals": {"process": "closed"}, "work": {"kind": "synthetic", "turns": {"count": 3}}}], "users"),
    ],
)  # fmt: skip
def test_the_numbers_of_a_search_are_told_by_what_they_are(changes: list[dict[str, Any]], unit: str) -> None:
    assert _unit(tenants(*changes)) == unit
    told = found_lines(Found(rate=2.0, failed_at=3.0), [], unit)[0]
    assert told.startswith(f"2 {unit} keep ")


def test_a_search_begins_where_it_is_told_to() -> None:
    assert Search(slo=[], start=0.002).lowest == 0.002
    assert Search(slo=[], start=4.0).lowest == 0.05
    with pytest.raises(ConfigError, match="--search-from is 5 and must not exceed --search-to, 2"):
        Search(slo=[], start=5, highest=2)


def test_a_number_of_requests_sends_all_at_once_unless_a_rate_is_given() -> None:
    assert scenario_from({"num_prompts": 5}).tenants[0].arrivals.process == "once"
    assert scenario_from({"num_prompts": 5, "request_rate": 2.0}).tenants[0].arrivals.process == "poisson"
    closed = scenario_from({"users": 3, "think_time": 2.0, "num_prompts": 9}).tenants[0].arrivals
    assert closed == Closed(process="closed", users=3, think_s=2)


def test_a_trace_has_its_own_times() -> None:
    flags = {"dataset_name": "mooncake", "dataset_path": EXAMPLES / "mooncake.jsonl"}
    (tenant,) = scenario_from(flags).tenants
    assert isinstance(tenant.work, Trace) and tenant.arrivals.process == "trace"


def test_lists_of_numbers_are_read_or_refused() -> None:
    assert parse_sweep("1,2.5,4") == [1, 2.5, 4]
    assert parse_sweep("1:16:5") == [1, 2, 4, 8, 16]
    assert parse_percentiles("50,99.9") == [50, 99.9]
    for wrong in ("", "0", "1,-2", "16:1:5", "1:2", "1:2:1", "x", "inf"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_sweep(wrong)
    for wrong in ("", "0", "101", "x"):
        with pytest.raises(ConfigError, match="--metric-percentiles"):
            parse_percentiles(wrong)
