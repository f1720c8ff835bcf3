"""Signals that end a command, as a terminal sends them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.cli.terminal import leaving_at_once
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


_START = """
import signal, sys, time
from pathlib import Path
from serving.cli.terminal import leaving_at_once, leaving_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
directory = Path(sys.argv[1])

def clean_up():
    (directory / "cleaning").touch()
    time.sleep(float(sys.argv[2]))
    (directory / "clean").touch()

with leaving_on_signals(), leaving_at_once(clean_up):
    while True:
        try:
            (directory / "ready").touch()
            time.sleep(1)
        except BaseException:  # as where Python calls what cannot raise, in the midst of Ray's start
            continue
"""


def _starting(directory: Path, clean_up_s: float) -> subprocess.Popen[bytes]:
    with started_with_hang_up(ignored=False):
        process = subprocess.Popen([sys.executable, "-c", _START, str(directory), str(clean_up_s)])
    assert wait_until((directory / "ready").exists)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_a_signal_during_the_start_is_not_lost(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """The exception that it raised could be, and the command went on to serve; or Ray's threads crashed at the end."""
    process = _starting(tmp_path, 0.0)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == status
    assert (tmp_path / "clean").exists()


def test_a_second_signal_during_the_start_does_not_wait(tmp_path: Path) -> None:
    process = _starting(tmp_path, 1e6)
    process.send_signal(signal.SIGTERM)
    assert wait_until((tmp_path / "cleaning").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    assert not (tmp_path / "clean").exists()


def test_after_the_start_signals_do_what_they_did_before() -> None:
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    given = {number: signal.getsignal(number) for number in ending}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        before = [signal.getsignal(number) for number in ending]
        with leaving_at_once(lambda: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "nohup"
            assert signal.getsignal(signal.SIGTERM) not in before
        assert [signal.getsignal(number) for number in ending] == before
    finally:
        for number, handler in given.items():
            signal.signal(number, handler)


def _nobody_reads() -> int:
    """The end of a pipe to write to whose reader has gone, as `| tee log` has at Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("place", [_nobody_reads, lambda: os.open("/dev/full", os.O_WRONLY)], ids=["pipe", "full"])
def test_a_command_that_cannot_tell_goes_on(place: Callable[[], int]) -> None:
    """serve left before it had drained and stopped, and what was wrong ended with status 1."""
    program = "from serving.cli.terminal import say, stage\nsay('stopping')\nwith stage('draining'): print('stopped')"
    for command, status, printed in (
        (
            ["-c", program + "\nfrom serving.cli.__main__ import _leave_what_nobody_reads as leave; leave()"],
            0,
            "stopped\n",
        ),
        (["-m", "serving.cli", "serve", "nowhere.yaml"], 78, ""),
    ):
        errors = place()
        done = subprocess.run(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        os.close(errors)
        assert (done.returncode, done.stdout) == (status, printed)
