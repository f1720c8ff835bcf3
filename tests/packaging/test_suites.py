"""`python -m tests.run`: every suite is known, an empty one fails, and what was skipped is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import run
from tests.run import ROOT, SUITES, Outcome, Suite, run_suite, summary

DIRECTORIES = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_directory_of_tests_is_a_suite() -> None:
    run_by_day = {Path(suite.arguments[0]).parts[1] for suite in SUITES}
    assert run_by_day == DIRECTORIES - {"gpu", "nightly"}
    for suite in SUITES:
        assert (ROOT / suite.arguments[0]).exists()


def outcome_of(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, file_by_file: bool = False, **files: str
) -> Outcome:
    """Of a suite of such files, beside ours."""
    for name, text in files.items():
        (directory / f"test_{name}.py").write_text(text)
    monkeypatch.setattr(run, "REPORTS", directory)
    suite = Suite(name="a suite", arguments=(str(directory),), file_by_file=file_by_file)
    return run_suite(suite, ["-p", "no:cacheprovider", f"--rootdir={directory}", "-c", str(ROOT / "pyproject.toml")])


SKIPS = """
import pytest
def test_works(): pass
@pytest.mark.parametrize("n", range(3))
def test_cannot(n): pytest.skip("no such machine")
"""


@pytest.mark.parametrize("file_by_file", [False, True])
def test_what_ran_and_what_was_skipped_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_by_file: bool
) -> None:
    outcome = outcome_of(tmp_path, monkeypatch, file_by_file=file_by_file, one=SKIPS, two="def test_two(): pass")
    assert (outcome.num_tests, outcome.num_passed, outcome.num_failed, outcome.has_failed) == (5, 2, 0, False)
    lines = list(summary({"a suite": outcome}))
    assert lines[1].split()[:6] == ["a", "suite", "5", "2", "3", "0"]
    assert lines[2] == "skipped in a suite: 3 × no such machine"


BROKEN_FIXTURE = """
import pytest
@pytest.fixture
def broken(): raise OSError("no room")
def test_never(broken): pass
"""


@pytest.mark.parametrize(
    ("text", "decision", "reason"),
    [
        ("x = 1", "FAILED: no test was collected", None),
        ("def test_wrong(): assert 0", "FAILED", "test_one::test_wrong: assert 0"),
        ("import nowhere_to_be_found", "FAILED", "test_one: collection failure"),
        (BROKEN_FIXTURE, "FAILED", 'test_one::test_never: failed on setup with "OSError: no room"'),
        ("import os\ndef test_dies(): os._exit(0)", "FAILED: no test was collected", None),
    ],
)
def test_what_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, decision: str, reason: str | None
) -> None:
    outcome = outcome_of(tmp_path, monkeypatch, one=text)
    assert outcome.has_failed
    lines = list(summary({"a suite": outcome}))
    assert lines[1].endswith(decision)
    assert [line.removeprefix("failed in a suite: ").lstrip(":") for line in lines[2:]] == ([reason] if reason else [])


def test_a_suite_that_does_not_exist_is_refused() -> None:
    command = [sys.executable, "-m", "tests.run", "unti"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "there is no suite unti; there are: unit, " in done.stderr
