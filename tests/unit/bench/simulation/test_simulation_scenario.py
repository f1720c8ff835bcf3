import math
import re
from pathlib import Path

import pytest

from bench.simulation.compare import read_variants, with_changes
from bench.simulation.run import resolve
from bench.simulation.scenario import Groups, load_scenario, parse_scenario, scenario_of_trace, trace_format
from bench.simulation.workload import make_requests
from model_parallel.errors import ConfigError
from serving.config import ModelEntry

GROUPS = {"model": "llama-2-7b", "profile": "h200"}
SHIPPED = Path(__file__).parents[4] / "bench" / "simulation" / "scenarios"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_scenarios_are_good(path: Path) -> None:
    scenario = load_scenario(path)
    assert resolve(scenario.groups).kv_cache_tokens > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": {}}, "unknown key 'group'; did you mean 'groups'"),
        ({"groups": {**GROUPS, "num_groups": 0}}, "groups.num_groups: .*greater than or equal to 1.*got 0"),
        (
            {"groups": {**GROUPS, "quantisation": "int8"}},
            "unknown key 'groups.quantisation'; did you mean 'quantization'",
        ),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "the name 'a' stands 2 times"),
        ({"tenants": [{"name": "a", "weight": 0}]}, "tenants.0.weight"),
        ({"tenants": [{"name": "a", "arrivals": {"process": "trace"}}]}, "need work of kind trace"),
        ({"scaling": {"min_groups": 5, "max_groups": 2}}, "min_groups is 5"),
        (
            {"groups": {**GROUPS, "num_groups": 4}, "scaling": {"max_groups": 3}},
            "groups.num_groups is 4; it must lie between scaling.min_groups, 1, and scaling.max_groups, 3",
        ),
        ({"duration_s": 10, "warmup_s": 10}, "warmup_s is 10"),
        ({"failures": {"every_s": -1}}, "failures.every_s"),
        ({"duration_s": 10, "failures": {"at_s": [5, 11]}}, "failures.at_s has 11, which is after duration_s, 10"),
    ],
)
def test_a_bad_scenario_is_refused_by_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_scenario({"groups": GROUPS} | change, origin="a.yaml")


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"failures": {"at_s": [-5.0]}}, "failures.at_s.0"),
        ({"failures": {"at_s": [1.0, NAN]}}, "failures.at_s.1"),
        ({"failures": {"at_s": [INF]}}, "failures.at_s.0"),
        ({"failures": {"at_s": [1.0] * 10_001}}, "failures.at_s"),
        ({"failures": {"every_s": INF}}, "failures.every_s"),
        ({"failures": {"every_s": 1e-6}}, "failures.every_s is 1e-06; of 600 s it must be at least 0.06"),
        ({"failures": {"every_s": 1e-300}}, "failures.every_s is 1e-300"),
        ({"groups": GROUPS | {"start_s": 1e300}}, "groups.start_s"),
        ({"groups": GROUPS | {"kv_cache_tokens": 10**15}}, "groups.kv_cache_tokens"),
        ({"tenants": [{"deadline_s": INF}]}, "tenants.0.deadline_s"),
        ({"tenants": [{"patience_s": 1e300}]}, "tenants.0.patience_s"),
        ({"tenants": [{"max_tokens": 10**12}]}, "tenants.0.max_tokens"),
        ({"tenants": [{"limits": {"token_budget": 10**400}}]}, "tenants.0.limits.token_budget"),
        (
            {"tenants": [{"arrivals": {"process": "poisson", "diurnal": {"period_s": 1e-6}}}]},
            "arrivals.diurnal.period_s 1e-06",
        ),
        ({"scaling": {"max_groups": 3, "upscale_delay_s": INF}}, "scaling.upscale_delay_s"),
        ({"scaling": {"max_groups": 3, "period_s": 1e-9}}, "scaling.period_s"),
        (
            {"scaling": {"max_groups": 3, "downscale_delay_s": 0}},
            "downscale_delay_s is 0; of policy packtrain",
        ),
        ({"gateways": {"request_s": NAN}}, "gateways.request_s"),
        ({"duration_s": NAN}, "duration_s"),
    ],
)
def test_numbers_that_cannot_be_simulated_are_refused_by_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(field)):
        parse_scenario({"groups": GROUPS} | change, origin="a.yaml")


def test_a_model_that_does_not_fit_is_refused_with_numbers() -> None:
    scenario = parse_scenario({"groups": {"model": "llama-2-70b", "profile": "a100-80g"}}, origin="a.yaml")
    with pytest.raises(ConfigError, match="rank 0 of 1 needs"):
        resolve(scenario.groups)
    scenario = parse_scenario({"groups": GROUPS | {"max_model_len": 9999}}, origin="a.yaml")
    with pytest.raises(ConfigError, match="max_model_len is 9999"):
        resolve(scenario.groups)


def test_traces_are_told_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for text, form in [
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n", "azure"),
        (
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n",
            "burstgpt",
        ),
        ('{"timestamp": 27482, "input_length": 1500, "output_length": 52, "hash_ids": [46, 47, 48]}\n', "mooncake"),
        ("timestamp,input_tokens,output_tokens\n0.5,10,20\n", "csv"),
    ]:
        path.write_text(text, encoding="utf-8-sig")
        assert trace_format(path) == form
        path.write_text(text)
        assert trace_format(path) == form
        scenario = scenario_of_trace(path, {"model": "llama-2-7b", "profile": "h200"})
        requests = make_requests(scenario, max_model_len=1024)
        assert len(requests) == 1
        assert requests.prompt_tokens[0] + requests.output_tokens[0] <= 1024
    with pytest.raises(ConfigError, match="cannot be read"):
        trace_format(tmp_path / "nothing")


def test_what_is_cut_is_counted_and_told(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = "0,5000,5\n1,90,50\n2,90,8\n70,10,5\n"
    path.write_text("timestamp,input_tokens,output_tokens\n" + lines)
    work = {"kind": "trace", "format": "csv", "path": str(path)}
    data = {"groups": GROUPS, "duration_s": 60}
    tenants = [{"name": "a", "work": work, "arrivals": {"process": "trace"}}]
    requests = make_requests(parse_scenario(data | {"tenants": tenants}, origin="a.yaml"), max_model_len=100)
    assert list(requests.prompt_tokens) == [95, 50, 90]
    assert requests.num_cut == 2
    assert requests.notes == [
        "tenant a: 3 of 4 requests of the trace are due within the duration of 60 s; the last is due at 70 s: a longer duration "
        "sends all",
        "2 of 3 requests were cut to the model's length, 100 tokens of prompt and answer; a server refuses such requests",
    ]
    tenants[0]["work"] = work | {"max_tokens": 100}  # so they are asked for
    asked = parse_scenario(data | {"tenants": tenants, "duration_s": 100}, origin="a.yaml")
    assert make_requests(asked, max_model_len=100).notes == []
    turns = {"kind": "synthetic", "input_tokens": 30, "output_tokens": 10, "turns": {"count": 3}}
    tenants = [{"name": "b", "work": turns, "max_requests": 2}]
    sessions = make_requests(parse_scenario(data | {"tenants": tenants}, origin="a.yaml"), max_model_len=100)
    assert len(sessions) == 4
    assert sessions.notes == ["2 sessions end before the turn that would be longer than the model's length, 100 tokens"]


def test_shared_blocks_of_a_trace_are_shared_tokens(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    lines = (
        f'{{"timestamp": {at}, "input_length": 1100, "output_length": 5, "hash_ids": {ids}}}'
        for at, ids in [(0, [7, 8, 9]), (1, [7, 8, 5])]
    )
    path.write_text("\n".join(lines))
    scenario = scenario_of_trace(path, {"model": "llama-2-7b", "profile": "h200"})
    requests = make_requests(scenario, max_model_len=4096)
    one, other = (requests.prompt(index, (), with_content=True) for index in range(2))
    assert len(one) == len(other) == 1100
    assert one[:1024] == other[:1024]
    assert not set(one[1024:]) & set(other[1024:])


def test_a_rate_and_a_mean_come_out() -> None:
    scenario = parse_scenario(
        {
            "groups": GROUPS, "duration_s": 1000,
            "tenants": [{"name": "a", "arrivals": {"process": "poisson", "rate": 5}, "max_tokens": 300,
                         "work": {"kind": "synthetic", "output_tokens": {"kind": "lognormal", "mean": 100}}}],
        },
        origin="a.yaml",
    )  # fmt: skip
    requests = make_requests(scenario, max_model_len=4096)
    assert len(requests) == pytest.approx(5000, rel=0.06)
    assert sum(requests.output_tokens) / len(requests) == pytest.approx(89, rel=0.1)
    assert max(requests.output_tokens) <= 300
    assert set(requests.max_tokens) == {300}
    assert list(requests.ticks) == sorted(requests.ticks)


def test_variants_change_what_they_say() -> None:
    data = {"groups": dict(GROUPS), "failures": {"at_s": [1]}}
    name, changed = with_changes(data, "more: groups.num_groups=4 failures.migration=false scaling.max_groups=9")
    assert name == "more"
    assert changed == {
        "groups": {**GROUPS, "num_groups": 4}, "failures": {"at_s": [1], "migration": False}, "scaling": {"max_groups": 9},
    }  # fmt: skip
    assert data == {"groups": GROUPS, "failures": {"at_s": [1]}}
    for wrong in ("no colon", "a: groups", "a: groups.model.size=3"):
        with pytest.raises(ConfigError, match="variant"):
            with_changes(data, wrong)
    assert list(read_variants(data, ["a: groups.num_groups=4", "b: groups.num_groups=5"])) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"variant 'a : groups\.num_groups=5': the name 'a' stands twice"):
        read_variants(data, ["a: groups.num_groups=4", "a : groups.num_groups=5"])


def test_settings_of_a_model_are_called_as_in_what_is_served() -> None:
    simulated_alone = {"model", "profile", "start_s", "share_a_machine"}
    assert set(Groups.model_fields) - simulated_alone <= set(ModelEntry.model_fields)
