"""More connections than there is room for, peers that say nothing, and peers that are no longer there."""

import asyncio
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest

from bench.support.fake_backend import FakeBackend, for_ever
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serving.gateway import server as server_module
from serving.gateway.http.listener import BoundedProtocol, bound_kernel
from tests.support.waiting import PATIENCE_S, until
from tests.unit.gateway.conftest import Running, Serve
from tests.unit.gateway.http_client import COMPLETION, connection, post, raw_request
from tests.unit.gateway.test_http2_attacks import PREFACE, SETTINGS, frame

ASK = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
HEALTH = raw_request(method="GET", path="/healthz")


async def http_status(gateway: Running, address: str) -> int:
    """Of a request from one of this machine's addresses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port, local_addr=(address, 0))
    writer.write(raw_request(method="GET", path="/healthz", headers=("connection: close",)))
    answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    return int(answer.split()[1])


async def test_one_address_does_not_take_all_connections(serve: Serve) -> None:
    async with serve(http_port=0, max_connections=8, max_connections_per_address=3) as gateway:
        async with AsyncExitStack() as held:
            for _ in range(3):
                reader, writer = await held.enter_async_context(connection(gateway))
                writer.write(HEALTH)
                await reader.readuntil(b"\r\n")
            assert await http_status(gateway, "127.0.0.1") == 503
            assert await http_status(gateway, "127.0.0.2") == 200
        async with asyncio.timeout(PATIENCE_S):
            while await http_status(gateway, "127.0.0.1") != 200:
                await asyncio.sleep(0.01)
        assert gateway.server._http._num_by_address == {}, "no address is remembered without a connection"


async def test_a_peer_that_vanished_is_noticed_by_the_kernel(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does then needs a broken network to be seen; that it was asked to does not."""
    asked: list[socket.socket] = []
    made = BoundedProtocol.connection_made

    def remember(protocol: BoundedProtocol, transport: Any) -> None:
        made(protocol, transport)
        asked.append(transport.get_extra_info("socket"))

    monkeypatch.setattr(BoundedProtocol, "connection_made", remember)
    async with serve(http_port=0) as gateway, connection(gateway) as (reader, writer):
        writer.write(HEALTH)
        await reader.readuntil(b"\r\n")
        (sock,) = asked
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        idle_s, interval_s, num_probes, unacknowledged_ms = (
            sock.getsockopt(socket.IPPROTO_TCP, option) for option in options
        )
        assert idle_s + interval_s * num_probes <= 60, "a peer that says nothing is asked whether it is there"
        assert 0 < unacknowledged_ms <= 60_000, "so is one that is sent something"


def test_slow_readers_have_their_time_in_the_kernel_too() -> None:

    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as sock:
        bound_kernel(sock, 300.0)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 300_000


async def grpc_answer(reader: asyncio.StreamReader) -> bytes:
    """What comes first, b"" when it is the end."""
    try:
        return await asyncio.wait_for(reader.read(1), PATIENCE_S)
    except ConnectionResetError:
        return b""


async def test_grpc_connections_are_bounded(serve: Serve) -> None:
    async with serve(max_grpc_connections=2) as gateway:
        host, port = gateway.target.split(":")
        async with AsyncExitStack() as held:
            answers = []
            for _ in range(4):
                reader, writer = await asyncio.open_connection(host, int(port))
                held.callback(writer.close)
                writer.write(PREFACE + frame(SETTINGS, 0))
                answers.append(await grpc_answer(reader))
            assert answers[2:] == [b"", b""]
            assert b"" not in answers[:2]
        await gateway.stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("sent", [b"", b"PRI * HT", PREFACE, PREFACE + frame(SETTINGS, 0)[:-1]])
async def test_who_does_not_begin_to_speak_grpc_is_cut_off(serve: Serve, sent: bytes) -> None:
    async with serve(header_timeout_s=0.2) as gateway:
        host, port = gateway.target.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        async with asyncio.timeout(PATIENCE_S):
            while await reader.read(1000):
                pass
        writer.close()


class Proxy:
    """Forwards bytes until it is told to swallow them: to either side the other one is then as good as dead."""

    def __init__(self) -> None:
        self.is_broken = False
        self.num_swallowed = 0

    @asynccontextmanager
    async def between(self, target: str) -> AsyncIterator[str]:
        host, port = target.split(":")
        writers: list[asyncio.StreamWriter] = []

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                if self.is_broken:
                    self.num_swallowed += len(data)
                    continue
                writer.write(data)
            if not self.is_broken:
                writer.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection(host, int(port))
            writers.extend((writer, there_writer))
            await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer), return_exceptions=True)

        listening = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        finally:
            listening.close()
            for each in writers:
                each.transport.abort()


async def dies_within(serve: Serve, timeout_s: float) -> None:
    async with serve(FakeBackend(for_ever)) as gateway:
        proxy = Proxy()
        async with proxy.between(gateway.target) as target, grpc.aio.insecure_channel(target) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(ASK)
            await call.read()
            assert gateway.backend.num_open == 1
            proxy.is_broken = True
            async with asyncio.timeout(timeout_s):
                while gateway.backend.num_open:
                    await asyncio.sleep(0.02)
            assert proxy.num_swallowed, "the gateway asked whether it is still there"
            call.cancel()


async def test_the_requests_of_a_dead_grpc_peer_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_KEEPALIVE_S", 1.0)
    monkeypatch.setattr(server_module, "_KEEPALIVE_TIMEOUT_S", 2.0)
    await dies_within(serve, PATIENCE_S)


@pytest.mark.nightly
async def test_the_requests_of_a_dead_grpc_peer_end_within_forty_seconds(serve: Serve) -> None:
    await dies_within(serve, 42)


GATEWAY_WITH_FEW_FILES = """
import asyncio, os, resource, sys
import uvloop
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.server import GatewayServer
from bench.support.fake_backend import ByteTokenizer, FakeBackend

async def main():
    backend = FakeBackend()
    tokenizers = dict.fromkeys(backend.models, ByteTokenizer())
    server = GatewayServer(GatewayConfig(port=0, http_port=0), LimitsConfig(), backend, tokenizers)
    ports = await server.start()
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 40, num_open + 40))
    print(ports.grpc, ports.http, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)

uvloop.run(main())  # as in Ray's replicas
"""


@asynccontextmanager
async def gateway_with_few_files() -> AsyncIterator[tuple[Running, psutil.Process, list[bytes]]]:
    """A gateway in a process of its own that can open 40 files more; and its log."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY_WITH_FEW_FILES,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    log: list[bytes] = []
    reading = asyncio.create_task(_collect(process.stderr, log))
    nothing: Any = None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        grpc_port, http_port = map(int, line.split())
        running = Running(nothing, nothing, nothing, nothing, f"127.0.0.1:{grpc_port}", http_port)
        yield running, psutil.Process(process.pid), log
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading
        await process.stdout.read()  # to its end, which closes it


async def _collect(stream: asyncio.StreamReader, lines: list[bytes]) -> None:
    while line := await stream.readline():
        lines.append(line)


async def test_running_out_of_files_is_survived_and_gets_over() -> None:
    """Each front end is flooded in turn; when the flood ends, both answer again."""
    async with gateway_with_few_files() as (gateway, process, log):
        for flooded in (int(gateway.target.split(":")[1]), gateway.http_port):
            sockets = [socket.create_connection(("127.0.0.1", flooded)) for _ in range(100)]
            try:
                await until(lambda: process.num_fds() >= process.rlimit(psutil.RLIMIT_NOFILE)[0])
            finally:
                for sock in sockets:
                    sock.close()
            async with grpc.aio.insecure_channel(gateway.target) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                models = await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=PATIENCE_S)
                assert len(models.models) == 2
            assert (await post(gateway, "/v1/completions", COMPLETION)).status_code == 200
    assert len(log) < 100, "being out of files is not told for each connection"
    assert not re.search(rb"Traceback|Exception", b"".join(log))
