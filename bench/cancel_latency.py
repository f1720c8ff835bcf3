"""How soon the KV blocks of a request are free after its client has cancelled it.

The gateway's servers, the output link and the engine's thread are the real ones, and ranks are two processes with SmolLM2-135M;
only Serve, which carries a request to its group and nothing after that, is left out. Beside each request that is cancelled at a
random token others run. The time is from the cancel until the scheduler has freed the sequence, looked at every millisecond.

    python -m bench.cancel_latency [--cancels 300] [--streams 8] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
from rich.console import Console

from bench.engine_timing import EngineContender
from bench.machine import machine_facts
from bench.peers.environments import MODEL
from bench.recovery import MAX_MODEL_LEN, NUM_KV_TOKENS, PARALLEL, percentiles
from model_parallel.engine.request import EngineRequest
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.config import GatewayConfig, LimitsConfig, ModelEntry
from serving.contracts.group_link import GroupOutputs
from serving.contracts.models import ModelCard
from serving.gateway.groups.loads import loads_of_this_process
from serving.gateway.groups.output_receiver import OutputReceiver
from serving.gateway.server import GatewayServer
from serving.models.fetch import fetch_model
from serving.models.group_spec import resolve_model
from serving.replica.async_engine import AsyncEngine
from serving.replica.output_sender import OutputSenders
from serving.text.tokenizer import load_tokenizer

RESULT = Path(__file__).parent / "results" / "cancel_latency.json"
LOOK_S = 0.001
TIMEOUT_S = 120.0


class OneGroup:
    """The gateway's Backend for a group in its own process."""

    def __init__(self, card: ModelCard, engine: AsyncEngine, receiver: OutputReceiver) -> None:
        self.models: Mapping[str, ModelCard] = {card.name: card}
        self._engine = engine
        self._receiver = receiver
        self._senders = OutputSenders("group-1", engine)

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncGenerator[GroupOutputs, None]:
        inbox = self._receiver.open([request.request_id for request in requests])
        num_open = len(requests)
        try:
            self._engine.start(requests, await self._senders.to(self._receiver.address))
            inbox.accepted(self._receiver.connection_of("group-1"))
            while num_open:
                step = await inbox.next()
                num_open -= sum(output.finish_reason is not None for output in step.outputs)
                yield step
        finally:
            inbox.close(cancel=num_open > 0)

    async def can_serve(self, model: str) -> bool:
        return True

    def close(self) -> None:
        self._senders.close()
        self._engine.close(TIMEOUT_S)


def request(seed: int) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=900, seed=seed, ignore_eos=True)
    return pb.GenerateRequest(prompt=pb.Prompt(text="Once upon a time"), sampling=sampling)


async def measure(num_cancels: int, num_streams: int) -> list[float]:
    """Seconds of each cancel."""
    path, draw, times_s = fetch_model(MODEL), random.Random(1), list[float]()
    card = resolve_model(ModelEntry(name=MODEL, source=MODEL, device="cpu", max_model_len=MAX_MODEL_LEN)).card
    contender = EngineContender(path, PARALLEL, num_kv_tokens=NUM_KV_TOKENS, max_model_len=MAX_MODEL_LEN)
    receiver = OutputReceiver(loads_of_this_process())
    await receiver.start("127.0.0.1")
    backend = OneGroup(card, AsyncEngine(contender.engine, asyncio.get_running_loop()), receiver)
    server = GatewayServer(
        GatewayConfig(port=0, http_port=None), LimitsConfig(), backend, {card.name: load_tokenizer(path)}
    )
    ports = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
            stub: Any = InferenceStub(channel)
            others = [asyncio.create_task(_keep_running(stub, seed)) for seed in range(num_streams - 1)]
            for turn in range(num_cancels):
                times_s.append(await _cancel_one(stub, contender, num_streams, 1000 + turn, draw))
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
    finally:
        await server.stop(0)
        backend.close()
        await receiver.stop()
        contender.close()
    return times_s


async def _keep_running(stub: Any, seed: int) -> None:
    while True:
        async for _ in stub.GenerateStream(request(seed)):
            pass


async def _cancel_one(stub: Any, contender: EngineContender, num_streams: int, seed: int, draw: random.Random) -> float:
    call = stub.GenerateStream(request(seed), timeout=TIMEOUT_S)
    for _ in range(draw.randrange(1, 6)):
        await call.read()
    async with asyncio.timeout(TIMEOUT_S):
        while contender.engine.stats.num_running < num_streams:  # one of the others has just ended
            await asyncio.sleep(LOOK_S)
        began_s = time.perf_counter()
        call.cancel()
        while contender.engine.stats.num_running == num_streams:  # a sequence leaves it when its blocks are freed
            await asyncio.sleep(LOOK_S)
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancels", type=int, default=300)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    times_s = asyncio.run(measure(arguments.cancels, arguments.streams))
    result = percentiles(times_s) | {"num_streams": arguments.streams, "load": os.getloadavg(), "seconds": times_s}
    arguments.json.write_text(json.dumps({"machine": machine_facts(), "model": MODEL} | result, indent=1) + "\n")
    figures = ", ".join(
        f"{name.removesuffix('_s')} {1e3 * result[name]:.0f} ms" for name in ("p50_s", "p99_s", "max_s")
    )
    Console(width=130, highlight=False).print(f"blocks free after a cancel, {len(times_s)} times: {figures}")


if __name__ == "__main__":
    main()
