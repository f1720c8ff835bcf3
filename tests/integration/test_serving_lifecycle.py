"""`packtrain serve` as a process: how it drains, dies, and refuses to start; each leaves nothing behind."""

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.exceptions import RayError

from model_parallel.errors import ConfigError
from model_parallel.python_process import module_command
from serving.client.client import Client
from serving.config import parse_config
from serving.contracts.start_failure import StartError
from serving.driver.app import start
from serving.driver.checks import StartRefusedError
from tests.support.processes import started_with_hang_up
from tests.support.small_llama import save_small_llama
from tests.support.stack import MODEL, ray_processes, story, stream_until_error, wait_until
from tests.support.waiting import PATIENCE_S

EVERYWHERE = ("torch", "numpy", "msgspec", "psutil", "tokenizers", "sentencepiece", "safetensors", "yaml", "grpc")
"""Modules that the processes of a served model import, some of them all."""


class Served:
    """`packtrain serve` in a process of its own."""

    def __init__(self, config: Path, directory: Path) -> None:
        """It is started in `directory`."""
        with started_with_hang_up():
            self.process = subprocess.Popen(
                module_command("serving.cli.main", "serve", str(config)),
                cwd=directory,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        self.output = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line
            if found := re.search(r"at (127\.0\.0\.1:\d+)", line):
                self.address = found[1]
                return
        self.process.communicate(timeout=PATIENCE_S)  # or the tests that follow are told of it
        raise AssertionError(f"packtrain serve ended:\n{self.output}")

    @property
    def port_is_open(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(self.address.rsplit(":", 1)[1]))) == 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    config = tmp_path / "packtrain.yaml"
    config.write_text(
        f"models: [{{name: {MODEL}, source: {MODEL}, tensor_parallel_size: 2}}]\n"
        "gateway: {port: 0, drain_timeout_s: 30}\n"
    )
    directory = tmp_path / "a checkpoint with code"
    directory.mkdir()
    for name in EVERYWHERE:
        (directory / f"{name}.py").write_text(f"open({str(directory / 'was run')!r}, 'a').write({name!r} + ' ')\n")
    served = Served(config, directory)
    yield served
    served.process.kill()
    served.process.communicate(timeout=PATIENCE_S)
    wait_until(lambda: not ray_processes(), PATIENCE_S, "Ray's processes are gone")
    assert not (directory / "was run").exists(), "a process has imported a module of its current directory"


def test_kill_9_of_the_driver_leaves_nothing(served: Served) -> None:
    first_token = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(stream_until_error, served.address, first_token)
        assert first_token.wait(30)
        served.process.kill()
        assert stream.result(timeout=30) is grpc.StatusCode.UNAVAILABLE
    wait_until(
        lambda: not ray_processes() and not served.port_is_open, PATIENCE_S, "Ray's processes and the port are gone"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_drain(served: Served, number: signal.Signals) -> None:
    """A terminal that is closed sends SIGHUP to all that was started from it, and its shell sends another."""
    with Client(served.address) as client, grpc.insecure_channel(served.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        chunks, _ = client.stream(
            story(120),
            timeout_s=100,
        )
        num_tokens = len(next(chunks).token_ids)
        if number is signal.SIGHUP:
            os.killpg(served.process.pid, number)
        served.process.send_signal(number)

        def is_draining() -> bool:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            return bool(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING)

        wait_until(is_draining, PATIENCE_S, "health is NOT_SERVING")
        with pytest.raises(grpc.RpcError) as refused:
            client.stub.Generate(story(4), timeout=PATIENCE_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert num_tokens + sum(len(chunk.token_ids) for chunk in chunks) == 120, "the running stream finishes"
    assert served.process.wait(40) == 0
    assert not served.port_is_open


def test_a_call_after_the_end_starts_no_cluster() -> None:
    with pytest.raises(RayError):
        ray.cluster_resources()
    assert not ray.is_initialized()


def _start_error(data: dict[str, object]) -> Exception:
    with pytest.raises((ConfigError, StartError)) as caught:
        start(parse_config(data, origin="test"), lambda stage: None)
    wait_until(lambda: not ray_processes(), PATIENCE_S, "Ray's processes are gone")
    return caught.value


def test_a_group_that_cannot_be_placed_is_refused_with_both_numbers() -> None:
    entry = {"name": MODEL, "source": MODEL, "tensor_parallel_size": 3}
    error = _start_error({"models": [entry], "gateway": {"port": 0, "http_port": 0}, "ray": {"num_cpus": 2}})
    assert "3" in str(error) and "2" in str(error) and "CPU" in str(error)


def test_a_checkpoint_that_does_not_load_is_reported_before_anything_starts(tmp_path: Path) -> None:
    model = save_small_llama(tmp_path / "broken")
    weights = model / "model-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    data = {"models": [{"name": "broken", "source": str(model)}], "gateway": {"port": 0, "http_port": 0}}
    stages: list[str] = []
    with pytest.raises(StartRefusedError, match=r"model-00002\.safetensors"):
        start(parse_config(data, origin="test"), stages.append)
    assert not any("Ray" in stage for stage in stages)


def test_a_port_that_is_taken_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        entry = {"name": MODEL, "source": MODEL, "tensor_parallel_size": 1}
        error = _start_error({"models": [entry], "gateway": {"port": port}})
    assert str(port) in str(error)
