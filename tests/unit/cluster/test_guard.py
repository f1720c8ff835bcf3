"""Whatever has files of the cluster's directory open ends with the process that started the cluster."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.guard import Guard
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
from cluster.guard import Guard
guard = Guard()
print(guard.directory, flush=True)
time.sleep(600)
"""


def _daemon(directory: Path) -> psutil.Process:
    subprocess.run([sys.executable, "-c", DAEMON, str(directory)], check=True, timeout=30)
    _wait((directory / "pid").exists)
    return psutil.Process(int((directory / "pid").read_text()))


def _wait(condition: Callable[[], bool]) -> None:
    assert wait_until(condition)


def test_dismissing_ends_what_is_left_and_removes_the_directory() -> None:
    guard = Guard()
    daemon = _daemon(guard.directory)
    guard.dismiss()
    _wait(lambda: not daemon.is_running())
    assert not guard.directory.exists()
    guard.dismiss()


def test_kill_9_of_the_starter_ends_what_it_left() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    directory = Path(starter.stdout.readline().strip())
    daemon = _daemon(directory)
    starter.send_signal(signal.SIGKILL)
    starter.communicate(timeout=PATIENCE_S)
    _wait(lambda: not daemon.is_running())
    assert directory.exists(), "its logs may tell why"
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
