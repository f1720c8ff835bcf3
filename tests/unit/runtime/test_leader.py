"""The leader against scripted ranks: threads that speak the protocol, well or badly."""

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.engine.messages import StepResult
from model_parallel.errors import CheckpointError, ConfigError, GroupFailedError
from model_parallel.runtime import leader
from model_parallel.runtime.executors import visible_devices
from model_parallel.runtime.leader import LOOPBACK, SocketExecutor
from model_parallel.runtime.rank_link import (
    Ack,
    Connection,
    Failed,
    LeaderMessage,
    Moved,
    Progress,
    Ready,
    Result,
    Start,
    Step,
    connect,
)
from model_parallel.runtime.silence import MIN_LIMIT_S, NUM_FIRST_STEPS, STEPS_A_LIMIT
from model_parallel.runtime.starvation import Starvation
from model_parallel.transport.frames import LinkError
from tests.support.executors import execute
from tests.support.fake_rank import group_config, plan
from tests.support.waiting import PATIENCE_S, wait_until

Script = Callable[[Connection[LeaderMessage]], None]


class ScriptedExecutor(SocketExecutor):
    """scripts[rank] is what rank does once connected; its connection closes when that returns."""

    def __init__(
        self, *scripts: Script, start_timeout_s: float = PATIENCE_S, step_timeout_s: float = PATIENCE_S
    ) -> None:
        tp_size = len(scripts)
        super().__init__(group_config(tp_size, start_timeout_s=start_timeout_s, step_timeout_s=step_timeout_s))
        self.scripts = scripts
        self.threads: list[threading.Thread] = []
        self.num_kills = 0
        self.progress: list[tuple[int, int, int]] = []
        self._start(
            LOOPBACK,
            [Rendezvous(bind_host=LOOPBACK)] * tp_size,
            lambda *seen: self.progress.append(seen),
            time.monotonic() + start_timeout_s,
        )

    def _launch(self, host: str, port: int, secret: bytes) -> None:
        def run(rank: int, script: Script) -> None:
            connection = connect(host, port, secret=secret, epoch=self.config.epoch, rank=rank)
            try:
                script(connection)
            except LinkError:
                pass  # the leader has ended the group
            finally:
                connection.close()

        for rank, script in enumerate(self.scripts):
            self.threads.append(threading.Thread(target=run, args=(rank, script)))
            self.threads[-1].start()

    def _check_launched(self) -> None:
        pass

    def _kill_ranks(self) -> None:
        self.num_kills += 1

    def _reap_ranks(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def load(connection: Connection[LeaderMessage]) -> None:
    assert isinstance(connection.receive(), Start)
    connection.send(Ready(1, "fake", True))


def good(rank: int) -> Script:
    def script(connection: Connection[LeaderMessage]) -> None:
        load(connection)
        while isinstance(message := connection.receive(), Step):
            step = message.plan
            connection.send(
                Result(StepResult(step.epoch, step.step_id)) if rank == 0 else Ack(step.epoch, step.step_id)
            )

    return script


def answering(answer: Callable[[Connection[LeaderMessage], int], None]) -> Script:
    """Load, and answer every step so."""

    def script(connection: Connection[LeaderMessage]) -> None:
        load(connection)
        while isinstance(message := connection.receive(), Step):
            answer(connection, message.plan.step_id)

    return script


def test_good_ranks() -> None:
    executor = ScriptedExecutor(good(0), good(1), good(2))
    for step_id in range(1, 50):
        assert execute(executor, plan(step_id)) == StepResult(7, step_id)
    executor.shutdown()
    assert executor.num_kills == 0


def test_steps_are_sent_ahead_and_collected_in_order() -> None:
    executor = ScriptedExecutor(good(0), good(1))
    executor.submit(plan(1))
    for step_id in range(1, 50):
        executor.submit(plan(step_id + 1))
        assert executor.collect() == StepResult(7, step_id)
    assert executor.collect() == StepResult(7, 50)
    executor.shutdown()
    assert executor.num_kills == 0


def test_a_step_sent_ahead_has_its_time_from_the_answer_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: the leader learns how long its ranks took, not how long a step was in flight."""
    executor = ScriptedExecutor(good(0), step_timeout_s=4 * PATIENCE_S)
    now_s = 0.0
    monkeypatch.setattr(leader, "time", SimpleNamespace(monotonic=lambda: now_s))
    executor.submit(plan(1))
    for step_id in range(1, NUM_FIRST_STEPS + 3):
        executor.submit(plan(step_id + 1))
        now_s += 3.0
        assert executor.collect().step_id == step_id
    assert executor._limits.of(plan(1)) == STEPS_A_LIMIT * 3.0
    monkeypatch.undo()
    executor.shutdown()


def test_a_rank_lost_with_steps_in_flight_is_told_once_by_collect() -> None:
    second_has_come = threading.Event()

    def one_answer(connection: Connection[LeaderMessage]) -> None:
        load(connection)
        connection.receive()
        connection.send(Result(StepResult(7, 1)))
        connection.receive()
        second_has_come.set()

    reasons: list[str] = []
    executor = ScriptedExecutor(one_answer)
    executor.set_failure_callback(reasons.append)
    executor.submit(plan(1))
    executor.submit(plan(2))
    assert second_has_come.wait(PATIENCE_S)
    with pytest.raises(GroupFailedError, match=r"rank 0 .* is lost"):
        executor.collect()
        executor.collect()
    with pytest.raises(GroupFailedError, match=r"rank 0 .* is lost"):
        executor.submit(plan(3))
    executor.shutdown()  # the thread that saw the loss may only now be about to kill
    assert reasons == []
    assert executor.num_kills


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c, s: c.send(Result(StepResult(6, s))), "rank 0 .* answered step 2 of epoch 7"),
        (lambda c, s: c.send(Result(StepResult(7, s - 1))), "rank 0 .* answered step 2 of epoch 7"),
        (lambda c, s: c.send(Ack(7, s)), "rank 0 .* answered step 2 of epoch 7"),
        (lambda c, s: c.send(Failed("ValueError", "no")), "rank 0 .* failed: ValueError: no"),
        (lambda c, s: c.send_frame(b"\0\0\0\1\0\0\0\0x"), "rank 0 .* checksum"),
        (lambda c, s: c.send_frame(b"\xff" * 8), "rank 0 .* exceeds the limit"),
        (lambda c, s: c.send(Start(group_config(1), Rendezvous(bind_host=""))), "rank 0 .* protocol"),
    ],
)
def test_wrong_answer_of_rank_0_fails_the_group(
    answer: Callable[[Connection[LeaderMessage], int], None], message: str
) -> None:
    right = [True]

    def first_right(connection: Connection[LeaderMessage], step_id: int) -> None:
        if right.pop():
            connection.send(Result(StepResult(7, step_id)))
            right.append(False)
        else:
            answer(connection, step_id)

    executor = ScriptedExecutor(answering(first_right), good(1))
    execute(executor, plan(1))
    with pytest.raises(GroupFailedError, match=message):
        execute(executor, plan(2))
    with pytest.raises(GroupFailedError, match=message):
        execute(executor, plan(3))
    assert executor.num_kills == 1
    executor.shutdown()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c, s: c.send(Ack(6, s)), "rank 1 .* answered Ack"),
        (lambda c, s: c.send(Ack(7, s + 1)), "rank 1 .* answered Ack"),
        (lambda c, s: c.send(Result(StepResult(7, s))), "rank 1 .* answered Result"),
        (lambda c, s: c.send(Failed("ValueError", "no")), "rank 1 .* failed: ValueError: no"),
        (lambda c, s: c.send_frame(b"\xff" * 8), "rank 1 .* exceeds the limit"),
    ],
)
def test_wrong_answer_of_another_rank_fails_the_group(
    answer: Callable[[Connection[LeaderMessage], int], None], message: str
) -> None:
    executor, last_s = ScriptedExecutor(good(0), answering(answer)), time.monotonic() + PATIENCE_S
    with pytest.raises(GroupFailedError, match=message):
        for step_id in itertools.count(1):  # the leader goes on until it has read it
            execute(executor, plan(step_id))
            if time.monotonic() > last_s:
                break
    executor.shutdown()


def test_failure_before_the_callback_is_set_is_told_when_it_is() -> None:
    executor = ScriptedExecutor(good(0), load)
    reasons: list[str] = []
    assert wait_until(lambda: executor.num_kills)
    executor.set_failure_callback(reasons.append)
    executor.set_failure_callback(reasons.append)
    assert len(reasons) == 1
    assert "rank 1 (pid 1) is lost" in reasons[0]
    executor.shutdown()


def test_last_words_of_a_rank_between_steps_are_the_reason() -> None:
    started = threading.Event()

    def script(connection: Connection[LeaderMessage]) -> None:
        load(connection)
        assert started.wait(PATIENCE_S)
        connection.send(Failed("MemoryError", "no room"))

    executor = ScriptedExecutor(script)
    started.set()
    told = threading.Event()
    reasons: list[str] = []
    executor.set_failure_callback(lambda reason: (reasons.append(reason), told.set()))
    assert told.wait(PATIENCE_S)
    assert reasons == ["rank 0 (pid 1) failed: MemoryError: no room"]
    executor.shutdown()


def test_callback_may_shut_the_group_down() -> None:
    executor = ScriptedExecutor(good(0), good(1))
    done = threading.Event()
    executor.set_failure_callback(lambda reason: (executor.shutdown(), done.set()))
    executor._links[1].connection.shutdown()
    assert done.wait(PATIENCE_S)


def test_rank_that_does_not_answer_is_named() -> None:
    executor = ScriptedExecutor(answering(lambda c, s: None), good(1), step_timeout_s=0.3)
    reason = r"nothing has moved in step 1 for 0\.3 s; no answer from rank 0 \(pid 1\)"
    with pytest.raises(GroupFailedError, match=reason):
        execute(executor, plan(1))
    executor.shutdown()


@pytest.mark.parametrize("mover", [0, 1])
def test_a_step_that_moves_may_take_longer_than_the_limit(mover: int) -> None:
    """Whichever rank moves."""
    limit_s = 0.5
    executor = ScriptedExecutor(*(crawling(rank, mover, 2 * limit_s) for rank in range(2)), step_timeout_s=limit_s)
    assert execute(executor, plan(1)) == StepResult(7, 1)
    executor.shutdown()


def crawling(rank: int, mover: int, step_s: float) -> Script:
    """Answers a step so late; all the while the mover says that it moves, and the other one nothing."""

    def script(connection: Connection[LeaderMessage]) -> None:
        load(connection)
        while isinstance(message := connection.receive(), Step):
            step, began_s = message.plan, time.monotonic()
            while time.monotonic() - began_s < step_s:
                if rank == mover:
                    connection.send(Moved(step.step_id, False))
                time.sleep(0.01)
            connection.send(
                Result(StepResult(step.epoch, step.step_id)) if rank == 0 else Ack(step.epoch, step.step_id)
            )

    return script


@pytest.mark.parametrize("longest_s", [PATIENCE_S, 0.5])
def test_a_starved_rank_has_the_longest_limit(longest_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the leader has learned that steps of this size are short."""
    monkeypatch.setattr(Starvation, "look", lambda self: 1.0)
    executor = ScriptedExecutor(answering(answer_late), step_timeout_s=longest_s)
    for step_id in range(1, COMPILED_STEP):
        execute(executor, plan(step_id))
    if longest_s == PATIENCE_S:
        assert execute(executor, plan(COMPILED_STEP)) == StepResult(7, COMPILED_STEP)
    else:
        with pytest.raises(GroupFailedError, match=r"nothing has moved in step 5 for 0\.5 s"):
            execute(executor, plan(COMPILED_STEP))
    executor.shutdown()


def answer_late(connection: Connection[LeaderMessage], step_id: int) -> None:
    if step_id == COMPILED_STEP:
        time.sleep(1.5 * MIN_LIMIT_S)
    connection.send(Result(StepResult(7, step_id)))


@pytest.mark.parametrize("is_compiling", [False, True])
def test_a_step_that_compiles_has_the_longest_limit(is_compiling: bool) -> None:
    """Though the leader has learned that steps of this size are short."""
    executor = ScriptedExecutor(answering(lambda c, s: compile_late(c, s, is_compiling)))
    for step_id in range(1, COMPILED_STEP):
        execute(executor, plan(step_id))
    if is_compiling:
        assert execute(executor, plan(COMPILED_STEP)) == StepResult(7, COMPILED_STEP)
        assert executor._limits.of(plan(1)) == MIN_LIMIT_S, "it is not learned from"
    else:
        with pytest.raises(GroupFailedError, match="nothing has moved in step 5 for 1 s"):
            execute(executor, plan(COMPILED_STEP))
    executor.shutdown()


COMPILED_STEP = 5


def compile_late(connection: Connection[LeaderMessage], step_id: int, is_compiling: bool) -> None:
    if step_id == COMPILED_STEP:
        connection.send(Moved(step_id, is_compiling))
        time.sleep(3 * MIN_LIMIT_S)
    connection.send(Result(StepResult(7, step_id)))


@pytest.mark.parametrize(
    ("failed", "error", "message"),
    [
        (Failed("ConfigError", "too many ranks"), ConfigError, "rank 1 failed to start: too many ranks"),
        (Failed("CheckpointError", "x: missing"), CheckpointError, "rank 1 failed to start: x: missing"),
        (
            Failed("MemoryError", "no room"),
            GroupFailedError,
            "the group did not start: rank 1 failed: MemoryError: no room",
        ),
        (Ack(7, 1), GroupFailedError, "rank 1 sent Ack while it was loading"),
    ],
)
def test_failure_to_load_is_raised_as_what_it_was(failed: Failed | Ack, error: type[Exception], message: str) -> None:
    def script(connection: Connection[LeaderMessage]) -> None:
        connection.receive()
        connection.send(Progress(1, 10))
        connection.send(failed)
        connection.receive()

    with pytest.raises(error, match=message):
        ScriptedExecutor(good(0), script)


def test_loading_has_a_deadline() -> None:
    def script(connection: Connection[LeaderMessage]) -> None:
        connection.receive()
        connection.receive()

    with pytest.raises(GroupFailedError, match=r"rank 1 did not load within 0\.5 s"):
        ScriptedExecutor(good(0), script, start_timeout_s=0.5)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, ["4", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-ab,GPU-cd"}, ["GPU-ab", "GPU-cd"]),
    ],
)
def test_ranks_take_the_first_visible_devices(environment: dict[str, str], expected: list[str]) -> None:
    assert visible_devices(environment, 2) == expected


@pytest.mark.parametrize("listed", ["", "3"])
def test_too_few_visible_devices_are_refused(listed: str) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 2 and CUDA_VISIBLE_DEVICES names [01] GPUs"):
        visible_devices({"CUDA_VISIBLE_DEVICES": listed}, 2)
