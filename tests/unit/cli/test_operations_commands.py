"""`packtrain deploy|undeploy|scale|restart|drain` against the Admin service, with nothing behind it."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result
from typer.testing import CliRunner

from model_parallel.errors import ConfigError
from serving.admin.operator_key import make_operator_key
from serving.admin.service import AdminServer
from serving.cli.main import _account, app
from serving.cli.terminal import EXIT_CONFIG
from serving.config import AdminConfig
from serving.contracts.errors import ChangeError, ValidationError
from serving.contracts.operations import ModelStatus, Progress, Report
from tests.support.waiting import PATIENCE_S


class Operations:
    """Keeps what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def status(self) -> Sequence[ModelStatus]:
        return []

    def deploy(self, entry: str, max_unavailable: int, report: Report, *, only_check: bool) -> None:
        self._take(report, "deploy", json.loads(entry), max_unavailable, only_check)
        if json.loads(entry)["name"] == "unfit":
            raise ValidationError(
                "config", "models.unfit.max_model_len is 99999, but the model's own length is 4096 tokens"
            )

    def undeploy(self, model: str, report: Report) -> None:
        self._take(report, "undeploy", model)
        raise ChangeError(f"{model} is the only model that is served")

    def scale(
        self, model: str, report: Report, *, num_groups: int | None, min_groups: int | None, max_groups: int | None
    ) -> None:
        self._take(report, "scale", model, num_groups, min_groups, max_groups)

    def restart(self, model: str, max_unavailable: int, report: Report) -> None:
        self._take(report, "restart", model, max_unavailable)

    def drain(self, group: str, grace_s: float | None, report: Report) -> None:
        self._take(report, "drain", group, grace_s)

    def _take(self, report: Report, *asked: Any) -> None:
        self.asked.append(asked)
        report(Progress(stage="done", text=f"{asked[0]} is done"))


@pytest.fixture
def operations() -> Operations:
    return Operations()


@pytest.fixture
def address(operations: Operations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server of this user's, whose key lies where the commands look."""
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PACKTRAIN_API_KEY", raising=False)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = AdminServer(
        AdminConfig(port=0), None, refresh_s=1.0, operations=operations, operator_key=make_operator_key()
    )
    yield f"127.0.0.1:{asyncio.run_coroutine_threadsafe(server.start(), loop).result(PATIENCE_S)}"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(PATIENCE_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE_S)
    loop.close()


def run(address: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--address", address])


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["scale", "m", "--groups", "3"], ("scale", "m", 3, None, None)),
        (["scale", "m", "--min", "0", "--max", "4"], ("scale", "m", None, 0, 4)),
        (["restart", "m"], ("restart", "m", 1)),
        (["restart", "m", "--max-unavailable", "2"], ("restart", "m", 2)),
        (["drain", "--group", "g"], ("drain", "g", None)),
        (["drain", "--group", "g", "--grace", "1m"], ("drain", "g", 60.0)),
        (["drain", "--group", "g", "--grace", "0s"], ("drain", "g", 0.0)),
    ],
)
def test_a_command_asks_and_tells(
    address: str, operations: Operations, arguments: list[str], asked: tuple[Any, ...]
) -> None:
    result = run(address, *arguments)
    assert (result.exit_code, operations.asked) == (0, [asked])
    assert f"{asked[0]} is done" in result.output


def test_a_file_brings_its_models_and_says_what_it_does_not_change(
    address: str, operations: Operations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("serve.yaml").write_text(
        "models: [{name: a, source: here, block_size: 32}, {name: b, source: /elsewhere}]\ngateway: {port: 1}\n"
    )
    result = run(address, "deploy", "serve.yaml", "--dtype", "float32", "--check")
    assert result.exit_code == 0
    assert "gateway of serve.yaml: not changed while a server runs" in result.output
    one = {"name": "a", "source": str(tmp_path / "here"), "block_size": 32, "dtype": "float32"}
    other = {"name": "b", "source": "/elsewhere", "dtype": "float32"}
    assert operations.asked == [("deploy", one, 1, True), ("deploy", other, 1, True)]


def test_each_path_of_an_entry_is_one_of_this_directory(
    address: str, operations: Operations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may run elsewhere, and looked for the draft model there."""
    monkeypatch.chdir(tmp_path)
    for name in ("here", "small", "adapter"):
        Path(name).mkdir()
    lora = "{adapters: [{name: x, source: adapter}]}"
    Path("serve.yaml").write_text(
        f"models: [{{name: a, source: here, draft_model: small, lora: {lora}}}, "
        "{name: b, source: here, draft_model: smollm2-135m-instruct}]\n"
    )
    assert run(address, "deploy", "serve.yaml").exit_code == 0
    (first, second) = (asked[1] for asked in operations.asked)
    assert first["draft_model"] == str(tmp_path / "small")
    assert first["lora"]["adapters"][0]["source"] == str(tmp_path / "adapter")
    assert second["draft_model"] == "smollm2-135m-instruct"


def test_a_model_without_a_file(address: str, operations: Operations, tmp_path: Path) -> None:
    run(address, "deploy", "--model", "smollm2-135m-instruct", "--name", "small", "--tp", "2", "--groups", "3")
    run(address, "deploy", str(tmp_path), "--max-unavailable", "2")
    assert operations.asked == [
        (
            "deploy",
            {"name": "small", "source": "smollm2-135m-instruct", "tensor_parallel_size": 2, "num_groups": 3},
            1,
            False,
        ),
        ("deploy", {"name": tmp_path.name, "source": str(tmp_path)}, 2, False),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either a YAML file, or --model"),
        (["serve.yaml", "--model", "smollm2-135m-instruct"], "give either a YAML file, or --model"),
        (["--model", "nosuch/place/at/all"], "does not exist"),
        (["serve.yaml", "--name", "c"], "serve.yaml has 2 models"),
        (["wrong.yaml"], "did you mean 'source'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anybody_is_asked(
    address: str,
    operations: Operations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("serve.yaml").write_text("models: [{name: a, source: /a}, {name: b, source: /b}]\n")
    Path("wrong.yaml").write_text("models: [{name: a, source: /a, sorce: /b}]\n")
    result = run(address, "deploy", *arguments)
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
    assert operations.asked == []


def test_a_change_that_is_not_made_fails_the_command(address: str) -> None:
    result = run(address, "undeploy", "m")
    assert isinstance(result.exception, grpc.Call)
    assert (result.exception.code(), result.exception.details()) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "m is the only model that is served",
    )


def test_what_the_server_finds_wrong_is_a_wrong_configuration(address: str) -> None:
    """It ended with status 1, as if trying again could help."""
    result = run(address, "deploy", "--model", "smollm2-135m-instruct", "--name", "unfit")
    assert isinstance(result.exception, ConfigError)
    told = ("models.unfit.max_model_len is 99999, but the model's own length is 4096 tokens", EXIT_CONFIG)
    assert _account(result.exception) == told


def test_another_users_key_is_explained(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKTRAIN_API_KEY", "another's")
    result = run(address, "restart", "m")
    assert isinstance(result.exception, ConnectionError)
    assert "operator.key has the key" in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["scale", "a", "--groups", "99999999999"],
        ["scale", "a", "--min", "99999999999", "--max", "2"],
        ["scale", "a", "--max", "4097"],
        ["restart", "a", "--max-unavailable", "99999999999"],
        ["deploy", "/m", "--groups", "99999999999"],
        ["deploy", "/m", "--max-unavailable", "99999999999"],
    ],
)
def test_numbers_have_bounds(arguments: list[str]) -> None:
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "less than or equal to 4096" in refused.output
