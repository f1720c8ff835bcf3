"""What HTTP tests share: clients of a gateway, one that speaks HTTP and one that only has a socket."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Running

JSON = {"content-type": "application/json"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tiny", "prompt": "hi"}


@asynccontextmanager
async def client(gateway: Running, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of the gateway, which waits as long as a test may."""
    url = f"http://127.0.0.1:{gateway.http_port}"
    # Without `verify` a client does not read the system's certificates, which takes longer than most tests.
    async with httpx2.AsyncClient(**{"base_url": url, "timeout": PATIENCE_S, "verify": False, **options}) as http:
        yield http


async def post(gateway: Running, path: str, body: Any, **headers: str) -> httpx2.Response:
    """One request; a body that is not bytes becomes JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client(gateway) as http:
        return await http.post(path, content=content, headers=JSON | headers)


def events(response: httpx2.Response) -> list[Any]:
    """Of a stream that ended as it should; errors among them."""
    assert response.headers["content-type"] == "text/event-stream"
    *parts, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def raw_request(
    body: bytes = b"", *, method: str = "POST", path: str = "/v1/completions", headers: tuple[str, ...] = ()
) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def connection(gateway: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer_to(gateway: Running, *parts: bytes) -> bytes:
    """Everything that comes back until the gateway closes the connection."""
    async with connection(gateway) as (reader, writer), asyncio.timeout(PATIENCE_S):
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0)
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""
