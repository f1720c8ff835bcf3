"""Signals that end a command, as a terminal sends them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import started_with_hang_up
from tests.support.waiting import PATIENCE_S, wait_until

_COMMAND = """
import fcntl, signal, sys, termios, time
from pathlib import Path
from serving.cli.terminal import leaving_on_signals, say, stage
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with leaving_on_signals():
    try:
        Path(sys.argv[1], "ready").touch()
        try:
            while True:
                time.sleep(1)
        except SystemExit as error:
            raise SystemExit(1) from error  # as Ray does
    finally:
        with stage("draining"):
            say("stopping")
            if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                signal.raise_signal(signal.SIGHUP)  # the shell's, after the system's
        Path(sys.argv[1], "stopped").touch()
"""


def _start(directory: Path, terminal: int, *, nohup: bool = False) -> subprocess.Popen[bytes]:
    with started_with_hang_up(ignored=nohup):
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(directory)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
    os.close(terminal)
    assert wait_until((directory / "ready").exists)
    return process


def test_a_terminal_that_is_closed_lets_the_command_stop_in_good_order(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    process = _start(tmp_path, theirs)
    os.close(ours)
    assert process.wait(PATIENCE_S) == 0
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_command_stop_and_say_so(tmp_path: Path, number: signal.Signals) -> None:
    ours, theirs = os.openpty()
    process = _start(tmp_path, theirs)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 0
    assert (tmp_path / "stopped").exists()
    assert b"stopping" in os.read(ours, 10000)
    os.close(ours)


def test_nohup_keeps_the_command_running(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    process = _start(tmp_path, theirs, nohup=True)
    _, _, ignored = Path(f"/proc/{process.pid}/status").read_text().partition("SigIgn:")
    assert int(ignored.split()[0], 16) & 1 << signal.SIGHUP - 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    assert b"stopping" in os.read(ours, 10000)
    os.close(ours)
