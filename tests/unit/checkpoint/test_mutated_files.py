"""Thousands of broken checkpoints: each is refused naming its file, and nothing in any of them is run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parents[3]


def mutate(directory: Path, *, seed: int, count: int, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.mutations", str(seed), str(count), str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    print({key: value for key, value in report.items() if key not in ("wrong", "events")})
    return report


def test_a_few_hundred(tmp_path: Path) -> None:
    report = mutate(tmp_path, seed=1, count=100, timeout_s=4 * PATIENCE_S)
    assert (report["wrong"], report["events"]) == ([], [])
    assert report["refused"] > 87


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_ten_thousand(tmp_path: Path) -> None:
    report = mutate(tmp_path, seed=2, count=10_000, timeout_s=2900)
    assert (report["wrong"], report["events"]) == ([], [])
