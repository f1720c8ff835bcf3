"""A client's name for its request is echoed and means nothing: no two requests meet, whatever they are called."""

import asyncio
import socket

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, say
from protos import inference_pb2 as pb
from tests.support.effort import by_day
from tests.support.waiting import PATIENCE_S
from tests.unit.observability.conftest import Watch, Watched
from tests.unit.observability.test_canary import everything_logged

REQUEST = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))


async def ask(gateway: Watched, label: str) -> str:
    """The id that the server made. The answer must be the whole one, and the label come back as it is."""
    call = gateway.stub.Generate(REQUEST, metadata=(("x-request-id", label),))
    answer = await call
    assert answer.choices[0].text == "Paris"
    assert dict(await call.initial_metadata())["x-request-id"] == label[:128]
    request_id: str = answer.request.request_id
    return request_id


async def test_hundreds_of_requests_of_one_name_are_hundreds(watched: Watch) -> None:
    number = by_day(150, by_night=500)
    async with watched(FakeBackend(say("Paris")), max_concurrent_requests=1000) as gateway:
        victim = await ask(gateway, "mine")
        ids = await asyncio.gather(*(ask(gateway, victim) for _ in range(number)))
        ids += await asyncio.gather(*(ask(gateway, "mine") for _ in range(number)))
    assert len({victim, *ids}) == 2 * number + 1


async def test_a_label_without_end_is_refused_and_nothing_breaks(watched: Watch) -> None:
    async with watched(FakeBackend(say("Paris"))) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(gateway, "x" * (1 << 20))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await ask(gateway, "next")


def by_hand(port: int | None, label: bytes) -> bytes:
    body = b'{"model": "tiny", "prompt": "hi"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(head + b"content-length: %d\r\nx-request-id: %s\r\n\r\n%s" % (len(body), label, body))
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    "label",
    [b"evil\x1b[2J\x9b31m", b"a\r\nset-cookie: stolen=1", b"a\r\n\r\nHTTP/1.1 200 OK", b"\xff\xfe", b"x" * 4000],
)
async def test_a_hostile_label_reaches_neither_headers_nor_logs(watched: Watch, label: bytes) -> None:
    with everything_logged() as log:
        async with watched(FakeBackend(say("Paris")), http_port=0) as gateway:
            answer = await asyncio.to_thread(by_hand, gateway.http_port, label)
            await gateway.idle()
    head, _, _ = answer.partition(b"\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"set-cookie" not in head.lower()
    assert all(byte in b"\r\n" or 0x20 <= byte < 0x7F for byte in head)
    assert max(map(len, head.split(b"\r\n"))) < 300
    assert not any(character in "\x1b\x9b" for character in log.getvalue()) and "stolen" not in log.getvalue()
