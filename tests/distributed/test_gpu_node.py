"""`python -m bench.gpu_node`, which checks a node with GPUs, on CPU ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench.gpu_node import Report, measure_links, sizes_up_to

COMMAND = (sys.executable, "-m", "bench.gpu_node")


def test_groups_have_as_many_ranks_as_powers_of_two() -> None:
    assert [sizes_up_to(n) for n in (0, 1, 2, 3, 8)] == [[], [1], [1, 2], [1, 2], [1, 2, 4, 8]]


def test_links_and_engines_are_timed(tmp_path: Path) -> None:
    result = tmp_path / "node.json"
    cpu = ("--device", "cpu", "--tiny", "--ranks", "2", "--dtype", "float32", "--sizes", "7b")
    ran = subprocess.run(
        [*COMMAND, *cpu, "--stages", "links", "scaling", "--json", result, "--directory", tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(result.read_text())
    assert found["failed"] == {}
    (link,) = found["links"]
    assert link["ranks"] == 2 and len(link["seconds"]) == 2 and min(link["seconds"]) > 0
    assert [run["tensor_parallel_size"] for run in found["scaling"]] == [1, 2]
    assert all(min(run["tokens_per_s"].values()) > 0 for run in found["scaling"])
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"], "the checkpoint is gone"


def test_a_stage_that_fails_is_told_and_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("the link is down")

    report = Report(Console())
    report.stage("links: 2 ranks", fails)
    report.stage("links: 4 ranks", lambda: {"ranks": 4})
    assert report.result["failed"] == {"links: 2 ranks": "the link is down"}
    assert report.result["links"] == [{"ranks": 4}]
    assert "links: 2 ranks failed: the link is down" in capsys.readouterr().out


def test_ranks_that_die_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="sums of 2 ranks: no answer"):
        measure_links("nowhere", 2, (1,))


def test_without_a_gpu_it_says_what_to_do() -> None:
    ran = subprocess.run(
        COMMAND, capture_output=True, text=True, timeout=300, check=False, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("no GPU is visible here; `packtrain doctor` says why")
