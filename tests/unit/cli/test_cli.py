"""The command line where it needs no server."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from serving.cli.main import app, default_config

COMMANDS = ["serve", "demo", "generate", "chat", "models", "fetch", "version"]


def test_help_lists_every_command() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 100


def test_the_default_is_tensor_parallel() -> None:
    assert default_config().models[0].tensor_parallel_size == 2


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving.cli.main", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_wrong_configuration_ends_with_status_78_and_one_line(tmp_path: "pytest.TempPathFactory") -> None:
    file = tmp_path / "packtrain.yaml"  # type: ignore[operator]
    file.write_text("models: [{name: a, source: b}]\nlimit: {}\n")
    result = _run("serve", str(file))
    assert result.returncode == 78
    assert "unknown key 'limit'; did you mean 'limits'?" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_an_unknown_model_source_is_refused_before_anything_starts() -> None:
    result = _run("serve", "--model", "smollm2-135m-instrct")
    assert result.returncode == 78
    assert "smollm2-135m-instruct" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_server_is_said_plainly() -> None:
    result = _run("models", "--address", "127.0.0.1:9")
    assert result.returncode == 1
    assert "nothing answers at 127.0.0.1:9" in " ".join(result.stderr.split())
