"""What is served changes while it runs: models come, change and go, groups are replaced, and no request is lost by it."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from model_parallel.errors import ConfigError
from protos import admin_pb2
from serving.admin.operator_key import read_operator_key
from serving.cli.main import app as program
from serving.client.client import Client
from serving.config import parse_config
from serving.driver.app import RunningApp
from tests.support.operations import Load, ask, entry, groups, names
from tests.support.small_llama import save_small_llama
from tests.support.stack import group_handle, running_stack
from tests.support.waiting import PATIENCE_S

FIRST, SECOND = "first", "org/second"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def app(source: Path) -> Iterator[RunningApp]:
    data = {
        "models": [entry(FIRST, source, num_groups=2)],
        "gateway": {"port": 0, "http_port": 0, "drain_timeout_s": 5},
        "admin": {"metrics_port": 0, "port": 0},
        "ray": {"spare_processes": False},
    }
    with running_stack(parse_config(data, origin="test")) as app:
        yield app


def packtrain(app: RunningApp, *arguments: str) -> Result:
    """The command, on the Admin service of the stack."""
    return CliRunner().invoke(program, [*arguments, "--address", str(app.admin_address)])


def done(result: Result) -> str:
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return result.output


def leaders(model: str) -> set[int]:
    found = group_handle(model).broadcast("pids").results(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    return {pids[0] for pids in found}


def said(result: Result) -> str:
    """By a command that failed."""
    if isinstance(result.exception, ConfigError):
        return str(result.exception)
    assert isinstance(result.exception, grpc.Call)
    return str(result.exception.details())


def deployed(app: RunningApp) -> dict[str, admin_pb2.DeployedModel]:
    with Client(str(app.admin_address), api_key=read_operator_key()) as client:
        answer = client.admin.ListDeployedModels(admin_pb2.ListDeployedModelsRequest(), timeout=PATIENCE_S)
    return {model.name: model for model in answer.models}


def test_models_come_change_and_go_while_others_answer(app: RunningApp, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "second.yaml"
    file.write_text(yaml.safe_dump({"models": [entry(SECOND, source)]}))
    with Client(app.address) as client:
        alone = {seed: ask(client, FIRST, seed) for seed in range(4)}
        load = Load(app.address, FIRST, 4)
        try:
            done(packtrain(app, "deploy", str(file)))
            assert names(app) == ([FIRST, SECOND],) * 2
            assert ask(client, SECOND, 0) == alone[0]

            before = leaders(FIRST)
            assert "2 of 2 groups replaced" in done(packtrain(app, "restart", FIRST))
            assert not leaders(FIRST) & before
            assert len(leaders(FIRST)) == 2

            bad = {**entry(SECOND, source), "max_model_len": 99999}
            file.write_text(yaml.safe_dump({"models": [bad]}))
            refused = packtrain(app, "deploy", str(file))
            assert isinstance(refused.exception, ConfigError)
            assert "max_model_len is 99999" in said(refused)
            assert ask(client, SECOND, 1) == alone[1]

            done(packtrain(app, "scale", FIRST, "--groups", "1"))
            assert len(leaders(FIRST)) == 1
            file.write_text(yaml.safe_dump({"models": [entry(SECOND, source, max_num_seqs=8)]}))
            assert "max_num_seqs: unset → 8" in done(packtrain(app, "deploy", str(file)))
            assert deployed(app)[SECOND].state == "serving"
            assert ask(client, SECOND, 2) == alone[2]

            done(packtrain(app, "undeploy", SECOND))
            assert names(app) == ([FIRST],) * 2
            with pytest.raises(grpc.RpcError) as unknown:
                ask(client, SECOND, 0)
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
            last = packtrain(app, "undeploy", FIRST)
            assert "only model" in said(last)
        finally:
            load.end()
    assert load.num_answers > 8
    assert load.answers == {seed: {tokens} for seed, tokens in alone.items()}
    shown = CliRunner().invoke(program, ["status", "--address", str(app.metrics_port)])
    assert FIRST in done(shown)


def test_a_drained_group_is_replaced(app: RunningApp) -> None:
    with Client(app.address) as client:
        alone = {seed: ask(client, FIRST, seed) for seed in range(2)}
    load = Load(app.address, FIRST, 2)
    try:
        (group,) = groups(FIRST)
        done(packtrain(app, "drain", "--group", group, "--grace", "0s"))
        assert len(groups(FIRST)) == 1
        assert group not in groups(FIRST)
        assert "no group" in said(packtrain(app, "drain", "--group", group))
    finally:
        load.end()
    assert load.answers == {seed: {tokens} for seed, tokens in alone.items()}


def test_nobody_without_the_operators_key_changes_anything(app: RunningApp) -> None:
    with Client(str(app.admin_address), api_key="wrong") as client, pytest.raises(grpc.RpcError) as caught:
        list(client.admin.RestartModel(admin_pb2.RestartModelRequest(name=FIRST), timeout=PATIENCE_S))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
