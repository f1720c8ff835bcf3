"""What clients see when a part of a running stack is killed, and that it comes back."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from ray.util import placement_group_table

from protos.inference_pb2_grpc import InferenceStub
from serving.client.client import Client
from serving.config import parse_config
from serving.driver.app import RunningApp
from tests.support.effort import rest_by_night
from tests.support.operations import entry
from tests.support.small_llama import save_small_llama
from tests.support.stack import MODEL, group_handle, group_stats, running_stack, story, wait_until
from tests.support.waiting import PATIENCE_S

NUM_TOKENS = 800
"""Of a stream: enough that the kill comes in the middle."""

VICTIMS = ("leader", "rank 0", "rank 1")
FAULTS = [(victim, fault) for victim in VICTIMS for fault in ("SIGKILL", "SIGSTOP")]
DAY_FAULTS = [("leader", "SIGKILL"), ("leader", "SIGSTOP"), ("rank 1", "SIGSTOP")]
"""A killed rank is among what other tests do."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """On a small model, which starts anew soon."""
    model = entry(MODEL, save_small_llama(tmp_path_factory.mktemp("models") / "tiny"), tensor_parallel_size=2)
    data = {
        "models": [model],
        "gateway": {"port": 0, "http_port": 0, "drain_timeout_s": 10},
        "admin": {"metrics_port": 0, "port": 0},
    }
    with running_stack(parse_config(data, origin="test")) as app:
        yield app


def _pids() -> tuple[int, ...]:
    pids: tuple[int, ...] = group_handle().pids.remote().result(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    return pids


def _answers(client: Client) -> bool:
    try:
        return len(client.stub.Generate(story(4), timeout=PATIENCE_S).choices[0].token_ids) == 4
    except grpc.RpcError:
        return False


def _live_placement_groups() -> int:
    return sum(entry["state"] != "REMOVED" for entry in placement_group_table().values())


def _streamed(address: str, seed: int, started: threading.Event) -> tuple[list[int], int]:
    """Token ids of a whole answer, and how many the server says that they are."""
    token_ids: list[int] = []
    num_tokens = 0
    with Client(address) as client:
        for chunk in client.stub.GenerateStream(story(NUM_TOKENS, seed=seed, temperature=1.0), timeout=10 * PATIENCE_S):
            token_ids += chunk.token_ids
            num_tokens = chunk.usage.completion_tokens
            started.set()
    return token_ids, num_tokens


@pytest.mark.timeout(1200)  # a group starts anew in the middle, which takes minutes on a busy machine
@pytest.mark.parametrize(("victim", "fault"), rest_by_night(FAULTS, by_day=DAY_FAULTS, has_names=True))
def test_a_fault_of_the_only_group_loses_no_token(app: RunningApp, victim: str, fault: str) -> None:
    """Its streams wait for the next incarnation of the group, and have the tokens that they have without the loss."""
    before = _pids()
    with ThreadPoolExecutor(4) as threads, Client(app.address) as client:
        undisturbed = [threads.submit(_streamed, app.address, seed, threading.Event()) for seed in range(4)]
        expected = [stream.result(timeout=10 * PATIENCE_S) for stream in undisturbed]
        started = [threading.Event() for _ in range(4)]
        streams = [threads.submit(_streamed, app.address, seed, event) for seed, event in enumerate(started)]
        assert all(event.wait(PATIENCE_S) for event in started)
        os.kill(before[VICTIMS.index(victim)], signal.Signals[fault])
        assert not any(stream.done() for stream in streams), "the fault came in the middle"
        assert [stream.result(timeout=10 * PATIENCE_S) for stream in streams] == expected
        assert all(num_tokens == len(token_ids) == NUM_TOKENS for token_ids, num_tokens in expected)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), PATIENCE_S, "leader and ranks are gone")
        wait_until(lambda: _answers(client), PATIENCE_S, "a new group serves")
    assert set(_pids()).isdisjoint(before)
    wait_until(lambda: _live_placement_groups() == 1, PATIENCE_S, "one placement group a group")


@pytest.mark.timeout(600)
def test_a_reader_that_does_not_read_pauses_its_own_sequences_alone(app: RunningApp) -> None:
    wait_until(lambda: group_stats()["num_running"] == 0, PATIENCE_S, "nothing runs")
    before = group_stats()
    # Otherwise a window that grows with the speed of the loopback would hold the whole answer.
    options = [("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(app.address, options) as channel, Client(app.address) as other:
        unread = InferenceStub(channel).GenerateStream(story(900, n=8, logprobs=5), timeout=10 * PATIENCE_S)
        next(unread)
        paused = {"num_paused": 8, "num_running": 0, "kv_usage": 0}
        wait_until(lambda: paused.items() <= group_stats().items(), 4 * PATIENCE_S, "all its choices are paused")
        assert group_stats()["num_generation_tokens"] - before["num_generation_tokens"] < 8 * 600
        assert _answers(other)
        unread.cancel()
        wait_until(lambda: group_stats()["num_paused"] == 0, PATIENCE_S, "it has ended")
