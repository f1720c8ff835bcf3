"""The command line where it needs no server."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model_parallel.errors import ConfigError
from serving import __version__
from serving.cli.main import app, main
from serving.cli.serve import default_config, model_config, overridden, served_name
from serving.config import parse_config

COMMANDS = ["serve", "demo", "generate", "chat", "models", "fetch", "version", "doctor", "status"]


def test_help_lists_every_command() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 100


def test_the_version_comes_from_one_place() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"{__version__}\n"
    assert CliRunner().invoke(app, ["version"]).output == f"{__version__}\n"


def test_short_help() -> None:
    assert CliRunner().invoke(app, ["-h"]).exit_code == 0


def test_a_model_is_called_what_its_directory_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--lmsys--vicuna-7b-v1.5" / "snapshots" / "0123abcd"
    for path in (tmp_path / "vicuna-7b-v1.5", tmp_path / "my model (new)", snapshot):
        path.mkdir(parents=True)
    (tmp_path / "tiny-v1.0.Q4_1.gguf").touch()
    (tmp_path / "link").symlink_to(snapshot)
    assert served_name(str(tmp_path / "vicuna-7b-v1.5")) == "vicuna-7b-v1.5"
    assert served_name(f"{tmp_path}/vicuna-7b-v1.5/") == "vicuna-7b-v1.5"
    assert served_name(str(snapshot)) == "lmsys/vicuna-7b-v1.5"
    assert served_name(str(tmp_path / "link")) == "lmsys/vicuna-7b-v1.5"
    assert served_name(str(tmp_path / "my model (new)")) == "my-model-new-"
    assert served_name(str(tmp_path / "tiny-v1.0.Q4_1.gguf")) == "tiny-v1.0.Q4_1"
    monkeypatch.chdir(tmp_path / "vicuna-7b-v1.5")
    assert served_name(".") == "vicuna-7b-v1.5"
    assert served_name("smollm2-135m-instruct") == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("./no/such", ["--model: ./no/such does not exist"]),
        ("/no/such.gguf", ["/no/such.gguf does not exist"]),
        ("meta-llama/Llama-2-7b-hf", ["hf download meta-llama/Llama-2-7b-hf", "does not download from Hugging Face"]),
        ("smollm2-135m-instrct", ["did you mean 'smollm2-135m-instruct'?"]),
        ("nonsense", ["known models: smollm2-135m-instruct"]),
    ],
)
def test_a_model_that_is_not_there_is_told_as_such(source: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        served_name(source)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_no_flag_sets_stays_unset() -> None:
    config = overridden(default_config(), models={"dtype": None}, gateway={"port": 0}, admin={"metrics_port": None})
    assert "metrics_port" not in config.admin.model_fields_set, "so that it may move"
    assert config.gateway.port == 0 and config.models[0].dtype == "bfloat16"
    chosen = overridden(default_config(), admin={"metrics_port": 9464})
    assert "metrics_port" in chosen.admin.model_fields_set


def test_flags_and_yaml_have_the_same_defaults(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    by_flag = model_config(str(tmp_path / "m")).models[0]
    by_yaml = parse_config({"models": [{"name": "m", "source": str(tmp_path / "m")}]}, origin="test").models[0]
    assert by_flag == by_yaml


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("first\nsecond\nthird"),
        KeyError("x"),
        Exception(),
        OSError(28, "No space left on device", "/tmp/x"),
    ],
)
def test_an_unforeseen_error_ends_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr("serving.cli.main.app", broken)
    monkeypatch.setattr(sys, "argv", ["packtrain"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (70, 78)
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.startswith("error: ") and said.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr("serving.cli.main.app", broken)
    monkeypatch.setattr(sys, "argv", ["packtrain", "serve", "--debug"])
    with pytest.raises(SystemExit):
        main()
    assert "Traceback" in capsys.readouterr().err
    assert sys.argv == ["packtrain", "serve"]


def test_what_is_piped_is_not_cut(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 150)
    result = _run("serve", "--model", str(long))
    assert result.returncode == 78
    assert result.stderr == f"error: --model: {long} does not exist; give a model's directory or GGUF file\n"


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


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("meta-llama/Llama-2-7b-hf",), "hf download meta-llama/Llama-2-7b-hf"),
        (("smollm2-135m-instrct",), "did you mean 'smollm2-135m-instruct'?"),
        (("--model", "smollm2-135m-instrct"), "did you mean 'smollm2-135m-instruct'?"),
        (("/no/such",), "/no/such does not exist; give a YAML file, or a model's directory or GGUF file"),
        (("--config", "/no/such.yaml"), "/no/such.yaml: No such file or directory"),
        (("a.yaml", "--config", "b.yaml"), "give one of the two"),
    ],
)
def test_what_is_not_there_to_serve(
    arguments: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["packtrain", "serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 78
    said = capsys.readouterr().err
    assert part in said and said.count("\n") == 1


def test_no_server_is_said_plainly() -> None:
    result = _run("models", "--address", "127.0.0.1:9")
    assert result.returncode == 1
    assert "nothing listens at 127.0.0.1:9" in " ".join(result.stderr.split())
