"""The autoscaler on a real Ray: whole groups come with the load and go after it, and nobody notices."""

import os
import signal
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import msgspec
import pytest
import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from typer.testing import CliRunner

from serving.autoscaling.actor import NAME, NAMESPACE
from serving.cli.fleet import sentence
from serving.cli.main import app as program
from serving.client.client import Client
from serving.config import ServingConfig
from serving.contracts.fleet import Fleet
from serving.driver.app import RunningApp
from tests.support.stack import MODEL, group_handle, running_stack, stack_config, story, wait_until
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]

NUM_RANKS = 2
NUM_TOKENS = 24
LONG = 1500
ENDLESS = 7000
"""Longer than the test takes."""
SCALE_TIMEOUT_S = 6 * PATIENCE_S
"""A group is started while the others and their load have the processor."""


def scaled_config(mode: str, **changes: object) -> ServingConfig:
    """A group runs two sequences at a time, so a few clients ask for more than one group can do."""
    scaling = {"mode": mode, "max_groups": 2, "tpot_p99_s": 0.5, "shrink_after_s": 10.0, "cooldown_s": 5.0, **changes}
    config = stack_config(max_num_seqs=2, cpus_per_rank=0.5, autoscaling=scaling)
    return config.model_copy(update={"autoscaler": config.autoscaler.model_copy(update={"period_s": 1.0})})


class Load:
    """Clients that ask all the time, each for one answer after the other."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pool = ThreadPoolExecutor(16)
        self._asking: list[Future[None]] = []
        self._is_over = threading.Event()
        self.num_answers = 0

    def begin(self, num_clients: int) -> None:
        self._asking += [self._pool.submit(self._ask, self._is_over) for _ in range(num_clients)]

    def end(self) -> None:
        """Raises what a request failed with."""
        self._is_over.set()
        for asking in self._asking:
            asking.result(timeout=2 * PATIENCE_S)
        self._asking, self._is_over = [], threading.Event()

    def _ask(self, is_over: threading.Event) -> None:
        with Client(self._address) as client:
            while not is_over.is_set():
                response = client.stub.Generate(story(NUM_TOKENS), timeout=2 * PATIENCE_S)
                assert response.usage.completion_tokens == NUM_TOKENS
                self.num_answers += 1


def long_stream(address: str) -> str:
    """Longer than a group that is to stop waits for it. The same text from whichever groups made it."""
    with Client(address) as client:
        chunks, _ = client.stream(story(LONG, seed=1), timeout_s=8 * PATIENCE_S)
        whole = list(chunks)
    assert whole[-1].usage.completion_tokens == LONG
    return "".join(chunk.text for chunk in whole)


def page(app: RunningApp, name: str) -> str:
    with urllib.request.urlopen(str(app.metrics_url).replace("/metrics", name), timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


def fleet(app: RunningApp) -> Fleet:
    """What the gateway was told last."""
    return msgspec.json.decode(page(app, "/fleet"), type=Fleet)


def states(app: RunningApp) -> list[str]:
    """Of all groups."""
    try:
        return sorted(group.state for group in fleet(app).models[MODEL].groups)
    except (urllib.error.HTTPError, KeyError):  # nothing has been told yet
        return []


def changes(app: RunningApp) -> list[tuple[int, int]]:
    return [(made.before, made.target) for made in fleet(app).decisions if made.before != made.target]


def controller_pid() -> int:
    """Of Serve's controller."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    return int(ray.get(controller.get_pid.remote(), timeout=PATIENCE_S))


def num_processes() -> list[int]:
    """Of each group: its leader and its ranks."""
    pids = group_handle().broadcast("pids").results(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    return [len(found) for found in pids]


@contextmanager
def explained(app: RunningApp) -> Iterator[None]:
    """When the block fails, what was decided is told."""
    try:
        yield
    except BaseException:
        print(*map(sentence, fleet(app).decisions), sep="\n")
        raise


def test_groups_come_with_the_load_and_go_after_it() -> None:
    with running_stack(scaled_config("on")) as app, explained(app):
        load = Load(app.address)
        wait_until(lambda: states(app) == ["running"], PATIENCE_S, "the first group is seen")
        load.begin(6)
        wait_until(lambda: states(app) == ["running", "running"], SCALE_TIMEOUT_S, "a second group runs")
        assert num_processes() == [1 + NUM_RANKS, 1 + NUM_RANKS]
        with Client(app.address) as client:
            assert [card.num_groups for card in client.models()] == [2]

        autoscaler = ray.get_actor(NAME, NAMESPACE)
        pid = ray.get(autoscaler.pid.remote(), timeout=PATIENCE_S)
        os.kill(pid, signal.SIGKILL)
        os.kill(controller_pid(), signal.SIGKILL)
        load.end()
        with ThreadPoolExecutor(2) as threads:  # one stream for each group, of which one has to move
            streams = [threads.submit(long_stream, app.address) for _ in range(2)]
            wait_until(lambda: states(app) == ["running"], SCALE_TIMEOUT_S, "the second group is gone")
            texts = {stream.result(timeout=SCALE_TIMEOUT_S) for stream in streams}
        assert len(texts) == 1
        assert ray.get(autoscaler.pid.remote(), timeout=PATIENCE_S) != pid
        assert num_processes() == [1 + NUM_RANKS]

        # The autoscaler that was killed grew the model, and its successor, which knows that, shrank it. Serve's controller was
        # killed too, and knew how many groups there should be.
        assert changes(app) == [(1, 2), (2, 1)]
        assert all(made.reason for made in fleet(app).decisions)
        assert f'packtrain_groups{{model_name="{MODEL}",state="running"}} 1.0' in page(app, "/metrics")
        load.begin(1)
        load.end()
        shown = CliRunner().invoke(program, ["status", "--address", str(app.metrics_port)], catch_exceptions=False)
        assert "running" in shown.output
        said = CliRunner().invoke(program, ["autoscaler", "explain", "--address", str(app.metrics_port)]).output
        assert "1 → 2: " in said
        assert "2 → 1: " in said


def open_sequences(app: RunningApp) -> dict[str, int]:
    """Of each running group."""
    return {
        group.group: group.num_running or 0
        for group in fleet(app).models[MODEL].groups
        if group.state == "running" and group.num_running is not None
    }


class Stream:
    """One that is read until it is cancelled."""

    def __init__(self, client: Client) -> None:
        self._call = client.stub.GenerateStream(story(ENDLESS), timeout=SCALE_TIMEOUT_S)
        next(self._call)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def cancel(self) -> None:
        self._call.cancel()
        self._reader.join(PATIENCE_S)

    def _read(self) -> None:
        with suppress(grpc.RpcError):
            deque(self._call, maxlen=0)


def test_the_group_with_least_to_move_goes() -> None:
    """The idle one, and not the newest, which Serve would take, and which has the only stream."""
    with running_stack(scaled_config("on")) as app, explained(app), Client(app.address) as client:
        load = Load(app.address)
        wait_until(lambda: states(app) == ["running"], PATIENCE_S, "the first group is seen")
        (first,) = open_sequences(app)
        load.begin(6)
        wait_until(lambda: states(app) == ["running", "running"], SCALE_TIMEOUT_S, "a second group runs")
        load.end()
        wait_until(lambda: not any(open_sequences(app).values()), PATIENCE_S, "both are idle")
        streams = [Stream(client) for _ in range(2)]  # the second one goes to the group that has none
        wait_until(lambda: list(open_sequences(app).values()) == [1, 1], PATIENCE_S, "each has one")
        streams[0].cancel()
        wait_until(lambda: sum(open_sequences(app).values()) == 1, PATIENCE_S, "one is left")
        if open_sequences(app)[first]:
            streams[0] = Stream(client)
            streams[1].cancel()
            wait_until(lambda: open_sequences(app).get(first) == 0, PATIENCE_S, "the newest alone has one")
        wait_until(lambda: states(app) == ["running"], SCALE_TIMEOUT_S, "one group is gone")
        (left,) = open_sequences(app)
        assert left != first
        assert open_sequences(app) == {left: 1}
        assert changes(app) == [(1, 2), (2, 1)]
        assert num_processes() == [1 + NUM_RANKS]
        for stream in streams:
            stream.cancel()


def test_advice_is_told_and_not_carried_out() -> None:
    with running_stack(scaled_config("advise")) as app, explained(app):
        load = Load(app.address)
        load.begin(6)
        wait_until(lambda: states(app) == ["running"] and (1, 2) in changes(app), SCALE_TIMEOUT_S, "advice is given")
        load.end()
        assert num_processes() == [1 + NUM_RANKS]


def is_asleep(app: RunningApp) -> bool:
    seen = fleet(app).models[MODEL]
    return seen.mode == "on" and seen.target == 0 and not seen.groups


def test_a_model_that_nobody_asks_for_has_no_group_until_somebody_does() -> None:
    with (
        running_stack(scaled_config("on", min_groups=0, idle_s=3.0)) as app,
        explained(app),
        Client(app.address) as client,
    ):
        first = client.stub.Generate(story(NUM_TOKENS, seed=1), timeout=SCALE_TIMEOUT_S)
        wait_until(lambda: is_asleep(app), SCALE_TIMEOUT_S, "the last group is gone")
        assert [card.num_groups for card in client.models()] == [0]
        assert (
            urllib.request.urlopen(str(app.metrics_url).replace("/metrics", "/readyz"), timeout=PATIENCE_S).status
            == 200
        )

        woken = client.stub.Generate(story(NUM_TOKENS, seed=1), timeout=SCALE_TIMEOUT_S)
        assert woken.choices[0].text == first.choices[0].text
        wait_until(lambda: is_asleep(app), SCALE_TIMEOUT_S, "the group that was started is gone")

        with pytest.raises(grpc.RpcError) as caught:
            client.stub.Generate(story(NUM_TOKENS), timeout=0.5)  # must expire
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        causes = {made.cause for made in fleet(app).decisions if made.before != made.target}
        assert causes >= {"idle", "wake"}
