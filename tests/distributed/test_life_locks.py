"""A leader hears of the death of processes that hold a lock of its, and of no other end."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from model_parallel.runtime.life_locks import LifeLocks
from tests.support.waiting import PATIENCE_S

RANK = """
import sys
from model_parallel.runtime.life_locks import HeldLifeLock
lock = HeldLifeLock(sys.argv[1], int(sys.argv[2]))
print("held", flush=True)
for line in sys.stdin:
    lock.release()
    print("released", flush=True)
"""


@contextmanager
def holding(locks: LifeLocks, rank: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", RANK, locks.path, str(rank)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


class Waiting:
    """A thread of the leader."""

    def __init__(self, locks: LifeLocks, rank: int) -> None:
        self.died: bool | None = None
        self.thread = threading.Thread(target=self._wait, args=(locks, rank), daemon=True)
        self.thread.start()

    def _wait(self, locks: LifeLocks, rank: int) -> None:
        self.died = locks.await_end(rank)

    def result(self) -> bool | None:
        self.thread.join(PATIENCE_S)
        return self.died


@pytest.fixture
def locks() -> Iterator[LifeLocks]:
    locks = LifeLocks(3)
    yield locks
    locks.close()
    locks.unmap()


def test_the_one_that_dies_is_told_and_the_others_are_waited_for(locks: LifeLocks) -> None:
    with holding(locks, 0) as first, holding(locks, 2) as last:
        waiting = {rank: Waiting(locks, rank) for rank in (0, 2)}
        os.kill(last.pid, signal.SIGKILL)
        assert waiting[2].result() is True
        assert waiting[0].died is None
        os.kill(first.pid, signal.SIGKILL)
        assert waiting[0].result() is True
        assert locks.await_end(0) is False, "it is told once"


def test_a_stop_is_no_death_and_neither_is_an_end_in_good_order(locks: LifeLocks) -> None:
    with holding(locks, 1) as process:
        waiting = Waiting(locks, 1)
        os.kill(process.pid, signal.SIGSTOP)
        assert os.waitpid(process.pid, os.WUNTRACED)[1]
        assert waiting.died is None
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("end\n")
        process.stdin.flush()
        assert waiting.result() is False


def test_one_that_holds_no_lock_is_not_waited_for(locks: LifeLocks) -> None:
    assert locks.await_end(1) is False
