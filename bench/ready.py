"""How long `packtrain serve` takes from its start to the first answer, when model and compiled code are in the caches.

python -m bench.ready [--starts 3] [--tp 2] [--json FILE]
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from bench.machine import machine_facts
from bench.peers.environments import MODEL, ROOT
from protos import inference_pb2 as pb
from serving.client.client import Client, chat_prompt
from serving.models.fetch import fetch_model

RESULT = Path(__file__).parent / "results" / "ready.json"
TIMEOUT_S = 120.0
POLL_S = 0.02


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def first_answer_s(tp_size: int) -> dict[str, Any]:
    """Start the command, ask until it answers, stop it. Seconds to the answer's first token, and when each stage began."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "serving.cli.main",
        "serve",
        "--tp",
        str(tp_size),
        "--port",
        str(port),
        "--http-port",
        "0",
    ]
    began_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    stages: list[tuple[float, str]] = []

    def read_stages() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                stages.append((time.perf_counter() - began_s, line.strip()))

    reader = threading.Thread(target=read_stages, daemon=True)
    reader.start()
    try:
        _ask(process, port, began_s + TIMEOUT_S)
        took_s = time.perf_counter() - began_s
    finally:
        _stop(process)
    reader.join(POLL_S)
    return {"seconds": took_s, "stages": [stage for stage in stages if stage[0] < took_s]}


def _ask(process: subprocess.Popen[str], port: int, deadline_s: float) -> None:
    """Return when the first token of an answer is here."""
    while not _listens(port):
        _check(process, deadline_s)
        time.sleep(POLL_S)
    request = pb.GenerateRequest(
        model=MODEL,
        prompt=chat_prompt([("user", "What is the capital of France?")]),
        sampling=pb.Sampling(temperature=0.0, max_tokens=1),
    )
    with Client(f"127.0.0.1:{port}") as client:
        while True:
            try:
                chunks, times = client.stream(request, timeout_s=TIMEOUT_S)
                for _ in chunks:
                    if times.num_tokens:
                        return
            except grpc.RpcError as error:
                if not (isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE):
                    raise
            _check(process, deadline_s)
            time.sleep(POLL_S)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=POLL_S):
        return True
    return False


def _check(process: subprocess.Popen[str], deadline_s: float) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"packtrain serve ended with status {process.returncode}")
    if time.perf_counter() > deadline_s:
        raise TimeoutError(f"no answer within {TIMEOUT_S:g} s")


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT_S)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="after one that fills the caches and is not counted")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    console = Console(width=130, highlight=False)
    facts = machine_facts()
    fetch_model(MODEL)
    starts = []
    for index in range(arguments.starts + 1):
        starts.append(first_answer_s(arguments.tp))
        console.print(f"start {index}: first answer after {starts[-1]['seconds']:.2f} s")
    counted = starts[1:]
    median_s = statistics.median(start["seconds"] for start in counted)
    for began_s, stage in min(counted, key=lambda start: abs(start["seconds"] - median_s))["stages"]:
        console.print(f"  {began_s:6.2f} s  {stage}", markup=False)
    result = {"machine": facts, "model": MODEL, "tp_size": arguments.tp, "median_s": median_s, "starts": counted}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"median of {arguments.starts}: {median_s:.2f} s; written to {arguments.json}")


if __name__ == "__main__":
    main()
