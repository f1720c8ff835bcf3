"""Cheap clients in a process of their own: what load generation costs is not the server's, and is told.

Requests are serialised before anything is timed and answers are not decoded. One call is one request: nothing is sent again.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import grpc
import grpc.aio
import uvloop
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.peers.environments import MODEL
from protos import inference_pb2 as pb

UNARY = "/packtrain.v1.Inference/Generate"
STREAM = "/packtrain.v1.Inference/GenerateStream"
Metadata = tuple[tuple[str, str], ...]
_Send = Callable[[bytes, int], Awaitable["Ended"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What every request of one client asks: random prompts, so that none shares a beginning, and whole answers."""

    prompt_tokens: tuple[int, ...]
    """Lengths to draw from."""
    new_tokens: tuple[int, ...]
    """The same of answers. With several, requests that began together do not end together."""

    def request(self, draw: random.Random) -> tuple[bytes, int]:
        """Serialised, and the tokens of its answer."""
        prompt = [draw.randrange(100, 30_000) for _ in range(draw.choice(self.prompt_tokens))]
        num_tokens = draw.choice(self.new_tokens)
        sampling = pb.Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        request = pb.GenerateRequest(
            model=MODEL, prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)), sampling=sampling
        )
        return request.SerializeToString(), num_tokens


@dataclass(frozen=True, slots=True)
class Ended:
    """One request, on the clock that all processes of a machine share (monotonic)."""

    sent_s: float
    ended_s: float
    code: str
    first_s: float | None = None
    """When the first message of a stream came."""
    reason: str = ""
    """Of a refusal, from google.rpc.ErrorInfo."""
    retry_after_s: float | None = None
    """Of a refusal, from google.rpc.RetryInfo."""
    num_tokens: int = 0
    """Of a whole answer."""
    asked: bytes = b""
    """The serialised request."""

    @property
    def took_s(self) -> float:
        return self.ended_s - self.sent_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All requests of one load, in the order in which they ended."""

    requests: list[Ended]
    cpu_s: float
    """Processor time of the clients' process."""
    late_s: float
    """The latest that a request was sent after it was due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Who sends what to whom."""

    address: str
    shape: Shape
    seconds: float
    timeout_s: float
    seed: int
    start_s: float = 0.0
    """When (monotonic) the first may be sent."""
    metadata: Metadata = ()
    is_streamed: bool = False


def poisson_arrivals(rate: float, seconds: float, draw: random.Random) -> list[float]:
    """Times of independent arrivals, `rate` a second."""
    times: list[float] = []
    at_s = draw.expovariate(rate)
    while at_s < seconds:
        times.append(at_s)
        at_s += draw.expovariate(rate)
    return times


def open_loop(load: Load, rate: float) -> Outcome:
    """Requests arrive at `rate` a second, whatever becomes of those before. Returns when all have ended."""
    draw = random.Random(load.seed)
    arrivals = [(at_s, *load.shape.request(draw)) for at_s in poisson_arrivals(rate, load.seconds, draw)]

    async def run(send: _Send) -> tuple[list[Ended], float]:
        ended: list[Ended] = []
        tasks: set[asyncio.Task[None]] = set()
        began_s, late_s = time.monotonic(), 0.0

        async def one(body: bytes, num_tokens: int) -> None:
            ended.append(await send(body, num_tokens))

        for at_s, body, num_tokens in arrivals:
            left_s = began_s + at_s - time.monotonic()
            late_s = max(late_s, -left_s)
            await asyncio.sleep(max(0.0, left_s))
            task = asyncio.create_task(one(body, num_tokens))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return ended, late_s

    return _run(load, run)


def closed_loop(load: Load, num_streams: int, pause_s: float = 0.0) -> Outcome:
    """`num_streams` clients, each with one request after another. One that is refused waits as long as it was told to."""

    async def run(send: _Send) -> tuple[list[Ended], float]:
        ended: list[Ended] = []
        until_s = time.monotonic() + load.seconds

        async def client(index: int) -> None:
            draw = random.Random(f"{load.seed}-{index}")
            while (now_s := time.monotonic()) < until_s:
                ended.append(await send(*load.shape.request(draw)))
                wait_s = ended[-1].retry_after_s or draw.uniform(0.5, 1.5) * pause_s
                await asyncio.sleep(min(wait_s, max(0.0, until_s - now_s)))

        await asyncio.gather(*(client(index) for index in range(num_streams)))
        return ended, 0.0

    return _run(load, run)


def _run(load: Load, run: Callable[[_Send], Coroutine[Any, Any, tuple[list[Ended], float]]]) -> Outcome:
    async def connected() -> tuple[list[Ended], float]:
        async with grpc.aio.insecure_channel(load.address) as channel:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(UNARY)
            stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(STREAM)

            async def send(body: bytes, num_tokens: int) -> Ended:
                sent_s, first_s = time.monotonic(), None
                try:
                    if load.is_streamed:
                        async for _ in stream(body, timeout=load.timeout_s, metadata=load.metadata):
                            first_s = first_s or time.monotonic()
                    else:
                        await unary(body, timeout=load.timeout_s, metadata=load.metadata)
                except grpc.aio.AioRpcError as error:
                    ended_s = time.monotonic()
                    return Ended(sent_s, ended_s, error.code().name, first_s, *_refusal(error), asked=body)
                return Ended(sent_s, time.monotonic(), "OK", first_s, num_tokens=num_tokens, asked=body)

            await channel.channel_ready()
            await asyncio.sleep(max(0.0, load.start_s - time.monotonic()))
            return await run(send)

    cpu_s = time.process_time()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        requests, late_s = runner.run(connected())
    return Outcome(requests=requests, cpu_s=time.process_time() - cpu_s, late_s=late_s)


def _refusal(error: grpc.aio.AioRpcError) -> tuple[str, float | None]:
    """Reason and seconds to wait, as far as the server tells them."""
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]  # wants the same three methods
    reason, retry_after_s = "", None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return reason, retry_after_s


@contextmanager
def client_processes(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes that run the loads above: `submit(open_loop, load, rate)`. They are ready when the block begins."""
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.2] * num_processes))
        yield pool


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of them do not exceed."""
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
