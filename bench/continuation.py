"""What it costs that a stream can go on in another group: served tokens a second of a gateway that keeps what it has delivered,
beside one that keeps nothing, in turn.

Both are the same gateway over gRPC, with a backend that has its tokens at once, so that nothing but the gateway is timed: beside
ranks that compute, the cost is a smaller part. A client process of its own reads `--streams` streams.

    python -m bench.continuation [--streams 32] [--tokens 200] [--seconds 3] [--rounds 12] [--json FILE]
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from bench.clients import Load, Shape, client_processes, closed_loop
from bench.machine import machine_facts
from bench.peers.environments import MODEL
from bench.support.fake_backend import ByteTokenizer, FakeBackend, card
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from protos import inference_pb2_grpc
from serving.config import LimitsConfig
from serving.gateway.core import generation
from serving.gateway.core.generation import Generator
from serving.gateway.core.resumption import Resumption
from serving.gateway.grpc.servicer import InferenceServicer

RESULT = Path(__file__).parent / "results" / "continuation.json"
TARGET = 0.98
TIMEOUT_S = 60.0
PLACE = "Resumption"
"""Where the gateway's core takes it from."""


class Forgets(Resumption):
    """Keeps nothing of what was delivered."""

    def take(self, output: EngineOutput) -> EngineOutput:
        return output


async def at_once(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    """A token a turn of the event loop."""
    request = requests[0]
    num_tokens = request.sampling.max_tokens
    for number in range(num_tokens):
        reason = FinishReason.LENGTH if number + 1 == num_tokens else None
        yield (EngineOutput(request_id=request.request_id, token_ids=(97,), finish_reason=reason),)
        await asyncio.sleep(0)


async def measure(arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, list[float]]:
    """Tokens a second of each round."""
    backend: Any = FakeBackend(at_once, (card(MODEL, max_model_len=4096, vocab_size=50_000),))
    tokenizers: dict[str, Any] = {MODEL: ByteTokenizer()}
    server = grpc.aio.server()
    generator = Generator(backend, tokenizers, LimitsConfig())
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(generator), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    shape = Shape(prompt_tokens=(16,), new_tokens=(arguments.tokens,))
    rates: dict[str, list[float]] = {"on": [], "off": []}
    try:
        for number in range(-2, 2 * arguments.rounds):
            # The order alternates: neither is always the second of a pair.
            name = ("on", "off", "off", "on")[number % 4]
            setattr(generation, PLACE, Resumption if name == "on" else Forgets)
            load = Load(
                address=f"127.0.0.1:{port}", shape=shape, seconds=arguments.seconds, timeout_s=TIMEOUT_S, seed=number,
                is_streamed=True,
            )  # fmt: skip
            running = pool.submit(closed_loop, load, arguments.streams)
            outcome = await asyncio.wrap_future(running)
            wrong = {ended.code for ended in outcome.requests} - {"OK"}
            if wrong or not outcome.requests:
                raise RuntimeError(f"requests ended with {wrong or 'nothing'}")
            if number >= 0:  # the first two rounds warm up
                took_s = max(ended.ended_s for ended in outcome.requests) - min(e.sent_s for e in outcome.requests)
                rates[name].append(len(outcome.requests) * arguments.tokens / took_s)
    finally:
        setattr(generation, PLACE, Resumption)
        await server.stop(1)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=12, help="of each of the two")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with client_processes(1) as pool:
        rates = asyncio.run(measure(arguments, pool))
    ratios = sorted(on / off for on, off in zip(rates["on"], rates["off"], strict=True))
    ratio = statistics.median(ratios)
    result = {"machine": machine_facts(), "rates": rates, "ratio": ratio, "target": TARGET, "holds": ratio >= TARGET}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"on {statistics.median(rates['on']):.0f}, off {statistics.median(rates['off']):.0f} tokens/s; on is {ratio:.3f} of off "
        f"(median of {len(ratios)} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}; at least {TARGET} is wanted)"
    )


if __name__ == "__main__":
    main()
