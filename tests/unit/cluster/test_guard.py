"""Whatever has files of the cluster's directory open ends with the process that started the cluster."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.guard import MAX_PARENT_BYTES, PREFIX, Guard, kill_processes_in
from tests.support.waiting import PATIENCE_S, wait_until

# Opens a file in the directory and forks away, as a daemon does; then sleeps far longer than the test.
DAEMON = """
import os, sys, time
file = open(os.path.join(sys.argv[1], "log"), "a")
if os.fork():
    os._exit(0)
os.setsid()
open(os.path.join(sys.argv[1], "pid.tmp"), "w").write(str(os.getpid()))
os.rename(os.path.join(sys.argv[1], "pid.tmp"), os.path.join(sys.argv[1], "pid"))
time.sleep(600)
"""
STARTER = """
import sys, time
from pathlib import Path
from cluster.guard import Guard
guard = Guard(Path(sys.argv[1]))
print(guard.directory, flush=True)
"""


def _daemon(directory: Path) -> psutil.Process:
    subprocess.run([sys.executable, "-c", DAEMON, str(directory)], check=True, timeout=30)
    _wait((directory / "pid").exists)
    return psutil.Process(int((directory / "pid").read_text()))


def _wait(condition: Callable[[], bool]) -> None:
    assert wait_until(condition)


def test_dismissing_ends_what_is_left_and_removes_the_directory(tmp_path: Path) -> None:
    guard = Guard(tmp_path)
    daemon = _daemon(guard.directory)
    guard.dismiss()
    _wait(lambda: not daemon.is_running())
    assert not guard.directory.exists()
    guard.dismiss()


def test_kill_9_of_the_starter_ends_what_it_left_and_leaves_no_directory(tmp_path: Path) -> None:
    starter, directory = _starter(tmp_path)
    daemon = _daemon(directory)
    starter.send_signal(signal.SIGKILL)
    starter.communicate(timeout=PATIENCE_S)
    _wait(lambda: not daemon.is_running() and not directory.exists())


def test_the_next_guard_removes_what_a_killed_guard_left(tmp_path: Path) -> None:
    starter, directory = _starter(tmp_path)
    daemon = _daemon(directory)
    (guard,) = psutil.Process(starter.pid).children()
    guard.kill()
    starter.kill()
    starter.communicate(timeout=PATIENCE_S)
    _wait(lambda: not guard.is_running())
    assert directory.exists() and daemon.is_running(), "nobody was left to do it"
    other = Guard(tmp_path)
    try:
        assert not directory.exists()
        _wait(lambda: not daemon.is_running())
    finally:
        other.dismiss()


def test_a_killed_guard_leaves_what_its_starter_runs_alone(tmp_path: Path) -> None:
    """The next start on the machine found the file unlocked, and killed a stack that served."""
    starter, directory = _starter(tmp_path)
    daemon = _daemon(directory)
    (guard,) = psutil.Process(starter.pid).children()
    guard.kill()
    _wait(lambda: guard.status() == psutil.STATUS_ZOMBIE)
    Guard(tmp_path).dismiss()
    assert directory.exists() and daemon.is_running()
    starter.kill()
    starter.communicate(timeout=PATIENCE_S)
    Guard(tmp_path).dismiss()
    _wait(lambda: not daemon.is_running() and not directory.exists())


def test_another_guard_watches_in_place_of_one_that_was_killed(tmp_path: Path) -> None:
    starter, directory = _starter(tmp_path, "while True: time.sleep(0.01); guard.revive()")
    daemon = _daemon(directory)
    (first,) = psutil.Process(starter.pid).children()
    first.kill()
    _wait(lambda: not first.is_running())
    _wait(lambda: len(psutil.Process(starter.pid).children()) == 1)
    starter.kill()
    starter.communicate(timeout=PATIENCE_S)
    _wait(lambda: not daemon.is_running() and not directory.exists())


def test_what_a_killed_guard_would_have_ended_ends_when_it_is_dismissed(tmp_path: Path) -> None:
    guard = Guard(tmp_path)
    daemon = _daemon(guard.directory)
    (process,) = [each for each in psutil.Process().children() if str(guard.directory) in each.cmdline()]
    process.kill()
    guard.dismiss()
    _wait(lambda: not daemon.is_running())
    assert not guard.directory.exists()
    guard.dismiss()


def test_what_is_found_late_is_killed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where one look at all processes takes longer than the time that killing has."""
    daemon = _daemon(tmp_path)
    monkeypatch.setattr("cluster.guard.KILL_TIMEOUT_S", -1.0)
    kill_processes_in(tmp_path, spare=0)
    _wait(lambda: not daemon.is_running())


def test_a_guard_leaves_living_ones_alone(tmp_path: Path) -> None:
    first = Guard(tmp_path)
    second = Guard(tmp_path)
    assert first.directory.exists()
    second.dismiss()
    assert first.directory.exists()
    first.dismiss()


def test_the_directory_is_kept_on_request(tmp_path: Path) -> None:
    guard = Guard(tmp_path, keep_directory=True)
    guard.dismiss()
    assert guard.directory.exists()


def test_sockets_fit_below_the_longest_parent() -> None:
    parent = "p" * MAX_PARENT_BYTES
    ray_socket = f"{parent}/{PREFIX}12345678/session_2026-11-27_01-52-44_016333_4194304/sockets/plasma_store"
    assert len(ray_socket) == 107


def _starter(parent: Path, then: str = "time.sleep(600)") -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", STARTER + then, str(parent)]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    return starter, Path(starter.stdout.readline().strip())
