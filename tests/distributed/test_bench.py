"""What a bench times are processes: peers are stopped between runs and named when they fail, ranks are spawned."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from bench.engine_timing import EngineContender
from bench.peers.environments import ROOT
from bench.peers.process import PeerProcess
from bench.support.synthetic_llama import twin
from bench.timing import WORKLOADS, ContenderFailedError, Timing, Workload
from model_parallel.config import ParallelConfig
from serving.cli.main import app
from tests.support.effort import rest_by_night
from tests.support.processes import started_with_hang_up

WORK = Workload(2, 4, 3)
WORKER = """
import sys
from bench.peers.worker import serve

def generate(prompts, num_new_tokens):
    print("a library prints on standard output")
    assert [len(prompt) for prompt in prompts] == [4, 4]
    return len(prompts) * num_new_tokens

def load():
    {load}
    return generate, "fake 1.0"

serve(load)
"""


def start(tmp_path: Path, load: str = "pass") -> PeerProcess:
    command = [sys.executable, "-c", WORKER.format(load=load)]
    return PeerProcess("fake", command, log=tmp_path / "fake.log", max_repeats=3)


def test_a_peer_is_timed_and_stopped_between_runs(tmp_path: Path) -> None:
    peer = start(tmp_path)
    try:
        process = psutil.Process(peer.pid)
        assert peer.detail == "fake 1.0"
        assert peer.run(WORK, 1) >= 0
        os.waitid(os.P_PID, peer.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert process.status() == psutil.STATUS_STOPPED
        assert peer.run(WORK, 2) >= 0
    finally:
        peer.close()
    assert not process.is_running()
    assert "a library prints" in (tmp_path / "fake.log").read_text()


def test_a_peer_that_does_not_start_tells_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ContenderFailedError, match="no such model"):
        start(tmp_path, load="raise RuntimeError('no such model')")


def test_a_peer_that_dies_fails_its_run_alone(tmp_path: Path) -> None:
    peer = start(tmp_path)
    try:
        with pytest.raises(ContenderFailedError, match="AssertionError"):
            peer.run(Workload(1, 5, 1), 1)
        with pytest.raises(ContenderFailedError, match="has ended"):
            peer.run(WORK, 2)
    finally:
        peer.close()


BENCH = """
import sys, time
from pathlib import Path
from bench.engine import leave_on_signals
from tests.distributed.test_bench import WORK, start
leave_on_signals()
peer = start(Path(sys.argv[1]), sys.argv[2])
try:
    print("ready", flush=True)
    time.sleep(600)
finally:
    peer.close()
"""


LONG_LOAD = "import time; print('loading', flush=True); time.sleep(600)"
ENDS = list(product(["pass", LONG_LOAD], [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL]))
"""How a peer loads, and what ends the bench."""


@pytest.mark.parametrize(
    ("load", "number"),
    rest_by_night(
        ENDS,
        by_day=[
            ("pass", signal.SIGTERM), ("pass", signal.SIGKILL), (LONG_LOAD, signal.SIGHUP), (LONG_LOAD, signal.SIGINT),
        ],
        has_names=True,
    ),
)  # fmt: skip
def test_a_peer_does_not_outlive_a_bench_that_a_signal_ends(number: signal.Signals, load: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BENCH, str(tmp_path), load]
    with started_with_hang_up():
        bench = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with bench:
        assert bench.stdout is not None
        if load == "pass":
            bench.stdout.readline()
        else:
            wait_until(lambda: "loading" in log_of(tmp_path), 60, "the peer loads")
        (peer,) = psutil.Process(bench.pid).children()
        bench.send_signal(number)
    peer.wait(timeout=30)


def log_of(directory: Path) -> str:
    log = directory / "fake.log"
    return log.read_text() if log.exists() else ""


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_engine_is_timed_on_spawned_ranks(tmp_path: Path, tp_size: int) -> None:
    path = twin("7b").write(tmp_path / "model", "hf", dtype=torch.bfloat16)
    parallel = ParallelConfig(tp_size=tp_size, dtype="bfloat16")
    contender = EngineContender(path, parallel, num_kv_tokens=64, max_model_len=32)
    try:
        assert contender.run(WORK, 1) > 0
        assert contender.engine.check_integrity() is None
        assert f"TP={tp_size}" in contender.name
    finally:
        contender.close()
    with pytest.raises(ContenderFailedError):
        contender.run(WORK, 2)


def test_the_command_prints_a_table_and_writes_the_result(tmp_path: Path) -> None:
    path = twin("7b").write(tmp_path / "model", "hf", dtype=torch.bfloat16)
    file = tmp_path / "result.json"
    arguments = [
        "bench",
        "engine",
        "--model",
        str(path),
        "--tp",
        "2",
        "--threads",
        "1",
        "--quantization",
        "int8",
        "--repeats",
        "1",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert done.exit_code == 0, done.output
    timings = [Timing.from_data(row) for row in json.loads(file.read_text())["timings"]]
    assert {timing.workload for timing in timings} == set(WORKLOADS)
    assert {timing.contender for timing in timings} == {"packtrain TP=2, 1 thread each, int8", "limit, 8 bits a weight"}
