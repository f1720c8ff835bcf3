"""What one core of `packtrain load` can send and read, against a mock that answers at once.

    python -m bench.load_client [--seconds 5] [--repeats 3] [--json FILE]

Requests of one token tell requests/s, long streams tell tokens/s, in a closed loop whose users keep the sender busy. What counts
is per second of the sending process's own processor time, since the mock runs beside it.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.loadtest.discover import resolve
from bench.loadtest.leader import Senders, crew
from bench.loadtest.replies import Outcome
from bench.loadtest.scenario import parse_scenario
from bench.machine import machine_facts

RESULT = Path(__file__).parent / "results" / "load_client.json"
NUM_USERS = 32
WORK = {
    "gRPC, one token": ("generate-stream", 1),
    "gRPC, whole answers": ("generate", 1),
    "gRPC, streams of 256": ("generate-stream", 256),
    "HTTP, one token": ("completions", 1),
    "HTTP, streams of 256": ("completions", 256),
}
MIN_REQUESTS_PER_S, MIN_TOKENS_PER_S = 1000, 2000
"""Of gRPC, a core."""


@contextmanager
def mock_process(*flags: str) -> Iterator[dict[str, int]]:
    """A mock server's ports, by protocol."""
    command = [sys.executable, "-m", "bench.mock_server", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(30)


async def measure(api: str, output_tokens: int, seconds: float, ports: dict[str, int]) -> dict[str, float]:
    """One run: requests and tokens a second, of the clock and of the process's own time."""
    is_http = api == "completions"
    tenant = {
        "target": f"http://127.0.0.1:{ports['http']}" if is_http else f"grpc://127.0.0.1:{ports['grpc']}",
        "api": api,
        "arrivals": {"process": "closed", "users": NUM_USERS},
        "work": {"kind": "synthetic", "input_tokens": 32, "output_tokens": output_tokens},
    }
    scenario = parse_scenario({"duration_s": seconds, "tenants": [tenant]}, origin="the bench")
    resolved = await resolve(scenario, None)
    async with crew(Senders(), None) as team:
        run = await team.run(scenario, resolved, asyncio.Event())
    finished = [record for record in run.records if record.outcome is Outcome.FINISHED]
    (health,) = run.healths
    tokens = sum(record.output_tokens for record in finished)
    return {
        "requests_per_s": len(finished) / health.wall_s,
        "tokens_per_s": tokens / health.wall_s,
        "requests_per_core_s": len(finished) / health.cpu_s,
        "tokens_per_core_s": tokens / health.cpu_s,
    }


async def measure_all(seconds: float, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of runs in turn."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WORK}
    with mock_process() as ports:
        for _ in range(repeats):
            for name, (api, output_tokens) in WORK.items():
                runs[name].append(await measure(api, output_tokens, seconds, ports))
    return {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}


def holds(work: dict[str, dict[str, float]]) -> bool:
    """What gRPC must reach."""
    return (
        work["gRPC, one token"]["requests_per_core_s"] >= MIN_REQUESTS_PER_S
        and work["gRPC, streams of 256"]["tokens_per_core_s"] >= MIN_TOKENS_PER_S
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    work = asyncio.run(measure_all(arguments.seconds, arguments.repeats))
    for name, of in work.items():
        print(
            f"{name}: {of['requests_per_core_s']:.0f} requests and {of['tokens_per_core_s']:.0f} tokens per second of a core"
        )
    result: dict[str, Any] = {"machine": machine_facts(), "users": NUM_USERS, "work": work, "holds": holds(work)}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
