"""Processes of a served stack of two groups are killed and stopped at random while 16 streams run.

Each stream must bring what it brings alone, and every fault that was planned must have happened.
"""

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import psutil
import pytest
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from protos import inference_pb2 as pb
from serving.client.client import Client
from tests.support.history import Answer, History, Reference, check_faults, violations
from tests.support.stack import group_handle, running_stack, stack_config, story, wait_until
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.timeout(7200)

NUM_STREAMS = 16
NUM_TOKENS = 120
NUM_GROUPS = 2
NUM_FAULTS = 20
READY_S = 10 * PATIENCE_S
"""For a group to start anew on a busy machine."""


@dataclass(kw_only=True)
class Recorded:
    """A stream, and the longest time between two of its messages."""

    history: History = field(default_factory=History)
    longest_pause_s: float = 0.0


def request(number: int) -> pb.GenerateRequest:
    """Greedy and seeded in turn."""
    return story(NUM_TOKENS, seed=number, temperature=float(number % 2))


def read(address: str, number: int, started: threading.Event) -> Recorded:
    recorded = Recorded()
    with Client(address) as client:
        call: Any = client.stub.GenerateStream(request(number), timeout=READY_S)
        last_s = time.monotonic()
        try:
            for message in call:
                now_s = time.monotonic()
                if started.is_set():
                    recorded.longest_pause_s = max(recorded.longest_pause_s, now_s - last_s)
                last_s = now_s
                recorded.history.record(message)
                started.set()
        except grpc.RpcError:
            pass
        recorded.history.status = call.code()
    return recorded


def reference(address: str, number: int) -> Reference:
    """The stream alone, without any fault."""
    history = read(address, number, threading.Event()).history
    assert history.status is grpc.StatusCode.OK
    token_ids = tuple(token for chunk in history.chunks for token in chunk.token_ids)
    last = history.chunks[-1]
    assert last.usage is not None
    answer = Answer(token_ids=token_ids, finish_reason=last.finish_reason)
    return Reference(choices=(answer,), num_prompt_tokens=last.usage[0])


def groups() -> list[tuple[int, ...]]:
    """Process ids of each group's leader and ranks. A leader that was stopped answers nobody, until Serve has ended it."""
    handle: Any = group_handle()
    try:
        answers = handle.broadcast("pids").results(timeout_s=PATIENCE_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        return []
    return [answer for answer in answers if isinstance(answer, tuple)]


def _are_gone(pids: Sequence[int]) -> bool:
    return not any(map(psutil.pid_exists, pids))


def run_faults(
    address: str, faults: Sequence[signal.Signals], draw: random.Random, report: Callable[[str], None]
) -> tuple[list[str], list[float]]:
    """What was wrong, and the longest pause of each stream that a fault met or did not meet."""
    references = [reference(address, number) for number in range(NUM_STREAMS)]
    found, pauses_s = list[str](), list[float]()
    planned, observed = Counter[str](), Counter[str]()
    for turn, fault in enumerate(faults):
        wait_until(lambda: len(groups()) == NUM_GROUPS, READY_S, "all groups serve")
        with ThreadPoolExecutor(NUM_STREAMS) as threads:
            started = [threading.Event() for _ in range(NUM_STREAMS)]
            reading = [threads.submit(read, address, number, event) for number, event in enumerate(started)]
            assert all(event.wait(READY_S) for event in started)
            time.sleep(draw.uniform(0.0, 1.0))
            group = draw.choice(groups())
            victim = draw.choice(group)
            os.kill(victim, fault)
            planned[fault.name] += 1
            recorded = [stream.result(timeout=READY_S) for stream in reading]
        wait_until(partial(_are_gone, group), READY_S, "the whole group is gone")
        observed[fault.name] += 1
        wrong = violations([each.history for each in recorded], references)
        found += [f"fault {turn}: {what}" for what in wrong]
        pauses_s += [each.longest_pause_s for each in recorded]
        longest_s = max(each.longest_pause_s for each in recorded)
        whom = f"process {group.index(victim)} of leader and ranks"
        report(f"{turn}: {fault.name} of {whom}: {len(wrong)} wrong; longest pause {longest_s:.2f} s")
    return found + check_faults(planned, observed), pauses_s


@pytest.mark.nightly
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_no_token_is_lost_or_repeated(fault: signal.Signals) -> None:
    def report(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, flush=True)

    with running_stack(stack_config(num_groups=NUM_GROUPS)) as app:
        found, pauses_s = run_faults(app.address, [fault] * NUM_FAULTS, random.Random(1), report)
    print(f"pauses: median {statistics.median(pauses_s):.2f} s, longest {max(pauses_s):.2f} s")
    assert found == []
