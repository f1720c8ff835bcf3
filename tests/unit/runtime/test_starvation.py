"""How long a process has waited for a processor, beside one that keeps it busy."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from model_parallel.runtime.starvation import Starvation, _Thread, _waited_s
from tests.support.waiting import wait_until

BUSY = "while True: pass"
IDLE = "import time; time.sleep(1e6)"


class Processes:
    """On one core, all of them."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, program: str) -> int:
        process = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{program}"], stdout=subprocess.PIPE)
        self.started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        return process.pid

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@pytest.fixture
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.end()


def test_a_process_that_shares_its_core_waits(processes: Processes) -> None:
    starvation = Starvation([processes.start(IDLE), processes.start(BUSY)])
    processes.start(BUSY)
    assert starvation.look() == 0.0, "a first look"
    assert wait_until(lambda: starvation.look() > 0.01)
    starvation.forget()
    assert starvation.look() == 0.0


@pytest.mark.parametrize("is_stopped", [False, True])
def test_one_that_sleeps_or_is_stopped_does_not(processes: Processes, is_stopped: bool) -> None:
    pid = processes.start(BUSY if is_stopped else IDLE)
    processes.start(BUSY)
    if is_stopped:
        os.kill(pid, signal.SIGSTOP)
    state = psutil.STATUS_STOPPED if is_stopped else psutil.STATUS_SLEEPING
    assert wait_until(lambda: psutil.Process(pid).status() == state)
    starvation = Starvation([pid])
    starvation.look()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert starvation.look() == 0.0


def test_one_that_has_ended_does_not(processes: Processes) -> None:
    starvation = Starvation([processes.start(BUSY)])
    starvation.look()
    processes.end()
    assert starvation.look() == 0.0


@pytest.mark.parametrize(
    ("before", "now", "waited_s"),
    [
        pytest.param((True, 5, 9), (True, 5, 9), 0.5, id="waits all the time, which is not counted yet"),
        pytest.param((True, 5, 9), (True, 5.5, 9), 0.0, id="runs all the time"),
        pytest.param((True, 5, 9), (True, 5.1, 9.2), 0.4, id="runs and waits"),
        pytest.param((True, 5, 9), (True, 5.6, 9), 0.0, id="the clocks differ a little"),
        pytest.param((False, 5, 9), (False, 5, 9), 0.0, id="sleeps"),
        pytest.param((True, 5, 9), (False, 5.1, 9.2), 0.2, id="has gone to sleep"),
        pytest.param((True, 5, 9), (False, 5.1, 19), 0.5, id="has gone to sleep after a wait that began long ago"),
    ],
)
def test_a_wait_is_what_linux_has_counted_or_has_not_yet(
    before: tuple[bool, float, float], now: tuple[bool, float, float], waited_s: float
) -> None:
    def thread(is_runnable: bool, ran_s: float, counted_s: float) -> _Thread:
        return _Thread(is_runnable, round(ran_s * 1e9), round(counted_s * 1e9))

    assert _waited_s(thread(*before), thread(*now), 0.5) == pytest.approx(waited_s)
