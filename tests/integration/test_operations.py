"""What is served changes while it runs: models come, change and go, groups are replaced, and no request is lost by it."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from protos import admin_pb2
from protos import inference_pb2 as pb
from serving.admin.operator_key import read_operator_key
from serving.cli.main import app as program
from serving.client.client import Client
from serving.config import parse_config
from serving.driver.app import RunningApp
from tests.support.llama_tokenizers import sentencepiece_model
from tests.support.ranks import save_random_llama
from tests.support.stack import SMALL, group_handle, running_stack
from tests.support.waiting import PATIENCE_S

FIRST, SECOND = "first", "org/second"
NUM_TOKENS = 300


def entry(name: str, source: Path, **changes: object) -> dict[str, object]:
    return {"name": name, "source": str(source), "cpus_per_rank": 0.5, "kv_cache_tokens": 8192, **SMALL, **changes}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = tmp_path_factory.mktemp("tiny")
    save_random_llama(tiny, vocab_size=640)
    (tiny / "tokenizer.model").write_bytes(sentencepiece_model())
    return tiny


@pytest.fixture(scope="module")
def app(source: Path) -> Iterator[RunningApp]:
    data = {
        "models": [entry(FIRST, source, num_groups=2)],
        "gateway": {"port": 0, "http_port": 0, "drain_timeout_s": 5},
        "admin": {"metrics_port": 0, "port": 0},
    }
    with running_stack(parse_config(data, origin="test")) as app:
        yield app


def packtrain(app: RunningApp, *arguments: str) -> Result:
    """The command, on the Admin service of the stack."""
    return CliRunner().invoke(program, [*arguments, "--address", str(app.admin_address)])


def done(result: Result) -> str:
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return result.output


def ask(client: Client, model: str, seed: int) -> tuple[int, ...]:
    request = pb.GenerateRequest(
        model=model,
        prompt=pb.Prompt(text="Once upon a time"),
        sampling=pb.Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, seed=seed, temperature=1.0),
    )
    chunks, _ = client.stream(request, timeout_s=4 * PATIENCE_S)
    return tuple(token for chunk in chunks for token in chunk.token_ids)


class Load:
    """Clients that stream all the time; a request that fails ends the test."""

    def __init__(self, address: str, model: str, num_clients: int) -> None:
        self.answers: dict[int, set[tuple[int, ...]]] = {}
        self.num_answers = 0
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(num_clients)
        self._asking: list[Future[None]] = [
            self._pool.submit(self._ask, address, model, seed) for seed in range(num_clients)
        ]

    def end(self) -> None:
        """Raises what a request failed with."""
        self._is_over.set()
        for asking in self._asking:
            asking.result(timeout=4 * PATIENCE_S)
        self._pool.shutdown()

    def _ask(self, address: str, model: str, seed: int) -> None:
        with Client(address) as client:
            while not self._is_over.is_set():
                self.answers.setdefault(seed, set()).add(ask(client, model, seed))
                self.num_answers += 1


def names(app: RunningApp) -> tuple[list[str], list[str]]:
    """As gRPC and HTTP list them."""
    with Client(app.address) as client:
        over_grpc = [card.name for card in client.models()]
    with urllib.request.urlopen(f"{app.http_url}/v1/models", timeout=PATIENCE_S) as answer:
        listed = json.load(answer)["data"]
    return over_grpc, [model["id"] for model in listed]


def leaders(model: str) -> set[int]:
    found = group_handle(model).broadcast("pids").results(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    return {pids[0] for pids in found}


def groups(model: str) -> list[str]:
    """Their ids."""
    answers = group_handle(model).broadcast("probe").results(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    return [answer[0] for answer in answers]


def said(result: Result) -> str:
    """By a command that failed."""
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
            assert refused.exit_code != 0
            assert "max_model_len is 99999" in said(refused)
            assert ask(client, SECOND, 1) == alone[1]

            done(packtrain(app, "scale", FIRST, "--groups", "1"))
            assert len(leaders(FIRST)) == 1
            file.write_text(yaml.safe_dump({"models": [entry(SECOND, source, max_num_seqs=8)]}))
            assert "max_num_seqs: 64 → 8" in done(packtrain(app, "deploy", str(file)))
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
