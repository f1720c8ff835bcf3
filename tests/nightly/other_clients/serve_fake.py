"""A gateway whose model says "Paris is it." to everything, and draws what is allowed where a form is asked for. Prints its ports;
ends with its standard input.

Clients of other makers are tried against it: what they need is the protocol, not a good answer.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from bench.support.fake_backend import ByteTokenizer, FakeBackend, card, obey
from model_parallel.engine.request import EngineOutput, EngineRequest
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.server import GatewayServer


async def answers(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    async for outputs in obey("Paris is it.")(requests):
        yield outputs


async def main() -> None:
    backend: Any = FakeBackend(answers, [card("tiny", max_model_len=8192)])
    tokenizers: Any = {"tiny": ByteTokenizer()}
    server = GatewayServer(GatewayConfig(port=0, http_port=0), LimitsConfig(), backend, tokenizers)
    ports = await server.start()
    print(ports.grpc, ports.http, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


asyncio.run(main())
