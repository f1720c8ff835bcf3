"""What a stream costs that waits for its first token: memory of gateway and leader, with 2,000 of them on each front end.

One tenant opens streams, far more than run at a time; another one's requests are served meanwhile. Memory is what the system
cannot take back (see bench.memory_growth). It is read when a first batch of both kinds is open, and again after 2,000 more of
each, so that what the first streams bring into being is not counted.

    python -m bench.idle_streams [--streams 2000] [--json FILE]
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import uvloop
from rich.console import Console

from bench.clients import STREAM, Load, Metadata, Shape, client_processes, closed_loop, percentile
from bench.fairness import LARGE, SMALL, tenants_database
from bench.machine import machine_facts
from bench.memory_growth import Usage, served_processes
from bench.peers.environments import MODEL
from bench.stack import NO_ADMIN, running, stack_config
from serving.config import ServingConfig
from serving.driver.environment import prepare_environment

RESULT = Path(__file__).parent / "results" / "idle_streams.json"
FRONT_ENDS = ("grpc", "http")
MAX_STREAM_BYTES = 64 << 10
NUM_FIRST = 200
MAX_NUM_SEQS = 8
PROMPT_TOKENS, NEW_TOKENS = 8, 4000
"""Long answers, so that those that run do not make room for those that wait."""
KV_CACHE_TOKENS = 32768
ACTIVE = Shape(prompt_tokens=(32,), new_tokens=(8,))
ACTIVE_S = 15.0
NUM_CHANNELS = 4
NUM_OPENING = 64
"""At a time, of HTTP connections."""
HOLD_S = 600.0
TIMEOUT_S = 120.0
POLL_S = 0.5
SETTLE_S = 3.0
KIB = 1024


async def _hold_grpc(address: str, num_streams: int, metadata: Metadata) -> list[str]:
    """How each stream ended, one entry a stream."""
    draw = random.Random(1)
    shape = Shape(prompt_tokens=(PROMPT_TOKENS,), new_tokens=(NEW_TOKENS,))
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(NUM_CHANNELS)]
    streams: list[grpc.aio.UnaryStreamMultiCallable[bytes, bytes]] = [
        channel.unary_stream(STREAM) for channel in channels
    ]

    async def one(index: int) -> str:
        # Without a deadline: the group would refuse what it cannot have ready by then.
        call = streams[index % NUM_CHANNELS](shape.request(draw)[0], metadata=metadata)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code().name
        except asyncio.CancelledError:
            return "open"
        return "OK"

    return await _until_cancelled([asyncio.create_task(one(index)) for index in range(num_streams)], channels)


async def _hold_http(address: str, num_streams: int, metadata: Metadata) -> list[str]:
    host, port = address.rsplit(":", 1)
    draw = random.Random(2)
    opening = asyncio.Semaphore(NUM_OPENING)

    async def one() -> str:
        prompt = [draw.randrange(100, 30_000) for _ in range(PROMPT_TOKENS)]
        request = {"model": MODEL, "prompt": prompt, "max_tokens": NEW_TOKENS, "stream": True, "ignore_eos": True}
        body = json.dumps(request).encode()
        lines = ["POST /v1/completions HTTP/1.1", f"host: {address}", "content-type: application/json"]
        lines += [f"content-length: {len(body)}", *(f"{key}: {value}" for key, value in metadata), "", ""]
        async with opening:
            reader, writer = await asyncio.open_connection(host, int(port), limit=KIB)
            writer.write("\r\n".join(lines).encode() + body)
        status = b""
        try:
            while read := await reader.read(KIB):
                status = status or read.split(b"\r\n", 1)[0]
        except asyncio.CancelledError:
            return "open" if status in (b"", b"HTTP/1.1 200 OK") else status.decode()
        finally:
            writer.close()
        return f"ended: {status.decode()}"

    return await _until_cancelled([asyncio.create_task(one()) for _ in range(num_streams)], [])


async def _until_cancelled(tasks: list["asyncio.Task[str]"], channels: list[grpc.aio.Channel]) -> list[str]:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
    ends = await asyncio.gather(*tasks)
    for channel in channels:
        await channel.close()
    return ends


def _hold(
    front_end: str, address: str, num_streams: int, metadata: Metadata, release: Event, ends: "Queue[list[str]]"
) -> None:
    """In a process of its own: open the streams, keep them until `release`, and tell how each was at the end."""
    hold = {"grpc": _hold_grpc, "http": _hold_http}[front_end]

    async def run() -> list[str]:
        holding = asyncio.create_task(hold(address, num_streams, metadata))
        await asyncio.to_thread(release.wait, HOLD_S)
        holding.cancel()
        return await holding

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ends.put(runner.run(run()))


class Streams:
    """Idle streams of several processes, which end with the block."""

    def __init__(self, addresses: Mapping[str, str], metadata: Metadata) -> None:
        self._context = get_context("spawn")
        self._addresses, self._metadata = addresses, metadata
        self._release = self._context.Event()
        self._ends: Queue[list[str]] = self._context.Queue()
        self._processes: list[Any] = []

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join(TIMEOUT_S)

    def open(self, front_end: str, num_streams: int) -> None:
        arguments = (front_end, self._addresses[front_end], num_streams, self._metadata, self._release, self._ends)
        process = self._context.Process(target=_hold, args=arguments)
        process.start()
        self._processes.append(process)

    def close(self) -> Counter[str]:
        """Cancel them all. How they were then; "open" is as it should be."""
        self._release.set()
        ends = Counter(end for _ in self._processes for end in self._ends.get(timeout=TIMEOUT_S))
        for process in self._processes:
            process.join(TIMEOUT_S)
        return ends


def _wait_for(group: Any, wanted: range, report: Callable[[str], None]) -> None:
    """Until so many requests are open in the group."""
    began_s = time.monotonic()
    while True:
        stats = group.stats.remote().result(timeout_s=30)
        num_open = int(stats["num_running"] + stats["num_waiting"])
        if num_open in wanted:
            report(f"{num_open} requests are open in the group after {time.monotonic() - began_s:.0f} s")
            return
        if time.monotonic() - began_s > TIMEOUT_S:
            raise TimeoutError(f"{num_open} requests are open in the group after {TIMEOUT_S:g} s, not {wanted}")
        time.sleep(POLL_S)


def _about(num_streams: int) -> range:
    """Some of those that run may have come to their end."""
    return range(num_streams - MAX_NUM_SEQS, num_streams + 1)


def held_bytes(processes: Mapping[str, psutil.Process]) -> dict[str, int]:
    time.sleep(SETTLE_S)
    return {name: Usage.of(process).held_bytes for name, process in processes.items()}


def per_stream(before: Mapping[str, int], after: Mapping[str, int], num_streams: int) -> dict[str, float]:
    """What each process grew by, for one stream."""
    return {name: (after[name] - before[name]) / num_streams for name in before}


def decision(result: Mapping[str, Any]) -> bool:
    """No stream was lost or refused, everybody else was served, and no stream costs a gateway too much."""
    costs = (
        num_bytes
        for front_end in FRONT_ENDS
        for name, num_bytes in result["bytes_per_stream"][front_end].items()
        if name.startswith("gateway")
    )
    return (
        set(result["ends"]) <= {"open", "OK", "ended: HTTP/1.1 200 OK"}
        and result["ends"]["open"] >= result["num_streams"] * len(FRONT_ENDS)
        and set(result["active"]["codes"]) == {"OK"}
        and max(costs) <= MAX_STREAM_BYTES
    )


def measure(
    addresses: Mapping[str, str], credentials: Mapping[str, Metadata], num_streams: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """On a running stack, which serves nobody else. `addresses` by front end."""
    from ray import serve  # noqa: PLC0415  # after prepare_environment

    from serving.contracts.served import app_name, deployment_name  # noqa: PLC0415

    group = serve.get_deployment_handle(deployment_name(MODEL), app_name(MODEL))
    processes = {name: process for name, process in served_processes().items() if not name.startswith("rank")}
    num_open, costs = 0, {}
    with Streams(addresses, credentials[LARGE]) as streams:
        for front_end in FRONT_ENDS:
            streams.open(front_end, NUM_FIRST)
            num_open += NUM_FIRST
        _wait_for(group, _about(num_open), report)
        before = held = held_bytes(processes)
        for front_end in FRONT_ENDS:
            streams.open(front_end, num_streams)
            num_open += num_streams
            _wait_for(group, _about(num_open), report)
            previous, held = held, held_bytes(processes)
            costs[front_end] = per_stream(previous, held, num_streams)
            report(
                f"{front_end}: " + ", ".join(f"{name} {cost / KIB:.1f} KiB" for name, cost in costs[front_end].items())
            )
        with client_processes(1) as pool:
            load = Load(
                address=addresses["grpc"],
                shape=ACTIVE,
                seconds=ACTIVE_S,
                timeout_s=60.0,
                seed=3,
                metadata=credentials[SMALL],
            )
            active = pool.submit(closed_loop, load, 1).result(timeout=ACTIVE_S + 2 * load.timeout_s).requests
        ends = streams.close()
    _wait_for(group, range(1), report)
    return {
        "num_streams": num_streams,
        "bytes_per_stream": costs,
        "ends": ends,
        "active": {
            "codes": Counter(request.code for request in active),
            "median_s": percentile([request.took_s for request in active], 50),
        },
        "held_bytes": {"before": before, "open": held, "closed": held_bytes(processes)},
    }


@contextmanager
def served(database_url: str, num_streams: int, report: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """The stack, with room for all streams. Addresses by front end."""
    with running(configuration(database_url, len(FRONT_ENDS) * (num_streams + NUM_FIRST)), report) as app:
        yield {"grpc": app.address, "http": f"{app.host}:{app.http_port}"}


def configuration(database_url: str, num_streams: int) -> ServingConfig:
    """What is not said here is the default. One tenant alone fills four fifths of the queue."""
    most = num_streams + num_streams // 2
    return stack_config(
        {"max_num_seqs": MAX_NUM_SEQS, "max_waiting_requests": most, "kv_cache_tokens": KV_CACHE_TOKENS},
        tenancy={"database": database_url},
        gateway={
            "port": 0,
            "http_port": 0,
            "max_concurrent_requests": most,
            "max_connections": most,
            "max_connections_per_address": most,
        },
        admin=NO_ADMIN,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000, help="on each front end")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    console = Console(width=130, highlight=False)
    facts = machine_facts()
    with tenants_database() as (url, credentials), served(url, arguments.streams, console.print) as addresses:
        result = measure(addresses, credentials, arguments.streams, console.print)
    result = {"machine": facts, "model": MODEL, **result, "holds": decision(result)}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for front_end, cost in result["bytes_per_stream"].items():
        parts = ", ".join(f"{name} {num_bytes / KIB:.1f} KiB" for name, num_bytes in cost.items())
        console.print(f"{front_end}: each stream takes {parts}")
    active = result["active"]
    console.print(
        f"active requests meanwhile: {dict(active['codes'])}, {active['median_s'] * 1e3:.0f} ms at the median"
    )
    console.print(f"streams at the end: {dict(result['ends'])}")
    console.print(
        f"at most {MAX_STREAM_BYTES / KIB:g} KiB in the gateway, none lost, everybody served: "
        f"{'holds' if result['holds'] else 'does not hold'}"
    )
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
