"""A gateway in a process of its own, for tests that kill it: real front ends, keys and quotas on a backend of drawn tokens.

    python -m tests.support.gateway_process PORT KEY_FILE AUTHORITY

It prints its port when it serves. Its quota authority is reached over gRPC at AUTHORITY, where `serve_authority` has it.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from bench.support.fake_backend import ByteTokenizer, card
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.server import GatewayServer
from serving.tenants.authority.service import AuthorityService
from serving.tenants.client.accounts import AuthorityUnreachableError, TenantAccounts
from tests.support.drawn_groups import DrawnGroups

STEP_S = 0.01
"""So that a kill comes in the middle of a stream."""
_SERVICE = "authority"


class RemoteLink:
    """How the process talks with the authority."""

    def __init__(self, address: str) -> None:
        channel = grpc.aio.insecure_channel(address)
        self._calls = {name: channel.unary_unary(f"/{_SERVICE}/{name}") for name in ("exchange", "sync")}

    async def exchange(self, data: bytes) -> bytes:
        return await self._call("exchange", data)

    async def sync(self, data: bytes) -> bytes:
        return await self._call("sync", data)

    async def _call(self, name: str, data: bytes) -> bytes:
        try:
            reply: bytes = await self._calls[name](data)
        except grpc.aio.AioRpcError as error:
            raise AuthorityUnreachableError(str(error)) from error
        return reply


@asynccontextmanager
async def serve_authority(url: str) -> AsyncIterator[str]:
    """The quota authority of a database. Gives its address."""
    service = AuthorityService(url, owner="here", refresh_s=0.05)

    def handler(method: Callable[[bytes], Awaitable[bytes]]) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(data: bytes, context: Any) -> bytes:
            return await method(data)

        return grpc.unary_unary_rpc_method_handler(answer)

    methods = {"exchange": handler(service.exchange), "sync": handler(service.sync)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
        await service.close()


async def main(port: int, key: Path, authority: str) -> None:
    """Serve until the process is killed."""
    accounts = TenantAccounts(RemoteLink(authority), refresh_s=0.05)
    await accounts.start()
    backend: Any = DrawnGroups(cards=[card()])
    backend.on_step = lambda: time.sleep(STEP_S / 4)
    config = GatewayConfig(port=port, http_port=None, resume_key_file=key)
    server = GatewayServer(config, LimitsConfig(), backend, {"tiny": ByteTokenizer()}, accounts)
    ports = await server.start()
    print(ports.grpc, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
