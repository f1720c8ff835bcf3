"""Adapters on the served stack: from configuration and command line to names, answers and groups that are replaced."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import Result
from typer.testing import CliRunner

from bench.support.random_adapter import save_random_adapter
from model_parallel.checkpoint.detect import describe
from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from serving.cli.main import app as program
from serving.client.client import Client
from serving.config import parse_config
from serving.driver.app import RunningApp
from tests.support.small_llama import save_small_llama
from tests.support.stack import SMALL, group_handle, running_stack
from tests.support.waiting import PATIENCE_S

BASE, OWN, ADDED = "tiny", "tiny-own", "org/tiny-added"
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and two adapters."""
    path = tmp_path_factory.mktemp("models")
    save_small_llama(path / BASE)
    for seed, name in enumerate(("own", "added")):
        save_random_adapter(path / name, describe(path / BASE).config, rank=4, seed=seed, size=0.5)
    return path


@pytest.fixture(scope="module")
def app(places: Path) -> Iterator[RunningApp]:
    entry = {
        "name": BASE,
        "source": str(places / BASE),
        "tensor_parallel_size": 2,
        "cpus_per_rank": 0.5,
        "kv_cache_tokens": 8192,
        "lora": {"max_loaded": 1, "adapters": [{"name": OWN, "source": str(places / "own")}]},
        **SMALL,
    }
    data = {
        "models": [entry],
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


def ask(app: RunningApp, model: str) -> tuple[int, ...]:
    request = pb.GenerateRequest(
        model=model,
        prompt=pb.Prompt(text="Once upon a time"),
        sampling=pb.Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, seed=3, temperature=1.0),
    )
    with Client(app.address) as client:
        chunks, _ = client.stream(request, timeout_s=6 * PATIENCE_S)
        return tuple(token for chunk in chunks for token in chunk.token_ids)


def parents(app: RunningApp) -> dict[str, str | None]:
    with urllib.request.urlopen(f"{app.http_url}/v1/models", timeout=PATIENCE_S) as response:
        return {each["id"]: each["parent"] for each in json.load(response)["data"]}


def test_adapters_come_move_and_go(app: RunningApp, places: Path) -> None:
    assert parents(app) == {BASE: None, OWN: BASE}
    broken = places / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((places / "added" / "adapter_config.json").read_bytes())
    refused = packtrain(app, "adapters", "add", ADDED, str(broken), "--model", BASE)
    assert isinstance(refused.exception, ConfigError) and "adapter_model.safetensors" in str(refused.exception)
    assert parents(app) == {BASE: None, OWN: BASE}

    done(packtrain(app, "adapters", "add", ADDED, str(places / "added"), "--model", BASE))
    assert parents(app) == {BASE: None, OWN: BASE, ADDED: BASE}
    alone = {name: ask(app, name) for name in (BASE, OWN, ADDED)}
    assert len(set(alone.values())) == 3
    assert {len(answer) for answer in alone.values()} == {NUM_TOKENS}
    loaded = group_handle(BASE).loaded_adapters.remote().result(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    assert len(loaded) == 1, "the one that was asked for last: there is room for no more"

    # All groups are replaced while it is streamed: it goes on in one that has never heard of the adapter.
    with ThreadPoolExecutor(4) as clients:
        streams = {name: clients.submit(ask, app, name) for name in (ADDED, BASE, ADDED, OWN)}
        done(packtrain(app, "restart", BASE))
        for name, stream in streams.items():
            assert stream.result(timeout=6 * PATIENCE_S) == alone[name], name
    assert parents(app) == {BASE: None, OWN: BASE, ADDED: BASE}
    assert ask(app, ADDED) == alone[ADDED]

    done(packtrain(app, "adapters", "remove", ADDED))
    assert parents(app) == {BASE: None, OWN: BASE}
    with pytest.raises(grpc.RpcError, match=r"is not served; served: tiny, tiny-own"):
        ask(app, ADDED)
    group_handle(BASE).check_integrity.remote().result(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
