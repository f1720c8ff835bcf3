"""`packtrain load` as it is called: processes of its own, against a mock in another process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.stack import wait_until

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "serving.cli", "load"]
SMALL = ["--input-len", "4", "--output-len", "3"]
pytestmark = pytest.mark.timeout(300)
SECRET = "a secret of the test, long enough"


@contextmanager
def mock_process(*flags: str) -> Iterator[dict[str, int]]:
    """Its ports."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.mock_server", *flags], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(30)


def load(*arguments: str, check: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"COLUMNS": "160"} | environment,
    )  # fmt: skip
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return re.sub(r"\s+", " ", done.stdout + done.stderr)


def test_a_run_writes_what_it_measured_and_its_status_is_that_of_the_assertions(tmp_path: Path) -> None:
    files = [f"--{kind}={tmp_path / f'r.{kind}'}" for kind in ("json", "csv", "html")]
    with mock_process() as ports:
        target = f"--target=grpc://127.0.0.1:{ports['grpc']}"
        shown = load(target, *SMALL, "--num-prompts=20", "--processes=2", *files)
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["completed"] == 20 and "20 sent: 20 finished" in shown
        assert len((tmp_path / "r.csv").read_text().splitlines()) == 21
        assert (tmp_path / "r.html").read_text().count("<svg") >= 8
        compared = load("--compare", str(tmp_path / "r.json"), str(tmp_path / "r.json"))
        assert "median_ttft_ms" in compared
        # An invalid run says nothing of the server, and a busy machine may make it one.
        failing = subprocess.run(
            [*COMMAND, target, *SMALL, "--num-prompts=5", "--assert=completed>5"], cwd=ROOT, capture_output=True, text=True,
            timeout=240, check=False,
        )  # fmt: skip
        assert failing.returncode in (1, 3) and "does not hold, it is 5" in failing.stdout


def test_a_trace_that_is_longer_than_the_run_is_told(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,input_tokens,output_tokens\n0,4,3\n0.1,4,3\n99,4,3\n")
    with mock_process() as ports:
        shown = load(
            f"--target=grpc://127.0.0.1:{ports['grpc']}", "--dataset-name=csv", f"--dataset-path={trace}", "--duration=1",
            f"--json={tmp_path / 'r.json'}",
        )  # fmt: skip
    told = "tenant default: 2 of 3 requests of the trace are due within the duration of 1 s; the last is due at 99 s"
    assert f"note: {told}" in shown
    notes = json.loads((tmp_path / "r.json").read_text())["notes"]
    assert any(note.startswith(told) for note in notes)


def test_over_http_with_a_sweep_of_users(tmp_path: Path) -> None:
    with mock_process() as ports:
        load(
            f"--target=http://127.0.0.1:{ports['http']}/v1", "--api=completions", *SMALL, "--users=1", "--duration=0.5",
            "--sweep=1,2", f"--json={tmp_path / 's.json'}", f"--html={tmp_path / 's.html'}",
        )  # fmt: skip
    points = json.loads((tmp_path / "s.json").read_text())["points"]
    assert [point["at"] for point in points] == [1, 2] and all(point["completed"] for point in points)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_interrupted_keeps_what_was_measured(number: signal.Signals, tmp_path: Path) -> None:
    """A terminal's Ctrl-C and `timeout` signal all processes of the group."""
    path = tmp_path / "r.json"
    with mock_process("--first-token-s=0.02") as ports:
        arguments = [
            f"--target=grpc://127.0.0.1:{ports['grpc']}",
            *SMALL,
            "--request-rate=20",
            "--duration=600",
            f"--json={path}",
        ]
        with subprocess.Popen(
            [*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            own = psutil.Process(process.pid)
            wait_until(lambda: len(own.children()) == 1, 60, "a sender is there")
            (sender,) = own.children()
            wait_until(
                lambda: bool(sender.net_connections("tcp")) and sender.cpu_times().user > 0.5, 120, "it is at work"
            )
            time.sleep(3)
            os.killpg(process.pid, number)
            shown, _ = process.communicate(timeout=60)
            assert process.returncode == 130
    result = json.loads(path.read_text())
    assert result["sent"] == result["completed"] + result["refused"] + result["errors"] + result["cancelled"]
    assert "interrupted" in shown and not sender.is_running()


def test_senders_end_with_whoever_leads() -> None:
    with mock_process() as ports:
        arguments = [f"--target=grpc://127.0.0.1:{ports['grpc']}", *SMALL, "--request-rate=5", "--duration=600"]
        with subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            own = psutil.Process(process.pid)
            wait_until(lambda: len(own.children()) == 1, 60, "a sender is there")
            (sender,) = own.children()
            process.kill()
        wait_until(lambda: not sender.is_running(), 60, "the sender is gone")


def test_another_machine_joins(tmp_path: Path) -> None:
    with mock_process() as ports:
        path, port = tmp_path / "r.json", ports["grpc"]
        leading = [
            *COMMAND, f"--target=grpc://127.0.0.1:{port}", *SMALL, "--num-prompts=20", "--machines=1", "--listen=127.0.0.1:0",
            f"--json={path}",
        ]  # fmt: skip
        environment = os.environ | {"PACKTRAIN_LOAD_SECRET": SECRET, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(leading, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            where = re.search(r"join at (127\.0\.0\.1:\d+)", line)
            assert where, line
            refused = load("--join", where[1], check=1, PACKTRAIN_LOAD_SECRET="another secret, as long as it")
            assert "secret" in refused
            load("--join", where[1], PACKTRAIN_LOAD_SECRET=SECRET)
            assert process.wait(120) == 0
    assert json.loads(path.read_text())["client"]["num_processes"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_helps_and_is_ended_takes_its_senders_along(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        arguments = ["--join", f"127.0.0.1:{silent.getsockname()[1]}"]
        with subprocess.Popen(
            [*COMMAND, *arguments], cwd=ROOT, env=os.environ | {"PACKTRAIN_LOAD_SECRET": SECRET}, start_new_session=True
        ) as process:
            own = psutil.Process(process.pid)
            wait_until(lambda: len(own.children()) == 1, 60, "a sender is there")
            (sender,) = own.children()
            os.killpg(process.pid, number)
            assert process.wait(60) == 130
        wait_until(lambda: not sender.is_running(), 60, "the sender is gone")


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--target=http://example.com"], 78, "--yes-i-own-this"),
        (["--target=grpc://127.0.0.1:1"], 1, "nothing answers at grpc://127.0.0.1:1"),
        (["--target=http://127.0.0.1:1"], 1, "http://127.0.0.1:1 cannot be reached"),
        (["--assert=speed>3"], 78, "'speed' is not known"),
        (["--machines=1"], 78, "PACKTRAIN_LOAD_SECRET"),
        (["--join=127.0.0.1:1", "--input-len=4"], 78, "--join goes without --input-len"),
        (["--compare", "a", "b", "--seed=1"], 78, "--compare goes without --seed"),
        (["--search-from=2"], 78, "--search-from needs --search"),
        (["--scenario=nowhere.yaml"], 78, "nowhere.yaml"),
        (["--search=ttft_p99<1s", "--users=2"], 78, "needs constant, poisson or gamma"),
        (["--json=nowhere/r.json"], 78, "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], status: int, expected: str) -> None:
    if arguments == ["--search=ttft_p99<1s", "--users=2"]:
        with mock_process() as ports:
            shown = load(*arguments, f"--target=grpc://127.0.0.1:{ports['grpc']}", check=status)
    else:
        shown = load(*arguments, check=status)
    assert expected in shown
