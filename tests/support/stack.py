"""The whole stack on a private Ray cluster, and what it leaves behind."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import grpc
import psutil
from ray import serve
from ray.serve.handle import DeploymentHandle

from model_parallel.errors import EngineError
from protos import inference_pb2 as pb
from serving.client.client import Client
from serving.config import ServingConfig, parse_config
from serving.contracts.served import app_name, deployment_name
from serving.driver.app import RunningApp, start
from tests.support.waiting import PATIENCE_S

SMALL = {"device": "cpu", "dtype": "float32", "threads_per_rank": 1}
"""The same on every machine."""
MODEL = "smollm2-135m-instruct"


def stack_config(**model: object) -> ServingConfig:
    """SmolLM2 at TP=2 on a free port; `model` overrides its entry."""
    entry = {"name": MODEL, "source": MODEL, "tensor_parallel_size": 2, "kv_cache_tokens": 8192, **SMALL, **model}
    data = {
        "models": [entry],
        "gateway": {"port": 0, "http_port": 0, "drain_timeout_s": 10},
        "admin": {"metrics_port": 0, "port": 0},
        "ray": {"spare_processes": False},  # they would import while tests wait for something else
    }
    return parse_config(data, origin="the test's configuration")


@contextmanager
def running_stack(config: ServingConfig) -> Iterator[RunningApp]:
    """Serve within the block; afterwards no process that it started may be left."""
    app = start(config, lambda stage: None)
    try:
        yield app
    finally:
        app.stop()
    wait_until(lambda: not ray_processes(), 20, "Ray's processes are gone")


def group_handle(model: str = MODEL) -> "DeploymentHandle[object]":
    return serve.get_deployment_handle(deployment_name(model), app_name(model))


def group_stats(model: str = MODEL) -> dict[str, float]:
    stats: dict[str, float] = group_handle(model).stats.remote().result(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    return stats


def story(max_tokens: int, **sampling: object) -> pb.GenerateRequest:
    """A request that gives exactly `max_tokens` tokens."""
    return pb.GenerateRequest(
        model=MODEL,
        prompt=pb.Prompt(text="Once upon a time, in a land far away,"),
        sampling=pb.Sampling(max_tokens=max_tokens, ignore_eos=True, **sampling),  # type: ignore[arg-type]
    )


def stream_until_error(address: str, first_token: threading.Event) -> grpc.StatusCode:
    """Read a stream that is too long to finish; the status that it ends with."""
    with Client(address) as client:
        chunks = client.stub.GenerateStream(story(2000), timeout=100)  # `client.stream` would go on elsewhere
        try:
            for _ in chunks:
                first_token.set()
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call):
                return error.code()
            raise
    return grpc.StatusCode.OK


def ray_processes() -> list[psutil.Process]:
    """Raylets, workers and the like of this terminal session, which they keep. Another stack on this machine is none of ours."""
    session = os.getsid(0)
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        is_ray = "raylet" in line or "gcs_server" in line or line.startswith("ray::")
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if is_ray and process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not _holds(condition):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (psutil.NoSuchProcess, EngineError):
        return False
