"""`packtrain k8s` as a person types it."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from model_parallel.errors import ConfigError
from serving.cli.main import app
from serving.driver.drain import replicas_here

ROOT = Path(__file__).parents[3]
SERVE = """
models:
  - {name: chat, source: /models/Llama-2-70b-chat-hf, device: cuda, dtype: bfloat16, tensor_parallel_size: 8}
tenancy: {}
"""


def k8s(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["k8s", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_what_is_rendered_passes_the_check(tmp_path: Path) -> None:
    serve, values = tmp_path / "serve.yaml", tmp_path / "values.yaml"
    serve.write_text(SERVE)
    status, output = k8s(
        "render", serve, "--gpu", "a100-80g", "--gpus-per-node", "8", "--claim", "llama", "--accept-license"
    )
    assert status == 0
    assert "# chat: 1 groups of 8 ranks; a rank holds 16.06 GiB of weights" in output
    assert yaml.safe_load(output)["worker"]["resources"]["limits"]["nvidia.com/gpu"] == 8
    values.write_text(output)
    status, output = k8s("check", values, "--gpu", "a100-80g")
    assert (status, output.splitlines()[-1]) == (0, "these values can work")


def test_what_does_not_fit_ends_with_one(tmp_path: Path) -> None:
    serve = tmp_path / "serve.yaml"
    serve.write_text(SERVE.replace("tensor_parallel_size: 8", "tensor_parallel_size: 1"))
    status, output = k8s("render", serve, "--gpu", "a100-40g", "--gpus-per-node", "8")
    assert status == 1
    assert "does not work: chat does not fit a100-40g" in " ".join(output.split())


def test_later_values_replace_earlier_ones(tmp_path: Path) -> None:
    less = tmp_path / "less.yaml"
    less.write_text("terminationGracePeriodSeconds: 60\n")
    status, output = k8s("check", ROOT / "helm/packtrain/ci/llama-2-70b-tp8-values.yaml", less)
    assert status == 1
    assert "draining needs 345" in " ".join(output.split())


@pytest.mark.parametrize("text", ["[1]", "a: [", "- b"])
def test_values_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"values\.yaml"):
        k8s("check", path)


def test_same_as_has_a_form(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="NAME=KNOWN"):
        k8s("check", path, "--same-as", "chat")


def test_a_drain_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        k8s("drain")


def test_weights_are_waited_for_and_their_progress_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / ".packtrain-complete-old").touch()  # of another source
    sleeps = []

    def sleep(seconds: float) -> None:
        """A second goes by; at the third the copy is complete."""
        sleeps.append(seconds)
        if len(sleeps) == 3:
            (tmp_path / ".packtrain-complete-new").touch()

    monkeypatch.setattr("serving.cli.k8s.time.monotonic", lambda: float(len(sleeps)))
    monkeypatch.setattr("serving.cli.k8s.time.sleep", sleep)
    status, output = k8s("wait-for-weights", tmp_path, ".packtrain-complete-new", "--every-s", "1")
    assert status == 0
    lines = output.splitlines()
    assert [line.endswith("MB/s") for line in lines] == [True, True, False]
    assert lines[-1].endswith("GiB of weights are complete")


def test_weights_that_never_come(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.packtrain-complete-1 after 1 s"):
        k8s("wait-for-weights", tmp_path, ".packtrain-complete-1", "--timeout-s", "1")


def test_replicas_are_told_from_other_processes(tmp_path: Path) -> None:
    for pid, title in (
        ("10", b"ray::ServeReplica:packtrain:Gateway"),
        ("11", b"ray::IDLE"),
        ("self", b"ray::ServeReplica"),
        ("12", b""),
    ):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(title)
    assert replicas_here(tmp_path) == [10]
