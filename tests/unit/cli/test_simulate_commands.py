"""The `packtrain simulate` commands as they are called."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from bench.simulation import run
from bench.simulation.scenario import SimulationScenario
from model_parallel.errors import ConfigError
from serving.cli.main import app
from serving.config import ModelEntry
from serving.models.sizes import with_step_sizes


@pytest.fixture
def overloaded(tmp_path: Path) -> Path:
    """More than a group takes: most requests are refused."""
    data: dict[str, Any] = {
        "duration_s": 5,
        "groups": {
            "model": "llama-2-7b", "profile": "a100-80g", "max_num_seqs": 2, "max_waiting_requests": 1, "kv_cache_tokens": 4096,
        },
        "tenants": [{
            "arrivals": {"process": "poisson", "rate": 20},
            "work": {"kind": "synthetic", "input_tokens": 20, "output_tokens": 40},
        }],
    }  # fmt: skip
    path = tmp_path / "overloaded.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def capacity(scenario: Path, *more: str) -> list[str]:
    return [
        "simulate", "capacity", "--slo", "ttft_p99=1s", "--gpu", "a100-80g", "--model", "llama-2-7b", "--tp", "1",
        "--max-num-seqs", "2", "--scenario", str(scenario), *more,
    ]  # fmt: skip


def test_a_service_level_that_is_missed_is_null_in_json(overloaded: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result = CliRunner().invoke(app, capacity(overloaded, "--max-groups", "1", "--json", str(path)))
    assert result.exit_code == 1
    answers = json.loads(path.read_text(), parse_constant=pytest.fail)["answers"]
    assert answers[0]["best"] is None
    row = answers[0]["curve"][0]
    assert row["holds"] is False
    assert row["ttft_p99_s"] is None


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_simulated(
    overloaded: Path, tmp_path: Path
) -> None:
    for command in (
        ["simulate", "run", str(overloaded)],
        ["simulate", "compare", str(overloaded), "a: groups.num_groups=1"],
        capacity(overloaded),
        ["bench", "engine"],
        ["chaos"],
    ):
        for path, told in (
            (tmp_path, "a directory; it must be a file"),
            (tmp_path / "no" / "r", "there is no directory"),
        ):
            result = CliRunner().invoke(app, [*command, "--json", str(path)])
            assert isinstance(result.exception, ConfigError)
            assert f"--json is {path}" in str(result.exception)
            assert told in str(result.exception)
            assert not result.stdout


def test_requests_that_are_cut_are_told(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("timestamp,input_tokens,output_tokens\n0,100000,5\n1,100,5\n")
    result = CliRunner().invoke(
        app, [*capacity(tmp_path / "r")[:-2], "--trace", str(tmp_path / "long.csv"), "--json", str(tmp_path / "r.json")]
    )
    assert result.exit_code == 0
    told = "1 of 2 requests were cut to the model's length, 4096 tokens of prompt and answer; a server refuses such requests"
    assert f"note: {told}" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["answers"][0]["notes"] == [told]


def test_capacity_keeps_what_the_scenario_says_unless_a_flag_says_otherwise(overloaded: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = ["simulate", "capacity", "--slo", "ttft_p99=100s", "--gpu", "h100", "--tp", "1", "--max-groups", "1"]
    none: list[str] = []
    for flags, model, sizes in (
        (none, "llama-2-7b", (2, 2048)),
        (["--max-num-seqs", "3000"], "llama-2-7b", (3000, 3000)),
        (["--model", "llama-2-13b", "--max-num-batched-tokens", "64"], "llama-2-13b", (2, 64)),
    ):
        shown = CliRunner().invoke(app, [*command, "--scenario", str(overloaded), "--json", str(path), *flags])
        result = json.loads(path.read_text())
        assert (result["model"], result["max_num_seqs"], result["max_num_batched_tokens"]) == (model, *sizes)
        title = f"fewest GPUs, ttft_p99=100s: {model}, steps of at most {sizes[0]} sequences and {sizes[1]:,} tokens"
        assert title in " ".join(shown.stdout.split())
        assert result["answers"][0]["shape"] == "h100 TP=1 bfloat16"
    data = yaml.safe_load(overloaded.read_text())
    data["groups"]["quantization"] = "int8"
    data["groups"]["profile"] = "h200"
    overloaded.write_text(yaml.safe_dump(data))
    CliRunner().invoke(app, [*command, "--gpu", "h200", "--scenario", str(overloaded), "--json", str(path)])
    assert [answer["shape"] for answer in json.loads(path.read_text())["answers"]] == ["h200 TP=1 int8"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--speed", "2"], "--speed is of a --trace"),
        (["--max-num-seqs", "0"], "groups.max_num_seqs: Input should be greater than or equal to 1 (got 0)"),
        (["--max-num-batched-tokens", "1"], "max_num_batched_tokens is 1 and max_num_seqs 2; a step must have room"),
        (["--dtype", "bf16"], "groups.dtype: Input should be 'float32', 'bfloat16' or 'float16' (got 'bf16')"),
    ],
)
def test_flags_of_capacity_that_are_wrong_are_refused(overloaded: Path, flags: list[str], told: str) -> None:
    result = CliRunner().invoke(app, [*capacity(overloaded), *flags])
    assert isinstance(result.exception, ConfigError)
    assert told in str(result.exception)


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("scaling", {"max_groups": 3}, "the scenario has scaling; capacity finds a number of groups"),
        ("groups", {"model": "llama-2-7", "profile": "h100"}, "'llama-2-7' is neither a known model nor"),
        ("groups", {"model": "llama-2-7b", "profile": "h100", "max_model_len": 5000}, "groups.max_model_len is 5000"),
        (
            "tenants",
            [{"arrivals": {"process": "trace"}, "work": {"kind": "trace", "format": "csv", "path": "gone.csv"}}],
            "gone.csv: No such file or directory",
        ),
    ],
)
def test_what_no_shape_could_change_is_refused_and_is_no_answer(
    overloaded: Path, section: str, changes: Any, told: str
) -> None:
    overloaded.write_text(yaml.safe_dump(yaml.safe_load(overloaded.read_text()) | {section: changes}))
    flags = ["--gpu", "h100", "--tp", "1", "--scenario", str(overloaded)]
    result = CliRunner().invoke(app, ["simulate", "capacity", "--slo", "ttft_p99=1s", *flags])
    assert isinstance(result.exception, ConfigError)
    assert told in str(result.exception)


FITTED = {
    "kind": "steps", "origin": "a test", "model": "llama-2-7b", "tensor_parallel_size": 1, "dtype": "bfloat16",
    "quantization": "", "max_position": 2048, "knots": [[1, 0.01], [512, 0.1]], "row_s": 0.001, "context_s": 0,
    "pair_s": 0, "empty_s": 0, "num_steps": 100, "median_error": 0, "p90_error": 0,
}  # fmt: skip


@pytest.mark.parametrize(("quantization", "told"), [("", "float32"), ("packed", "packed")])
def test_a_trace_goes_to_what_a_profile_was_fitted_to(quantization: str, told: str, tmp_path: Path) -> None:
    """Which is never known by a GPU's profile, such as weights in groups, and of whose power nothing is known."""
    profile, path = tmp_path / "fitted.json", tmp_path / "r.json"
    shape = {"model": "mine", "tensor_parallel_size": 3, "dtype": "float32", "quantization": quantization}
    profile.write_text(json.dumps(FITTED | shape))
    (tmp_path / "t.csv").write_text("timestamp,input_tokens,output_tokens\n0,5,3\n1,5,3\n")
    asked = ["--slo", "ttft_p99=9s", "--gpu", str(profile), "--trace", str(tmp_path / "t.csv"), "--json", str(path)]
    assert CliRunner().invoke(app, ["simulate", "capacity", *asked]).exit_code == 0
    result = json.loads(path.read_text())
    (answer,) = result["answers"]
    assert (result["model"], answer["shape"]) == ("mine", f"{profile} TP=3 {told}")
    assert answer["best"]["kwh_per_million_output_tokens"] is None


@pytest.mark.parametrize(
    ("is_gpu", "given", "expected"),
    [
        (True, {}, (256, 2048)),
        (True, {"max_num_seqs": 3000}, (3000, 3000)),
        (False, {}, (64, 512)),
        (False, {"max_num_batched_tokens": 16}, (16, 16)),
    ],
)
def test_steps_are_as_large_as_serve_makes_them(
    is_gpu: bool, given: dict[str, int], expected: tuple[int, int], overloaded: Path, tmp_path: Path
) -> None:
    profile, path = tmp_path / "fitted.json", tmp_path / "r.json"
    profile.write_text(json.dumps(FITTED))
    data = yaml.safe_load(overloaded.read_text())
    data["groups"] = {
        "model": "llama-2-7b",
        "profile": "h200" if is_gpu else str(profile),
        "kv_cache_tokens": 4096,
    } | given
    overloaded.write_text(yaml.safe_dump(data))
    result = CliRunner().invoke(app, ["simulate", "run", str(overloaded), "--json", str(path)])
    groups = json.loads(path.read_text())["groups"]
    assert (groups["max_num_seqs"], groups["max_num_batched_tokens"]) == expected
    assert f"steps of at most {expected[0]} sequences and {expected[1]:,} tokens" in " ".join(result.stdout.split())
    device: dict[str, Any] = {"device": "cuda" if is_gpu else "cpu"}
    served = with_step_sizes(ModelEntry(name="m", source="x", **device, **given))
    assert (served.max_num_seqs, served.max_num_batched_tokens) == expected


def test_a_variant_that_cannot_be_simulated_is_named(overloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is simulated where its groups are wrong; else what was simulated before is shown."""
    good, wrong = "good: groups.num_groups=1", "wrong: groups.model=llama-2-70b"
    result = CliRunner().invoke(app, ["simulate", "compare", str(overloaded), good, wrong])
    assert str(result.exception).startswith("variant 'wrong': rank 0 of 1 needs")
    assert "good" not in result.stdout
    simulate = run.simulate

    def limited(scenario: SimulationScenario, **how: Any) -> Any:
        if scenario.groups.num_groups == 2:
            raise ConfigError("there are no requests")
        return simulate(scenario, **how)

    monkeypatch.setattr(run, "simulate", limited)
    later = "later: groups.num_groups=2"
    result = CliRunner().invoke(
        app, ["simulate", "compare", str(overloaded), good, later, good.replace("good", "last")]
    )
    assert str(result.exception) == "variant 'later': there are no requests"
    assert "good" in result.stdout and "last" not in result.stdout and "p99_ttft_ms" in result.stdout


def test_names_with_brackets_are_shown_as_they_are(overloaded: Path, tmp_path: Path) -> None:
    directory = tmp_path / "g[" / "x]"  # together a closing tag of rich's
    directory.mkdir(parents=True)
    profile = directory / "m[red].json"
    shipped = Path(run.__file__).parent / "profiles" / "h200.json"
    profile.write_text(shipped.read_text())
    command = [
        "simulate",
        "capacity",
        "--slo",
        "ttft_p99=100s",
        "--gpu",
        str(profile),
        "--tp",
        "1",
        "--max-groups",
        "1",
    ]
    result = CliRunner().invoke(app, [*command, "--scenario", str(overloaded)], env={"COLUMNS": "1000"})
    assert not isinstance(result.exception, Exception)
    assert result.stdout.count(str(profile)) >= 1
    data = yaml.safe_load(overloaded.read_text())
    data["groups"]["profile"] = str(profile)
    overloaded.write_text(yaml.safe_dump(data))
    result = CliRunner().invoke(app, ["simulate", "run", str(overloaded)], env={"COLUMNS": "1000"})
    assert f"profile {profile} (timed)" in result.stdout


def test_a_profile_is_not_written_over_the_steps_that_it_is_of(tmp_path: Path) -> None:
    steps = tmp_path / "steps.jsonl"
    steps.write_text("")
    result = CliRunner().invoke(app, ["simulate", "fit", "--from", str(steps), "--out", str(steps)])
    assert "and so is --from" in str(result.exception)


def test_variants_of_one_name_are_refused(overloaded: Path) -> None:
    variants = ["a: groups.num_groups=1", "a: groups.num_groups=2"]
    result = CliRunner().invoke(app, ["simulate", "compare", str(overloaded), *variants])
    assert "the name 'a' stands twice; each needs its own" in str(result.exception)
