"""The `packtrain simulate` commands as they are called."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from model_parallel.errors import ConfigError
from serving.cli.main import app


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


def test_variants_of_one_name_are_refused(overloaded: Path) -> None:
    variants = ["a: groups.num_groups=1", "a: groups.num_groups=2"]
    result = CliRunner().invoke(app, ["simulate", "compare", str(overloaded), *variants])
    assert "the name 'a' stands twice; each needs its own" in str(result.exception)
