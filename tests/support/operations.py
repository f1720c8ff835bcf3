"""For tests that change what is served: what a model's entry is, and clients that notice everything."""

import json
import threading
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError

from protos import inference_pb2 as pb
from serving.client.client import Client
from serving.driver.app import RunningApp
from tests.support.stack import SMALL, group_handle, wait_until
from tests.support.waiting import PATIENCE_S

NUM_TOKENS = 300


def entry(name: str, source: Path, **changes: object) -> dict[str, object]:
    return {"name": name, "source": str(source), "cpus_per_rank": 0.5, "kv_cache_tokens": 8192, **SMALL, **changes}


def ask(client: Client, model: str, seed: int) -> tuple[int, ...]:
    """Tokens of one answer, which are the same each time."""
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


def groups(model: str) -> list[str]:
    """Ids of those that run; some must, but this process may not have been told of them yet."""
    found: list[str] = []

    def ask_all() -> bool:
        with suppress(DeploymentUnavailableError, RayError):  # or one ends at this moment
            answers = group_handle(model).broadcast("probe").results(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
            found.extend(answer[0] for answer in answers)
        return bool(found)

    wait_until(ask_all, PATIENCE_S, f"{model} has a group")
    return found
