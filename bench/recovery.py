"""How soon a group notices that one of its ranks is killed or stopped, and what looking for it costs.

A group of two ranks on this machine, without Ray, decodes 16 sequences. A rank is killed (SIGKILL) or stopped (SIGSTOP) at a
random moment, and the time is taken until the leader calls the group lost. A new group is started for each. Then ranks of one
group are stopped for nine tenths of the time that it allows, which it must survive.

`--compare` times decoding by this tree and by another one, such as an earlier commit's, in turn in one run.

    python -m bench.recovery [--faults 20] [--stops 20] [--json FILE]
    python -m bench.recovery --compare TREE [--repeats 60]
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.engine_timing import EngineContender
from bench.machine import machine_facts
from bench.peers.environments import MODEL
from bench.timing import Workload
from model_parallel.config import ParallelConfig
from model_parallel.runtime.silence import MIN_LIMIT_S
from serving.models.fetch import fetch_model

RESULT = Path(__file__).parent / "results" / "recovery.json"
PARALLEL = ParallelConfig(tp_size=2, dtype="bfloat16", num_threads=1)
WORKLOAD = Workload(16, 32, 900)
NUM_KV_TOKENS, MAX_MODEL_LEN = 16 * 1024, 1024
WARM_UP_STEPS = 20
"""Before a fault: the group has to know how long its steps take."""
TIMEOUT_S = 120.0
SHORT_STOP = 0.9
"""Of the limit."""
STEPS = Workload(8, 32, 48)
"""What two trees are compared by."""

SERVE_TREE = """
import sys
from pathlib import Path
from bench.engine_timing import EngineContender
from bench.timing import Workload
from model_parallel.config import ParallelConfig
parallel = ParallelConfig(tp_size=2, dtype="bfloat16", num_threads=1)
contender = EngineContender(Path(sys.argv[1]), parallel, num_kv_tokens=16384, max_model_len=1024)
workload = Workload(*map(int, sys.argv[2:5]))
for seed, _ in enumerate(sys.stdin):
    print(contender.run(workload, seed), flush=True)
contender.close()
"""
"""Of any tree: each line asks for one run, and is answered with its seconds."""


class Decoding:
    """A group at work: a thread steps until the group is lost or the block is left."""

    def __init__(self, contender: EngineContender) -> None:
        self.contender = contender
        self.num_steps = 0
        self.lost_s: float | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._step)
        self._thread.start()

    def _step(self) -> None:
        engine = self.contender.engine
        for seed in range(1 << 30):
            self.contender.add(WORKLOAD, seed)
            while engine.has_work:
                if self._stopping:
                    return
                engine.step()
                self.num_steps += 1
                if engine.failure is not None:
                    self.lost_s = time.perf_counter()
                    return

    def await_steps(self, num_steps: int) -> None:
        """Until it has made so many more. Raises TimeoutError."""
        target, deadline_s = self.num_steps + num_steps, time.monotonic() + TIMEOUT_S
        while self.num_steps < target:
            if time.monotonic() > deadline_s or not self._thread.is_alive():
                raise TimeoutError(f"the group has stopped: {self.contender.engine.failure}")
            time.sleep(0.005)

    def await_loss(self) -> float:
        """When (perf_counter) the leader called the group lost. Raises TimeoutError."""
        self._thread.join(TIMEOUT_S)
        if self.lost_s is None:
            raise TimeoutError("the group was not called lost")
        return self.lost_s

    def stop(self) -> None:
        self._stopping = True
        self._thread.join(TIMEOUT_S)


@contextmanager
def decoding(path: Path) -> Iterator[Decoding]:
    """A group that has decoded for a while."""
    contender = EngineContender(path, PARALLEL, num_kv_tokens=NUM_KV_TOKENS, max_model_len=MAX_MODEL_LEN)
    work = Decoding(contender)
    try:
        work.await_steps(WARM_UP_STEPS)
        yield work
    finally:
        work.stop()
        contender.close()


def time_to_notice(path: Path, fault: signal.Signals, victim: int, draw: random.Random) -> float:
    """Seconds from a rank's fault until its leader calls the group lost."""
    with decoding(path) as work:
        time.sleep(draw.uniform(0.0, 0.5))
        began_s = time.perf_counter()
        os.kill(work.contender.executor.pids[victim], fault)
        return work.await_loss() - began_s


def survived_stops(path: Path, num_stops: int) -> int:
    """How many stops of a rank, for nine tenths of the limit, one group survives before it is lost."""
    with decoding(path) as work:
        for turn in range(num_stops):
            pid = work.contender.executor.pids[turn % PARALLEL.tp_size]
            os.kill(pid, signal.SIGSTOP)
            time.sleep(SHORT_STOP * MIN_LIMIT_S)
            os.kill(pid, signal.SIGCONT)
            try:
                work.await_steps(WARM_UP_STEPS)
            except TimeoutError:
                return turn
    return num_stops


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of few samples the 99th percentile is the largest."""
    ordered = sorted(seconds)
    return {"p50_s": statistics.median(ordered), "p99_s": ordered[-1 - len(ordered) // 100], "max_s": ordered[-1]}


def measure(num_faults: int, num_stops: int, console: Console) -> dict[str, Any]:
    """The whole run, as plain data."""
    path, draw = fetch_model(MODEL), random.Random(1)
    result: dict[str, Any] = {"machine": machine_facts(), "model": MODEL, "num_faults": num_faults}
    for fault in (signal.SIGKILL, signal.SIGSTOP):
        times = [time_to_notice(path, fault, turn % PARALLEL.tp_size, draw) for turn in range(num_faults)]
        result[fault.name] = percentiles(times) | {"seconds": times}
        console.print(f"{fault.name}, noticed after: {percentiles(times)}")
    survived = survived_stops(path, num_stops)
    result["short_stops"] = {"num_stops": num_stops, "num_survived": survived, "stop_s": SHORT_STOP * MIN_LIMIT_S}
    console.print(f"stops of {SHORT_STOP * MIN_LIMIT_S:g} s survived: {survived} of {num_stops}")
    return result


def compare(other: Path, num_repeats: int, console: Console) -> float:
    """Speed of this tree over that of another one: the median of the ratios of runs that follow one another."""
    path, trees = fetch_model(MODEL), (Path(__file__).parents[1], other.resolve())
    with ExitStack() as stack:
        processes = [stack.enter_context(_tree_process(tree, path)) for tree in trees]
        for process in processes:
            _run_once(process)  # not counted
        ratios = []
        for turn in range(num_repeats):
            # Either goes first as often as the other.
            order = processes if turn % 2 else processes[::-1]
            took_s = {process.pid: _run_once(process) for process in order}
            ratios.append(took_s[processes[1].pid] / took_s[processes[0].pid])
    first, median, last = statistics.quantiles(ratios, n=4)
    console.print(
        f"steps/s of this tree over {other}: {median:.3f}, quartiles {first:.3f} and {last:.3f}, {num_repeats} pairs"
    )
    return median


def _tree_process(tree: Path, model: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SERVE_TREE, str(model), *map(str, STEPS)],
        env=os.environ | {"PYTHONPATH": str(tree)},
        cwd=tree,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _run_once(process: "subprocess.Popen[str]") -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="of each kind")
    parser.add_argument("--stops", type=int, default=20, help="that one group must survive")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    parser.add_argument("--compare", type=Path, metavar="TREE", help="compare speeds with another tree, and no more")
    parser.add_argument("--repeats", type=int, default=60, help="of the comparison")
    arguments = parser.parse_args()
    console = Console(width=130, highlight=False)
    if arguments.compare is not None:
        compare(arguments.compare, arguments.repeats, console)
        return
    result = measure(arguments.faults, arguments.stops, console)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
