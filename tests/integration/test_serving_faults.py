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
from serving.driver.app import RunningApp
from tests.support.stack import (
    group_handle,
    group_stats,
    running_stack,
    stack_config,
    story,
    stream_until_error,
    wait_until,
)


@pytest.fixture(scope="module")
def app() -> Iterator[RunningApp]:
    with running_stack(stack_config()) as app:
        yield app


def _pids() -> tuple[int, ...]:
    pids: tuple[int, ...] = group_handle().pids.remote().result(timeout_s=10)  # type: ignore[attr-defined]
    return pids


def _answers(client: Client) -> bool:
    try:
        return len(client.stub.Generate(story(4), timeout=10).choices[0].token_ids) == 4
    except grpc.RpcError:
        return False


def _live_placement_groups() -> int:
    return sum(entry["state"] != "REMOVED" for entry in placement_group_table().values())


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["leader", "rank0", "rank1"])
def test_kill_9_ends_streams_clearly_and_the_group_comes_back(app: RunningApp, victim: int) -> None:
    before = _pids()
    started = [threading.Event() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads, Client(app.address) as client:
        streams = [threads.submit(stream_until_error, app.address, event) for event in started]
        assert all(event.wait(30) for event in started)
        os.kill(before[victim], signal.SIGKILL)
        assert [stream.result(timeout=15) for stream in streams] == [grpc.StatusCode.UNAVAILABLE] * 4
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), 15, "leader and ranks are gone")
        wait_until(lambda: _answers(client), 60, "a new group serves")
    assert set(_pids()).isdisjoint(before)
    wait_until(lambda: _live_placement_groups() == 1, 15, "one placement group a group")


def test_a_reader_that_does_not_read_pauses_its_own_sequences_alone(app: RunningApp) -> None:
    wait_until(lambda: group_stats()["num_running"] == 0, 15, "nothing runs")
    before = group_stats()
    # Otherwise a window that grows with the speed of the loopback would hold the whole answer.
    options = [("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(app.address, options) as channel, Client(app.address) as other:
        unread = InferenceStub(channel).GenerateStream(story(900, n=8, logprobs=5), timeout=100)
        next(unread)
        wait_until(lambda: group_stats()["num_paused"] == 8, 60, "all its choices are paused")
        stats = group_stats()
        assert stats["kv_usage"] == 0 and stats["num_running"] == 0
        assert stats["num_generation_tokens"] - before["num_generation_tokens"] < 8 * 600
        assert _answers(other)
        unread.cancel()
        wait_until(lambda: group_stats()["num_paused"] == 0, 15, "it has ended")
