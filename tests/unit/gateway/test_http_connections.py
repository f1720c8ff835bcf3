"""What a peer may do to a connection: send too much, too slowly, in two ways at once, or not read. Others go on."""

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from bench.support.fake_backend import TIMINGS, FakeBackend, for_ever
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import ConfigError
from serving.config import LimitsConfig
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.http_client import COMPLETION, answer_to, client, connection, post, raw_request

BODY = b'{"model":"tiny","prompt":"hi"}'
STREAM = b'{"model":"tiny","prompt":"hi","stream":true}'


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (("content-length: 30", "content-length: 31"), BODY),
        (("content-length: 30", "content-length: 30"), BODY),
        (("content-length: -1",), BODY),
        (("content-length: 3 0",), BODY),
        (("content-length: 99999999999999999999",), BODY),
        (("content-length: 30", "transfer-encoding: chunked"), BODY),
        (("transfer-encoding: chunked", "content-length: 30"), BODY),
        (("transfer-encoding: chunked",), b"zz\r\n" + BODY),
        (("transfer-encoding:",), BODY),
        (("transfer-encoding: chunked, gzip",), BODY),
        (("transfer-encoding: chunked", "transfer-encoding: chunked"), BODY),
        (("transfer-encoding: chunked, chunked",), BODY),
        (("bad header: x",), BODY),
        (("x: a\rb",), BODY),
    ],
)
async def test_ambiguous_or_broken_framing_is_refused_and_the_connection_closed(
    serve: Serve, headers: tuple[str, ...], body: bytes
) -> None:
    async with serve(http_port=0) as gateway:
        answer = await answer_to(gateway, raw_request(body, headers=headers))
        assert status_of(answer) == 400, answer
        assert b'"type":"invalid_request_error"' in answer
        assert gateway.backend.requests == []


@pytest.mark.parametrize(
    "codings",
    [
        ["gzip"],
        ["identity"],
        ["gzip, chunked"],
        ["foo,chunked"],
        ["identity", "chunked"],
    ],
)
async def test_codings_but_chunked_are_refused_and_the_connection_closed(serve: Serve, codings: list[str]) -> None:
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    async with serve(http_port=0) as gateway:
        answer = await answer_to(
            gateway, raw_request(chunks, headers=tuple(f"transfer-encoding: {each}" for each in codings))
        )
        assert statuses(answer) == [501] and b"allowed: chunked, once" in answer, answer
        assert gateway.backend.requests == []
        good = raw_request(chunks, headers=("Transfer-Encoding: Chunked", "connection: close"))
        assert statuses(await answer_to(gateway, good)) == [200]


async def test_headers_are_bounded_in_size_and_number(serve: Serve) -> None:
    limit = LimitsConfig().max_header_bytes
    async with serve(http_port=0) as gateway:
        for headers in (
            [f"x: {'a' * limit}"],
            [f"{'x' * limit}: a"],
            [f"x{index}: {'a' * (limit // 10)}" for index in range(11)],
            [f"x{index}: a" for index in range(101)],
        ):
            request = raw_request(BODY, headers=tuple(headers))
            for parts in (
                [request],
                [request[:50], request[50:]],
                [raw_request(method="GET", path="/healthz"), request],
            ):
                answer = await answer_to(gateway, *parts)
                last = answer[answer.rindex(b"HTTP/1.1") :]
                assert status_of(last) == 431, (headers[0][:20], answer)
                assert b'"code":"headers_too_large"' in last
        assert status_of(await answer_to(gateway, raw_request(BODY, path="/" + "a" * limit))) == 431
        assert status_of(await answer_to(gateway, b"\x00" * 10)) == 400
        unfinished = b"GET /v1/models HTTP/1.1\r\nx: " + b"a" * limit
        assert status_of(await answer_to(gateway, unfinished)) == 431
        long_path = b"GET /" + b"a" * limit
        assert status_of(await answer_to(gateway, long_path)) == 431
        assert (await post(gateway, "/v1/completions", COMPLETION, x="a" * (limit - 1000))).status_code == 200


async def test_a_body_over_the_limit_is_refused_before_it_is_taken_in(serve: Serve) -> None:
    limit = LimitsConfig().max_message_bytes
    async with serve(http_port=0) as gateway:
        announced = raw_request(headers=(f"content-length: {2 << 30}",))
        assert status_of(await answer_to(gateway, announced)) == 413
        chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
        endless = raw_request(headers=("transfer-encoding: chunked",)) + (limit // (1 << 20) + 1) * chunk
        assert status_of(await answer_to(gateway, endless)) == 413
        sent = await post(gateway, "/v1/completions", b" " * (limit + 1))
        assert (sent.status_code, sent.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_client_that_announces_its_body_is_refused_before_it_sends_it(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        headers = (f"content-length: {1 << 30}", "expect: 100-continue")
        assert status_of(await answer_to(gateway, raw_request(headers=headers))) == 413


async def test_many_tiny_chunks_are_one_body(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, connection(gateway) as (reader, writer):
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
        writer.write(raw_request(chunks, headers=("transfer-encoding: chunked",)))
        assert status_of(await reader.readuntil(b"\r\n")) == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"\r\n", 408),
        (b"POST /v1/compl", 408),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n", 408),
        (raw_request(headers=("content-length: 30",)), 408),
        (raw_request(headers=("content-length: 30",)) + BODY[:-1], 408),
        (raw_request(headers=("transfer-encoding: chunked",)) + b"1;" + b"x" * 999, 408),
    ],
)
async def test_what_does_not_come_in_time_is_cut_off(serve: Serve, sent: bytes, status: int | None) -> None:
    async with serve(http_port=0, header_timeout_s=0.1, body_timeout_s=0.1) as gateway:
        answer = await answer_to(gateway, sent)
        assert (status_of(answer) if answer else None) == status
        assert gateway.backend.requests == []


async def test_time_runs_for_each_request_of_a_connection(serve: Serve) -> None:
    async with (
        serve(http_port=0, header_timeout_s=1.0, body_timeout_s=1.0) as gateway,
        connection(gateway) as (reader, writer),
        asyncio.timeout(PATIENCE_S),
    ):
        for _ in range(2):
            writer.write(raw_request(BODY))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split()[1]))
            await asyncio.sleep(1.5)  # idle between requests is no fault
        writer.write(b"POST")
        assert status_of(await reader.read()) == 408


async def test_slow_senders_leave_others_alone(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        slow = [await asyncio.open_connection("127.0.0.1", gateway.http_port) for _ in range(100)]
        for index, (_, writer) in enumerate(slow):
            writer.write(b"POST /v1/" if index % 2 else raw_request(headers=("content-length: 30",)) + b"{")
        assert (await post(gateway, "/v1/completions", COMPLETION)).status_code == 200
        for _, writer in slow:
            writer.close()


async def test_connections_are_bounded(serve: Serve) -> None:
    async with serve(http_port=0, max_connections=2) as gateway:
        async with connection(gateway) as one, connection(gateway):
            one[1].write(raw_request(BODY))
            await one[0].readuntil(b"\r\n")
            answer = await answer_to(gateway)
            assert status_of(answer) == 503
            assert b"retry-after: 1" in answer
            assert b"server_is_overloaded" in answer
        async with asyncio.timeout(PATIENCE_S):
            while status_of(await answer_to(gateway, raw_request(BODY, headers=("connection: close",)))) != 200:
                await asyncio.sleep(0.01)


async def test_open_files_suffice_for_the_connections(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda which: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda which, pair: limits.append(pair))
    async with serve(http_port=0, max_connections=2048):
        assert limits[-1] == (2048 + 1024 + 512, 4096)
    with pytest.raises(ConfigError, match="need 11536 open files, and the system allows 4096"):
        async with serve(http_port=0, max_connections=10_000):
            pass


async def test_requests_that_come_at_once_are_answered_in_order_and_bounded(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        model = raw_request(method="GET", path="/v1/models/tiny")
        last = raw_request(method="GET", path="/v1/models", headers=("connection: close",))
        answer = await answer_to(gateway, model * 5 + last)
        assert answer.count(b"HTTP/1.1 200") == 6
        assert answer.endswith(b"]}")
        assert b"HTTP/1.1 400" in await answer_to(gateway, model * 100)


async def test_whole_requests_are_answered_before_what_is_none_is_refused(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        whole, model = raw_request(BODY), raw_request(method="GET", path="/v1/models/tiny")
        for requests in ((whole,), (whole, model), (model, whole, whole)):
            for rest in (b"GARBAGE\r\n\r\n", b"GARBAGE\r\n\r\n" + model, b"GET / HTTP/1.1\r\n\r\n" + whole):
                answer = await answer_to(gateway, b"".join(requests) + rest)
                assert statuses(answer) == [200] * len(requests) + [400], answer
                assert b"connection: close" in answer[answer.rindex(b"HTTP/1.1 ") :]
        assert statuses(await answer_to(gateway, model, b"GARBAGE\r\n\r\n")) == [200, 400]


BROKEN = {
    "garbage": (b"GARBAGE\r\n\r\n", 400),
    "headers too long": (b"GET /version HTTP/1.1\r\nhost: x\r\nx: %b\r\n\r\n" % (b"y" * 40_000), 431),
    "too many headers": (b"GET /version HTTP/1.1\r\n" + b"x: y\r\n" * 150, 431),
    "unknown coding": (raw_request(BODY, headers=("transfer-encoding: foo, chunked",)), 501),
    "no host": (b"GET /version HTTP/1.1\r\n\r\n", 400),
    "broken chunk": (raw_request(b"zz\r\n", headers=("transfer-encoding: chunked",)), 400),
    "slow headers": (b"GET /version HTTP/1.1\r\nhost", 408),
    "slow body": (raw_request(BODY[:-1], headers=("content-length: 30",)), 408),
}


@pytest.mark.parametrize("num_between", [0, 1])
@pytest.mark.parametrize("name", BROKEN)
async def test_no_refusal_stands_within_an_answer_that_is_being_written(
    serve: Serve, name: str, num_between: int
) -> None:
    """Whatever is wrong with the request behind it, in its headers or its body."""
    may_end = asyncio.Event()

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord("a"),)),)
        await may_end.wait()
        reason = FinishReason.LENGTH
        yield (
            EngineOutput(
                request_id=requests[0].request_id, token_ids=(ord("b"),), finish_reason=reason, timings=TIMINGS
            ),
        )

    broken, status = BROKEN[name]
    async with (
        serve(FakeBackend(script), http_port=0, header_timeout_s=0.2, body_timeout_s=0.2) as gateway,
        connection(gateway) as (reader, writer),
        asyncio.timeout(PATIENCE_S),
    ):
        writer.write(raw_request(STREAM))
        answer = await reader.readuntil(b'"text":"a"')
        writer.write(raw_request(method="GET", path="/version") * num_between + broken)
        await asyncio.sleep(1.0)  # as long as it takes to notice what is wrong
        may_end.set()
        answer += await reader.read()
    assert statuses(answer) == [200] * (1 + num_between) + [status], answer
    assert answer.index(b"data: [DONE]") < answer.rindex(b"HTTP/1.1 ")
    assert len(gateway.backend.requests) == 1


@pytest.mark.parametrize("hosts", [[], ["host: x", "host: y"]])
async def test_a_request_names_one_host(serve: Serve, hosts: list[str]) -> None:
    def asking(version: str) -> bytes:
        lines = [f"GET /v1/models HTTP/{version}", *hosts, "connection: close"]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    async with serve(http_port=0) as gateway:
        answer = await answer_to(gateway, asking("1.1"))
        assert statuses(answer) == [400] and b"needs one Host header" in answer
        assert statuses(await answer_to(gateway, asking("1.0"))) == [200]


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]


@pytest.mark.parametrize("wish", ["h2c", "websocket"])
async def test_a_wish_for_another_protocol_is_not_answered(serve: Serve, wish: str) -> None:
    headers = ("connection: upgrade, http2-settings", f"upgrade: {wish}", "http2-settings: AAEAAEAAAAIAAAABAAMAAABk")
    async with serve(http_port=0) as gateway:
        first = raw_request(BODY, headers=headers)
        last = raw_request(BODY, headers=("connection: close",))
        for parts in ((first, last), (first[:40], first[40:-9], first[-9:] + last), (first + last,)):
            answer = await answer_to(gateway, *parts)
            assert answer.count(b"HTTP/1.1 200") == 2, answer
        answer = await answer_to(gateway, first * 3 + last)
        assert statuses(answer) == [200] * 4, answer
        assert statuses(await answer_to(gateway, first * 100))[-1] == 400


async def flood(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    """More than any buffer holds."""
    while True:
        yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord("x"),) * 1000),)
        await asyncio.sleep(0)


def deaf_client(port: int | None) -> socket.socket:
    """Asks for a stream and has little room for it."""
    assert port is not None
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(raw_request(STREAM, headers=("connection: close",)))
    return sock


async def test_a_client_that_does_not_read_is_paused_then_cut_off(serve: Serve) -> None:
    num_bytes = 0

    async def counted(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        nonlocal num_bytes
        async for outputs in flood(requests):
            num_bytes += len(outputs[0].token_ids)
            yield outputs

    async with serve(FakeBackend(counted), http_port=0, slow_reader_timeout_s=0.5) as gateway:
        with deaf_client(gateway.http_port):
            await gateway.backend.started.wait()
            gateway.backend.script = for_ever
            async with client(gateway) as http:
                assert (await http.get("/healthz")).status_code == 200, "the loop is free"
            await gateway.backend.closed()
    assert num_bytes < 512 << 10, "what this process and its kernel hold, and the client's own buffer"


async def test_a_slow_client_that_reads_after_all_misses_nothing(serve: Serve) -> None:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        number = 0
        async for outputs in flood(requests):
            yield outputs
            if (number := number + 1) == 300:
                break
        yield (EngineOutput(request_id=requests[0].request_id, finish_reason=FinishReason.LENGTH),)

    async with serve(FakeBackend(script), http_port=0) as gateway:
        sock = deaf_client(gateway.http_port)
        await gateway.backend.started.wait()
        reader, writer = await asyncio.open_connection(sock=sock)
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()
        writer.close()
    assert answer.count(b"x" * 1000) == 300
    assert b"data: [DONE]" in answer


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_client_that_goes_away_ends_its_request(serve: Serve, body: bytes) -> None:
    async with serve(FakeBackend(for_ever), http_port=0) as gateway:
        async with connection(gateway) as (_, writer):
            writer.write(raw_request(body))
            await gateway.backend.started.wait()
            assert gateway.backend.num_open == 1
        await gateway.backend.closed()


async def test_every_moment_to_go_away_leaves_nothing_behind(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    request = raw_request(STREAM)
    with caplog.at_level(logging.WARNING):
        async with serve(http_port=0, max_concurrent_requests=3) as gateway:
            for num_sent in [*range(0, len(request), 7), len(request)]:
                for num_turns in range(0, 12, 3):
                    async with connection(gateway) as (_, writer):
                        writer.write(request[:num_sent])
                        for _ in range(num_turns):
                            await asyncio.sleep(0)
            await gateway.backend.closed()
            assert (await post(gateway, "/v1/completions", COMPLETION)).status_code == 200, "all permits are back"
    assert caplog.records == []


async def test_a_port_sweep_does_no_harm(serve: Serve) -> None:
    garbage: list[Any] = [
        b"\x16\x03\x01" * 99,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x80\x04\x95",
        bytes(range(256)) * 9,
    ]
    async with serve(http_port=0) as gateway:
        for data in garbage:
            assert status_of(await answer_to(gateway, data)) == 400
        assert (await post(gateway, "/v1/completions", COMPLETION)).status_code == 200
