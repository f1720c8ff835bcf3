"""Ranks as threads: results, failures and their causes, and that no thread is left."""

import threading

import pytest

from model_parallel.errors import CheckpointError, GroupFailedError
from model_parallel.runtime.executors import InProcessExecutor
from tests.support.executors import execute
from tests.support.fake_rank import EXIT, RAISE, FakeRank, group_config, plan, tokens


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> object:
    before = set(threading.enumerate())
    yield
    assert {t.name for t in set(threading.enumerate()) - before} == set()


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_steps_run_on_every_rank(tp_size: int) -> None:
    progress: list[tuple[int, int, int]] = []
    executor = InProcessExecutor(
        group_config(tp_size), rank_factory=FakeRank, on_progress=lambda *seen: progress.append(seen)
    )
    weight = tp_size * (tp_size + 1) // 2
    assert tokens(execute(executor, plan(1, (0, 5), (1, 7)))) == [5 * weight, 7 * weight]
    assert tokens(execute(executor, plan(2, (0, 1)))) == [weight]
    assert sorted(progress) == [(rank, done, 2) for rank in range(tp_size) for done in (1, 2)]
    executor.shutdown()
    executor.shutdown()


def test_single_rank_runs_in_the_callers_thread() -> None:
    threads: list[threading.Thread] = []

    class Recording(FakeRank):
        def execute(self, plan: object) -> object:  # type: ignore[override]
            threads.append(threading.current_thread())

    executor = InProcessExecutor(group_config(1), rank_factory=Recording)
    execute(executor, plan(1))
    executor.shutdown()
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("tp_size", [1, 3])
def test_rank_that_raises_fails_the_group_with_the_cause(tp_size: int) -> None:
    executor = InProcessExecutor(group_config(tp_size), rank_factory=FakeRank)
    with pytest.raises(GroupFailedError, match="step 1 failed: ValueError: told to raise"):
        execute(executor, plan(1, (RAISE, tp_size - 1), (0, 1)))
    with pytest.raises(GroupFailedError, match="told to raise"):
        execute(executor, plan(2, (0, 1)))
    executor.shutdown()


def test_rank_that_does_not_join_in_time_fails_the_group() -> None:
    class Absent(FakeRank):
        def _run(self, row: object) -> object:  # type: ignore[override]
            return super()._run(row) if self.rank else row  # type: ignore[arg-type]

    executor = InProcessExecutor(group_config(2, step_timeout_s=0.3), rank_factory=Absent)
    with pytest.raises(GroupFailedError, match=r"did not come within 0.3 s"):
        execute(executor, plan(1, (0, 1)))
    executor.shutdown()


@pytest.mark.parametrize(("tp_size", "broken"), [(1, 0), (2, 0), (3, 2)])
def test_failed_start_raises_what_the_rank_raised(tp_size: int, broken: int) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        InProcessExecutor(group_config(tp_size, checkpoint_path=f"broken:{broken}"), rank_factory=FakeRank)


def test_nothing_runs_after_shutdown() -> None:
    executor = InProcessExecutor(group_config(2), rank_factory=FakeRank)
    executor.shutdown()
    with pytest.raises(GroupFailedError, match="shut down"):
        execute(executor, plan(1, (EXIT, 0)))
