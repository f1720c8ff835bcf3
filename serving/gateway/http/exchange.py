"""One HTTP request and its answer on the wire: what ASGI gives, and what goes back."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import msgspec

from serving.contracts.accounts import RateLimits
from serving.contracts.errors import OverloadedError, Status
from serving.gateway.core.call import Call
from serving.gateway.core.error_responses import ErrorResponse
from serving.gateway.http.objects import Error, ErrorAnswer

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = Sequence[tuple[str, str]]

to_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"

_LINGER_S = 1.0
_NUM_BODIES_AT_A_TIME = 64
"""Of the largest size, as far as memory goes."""


class ClientGoneError(Exception):
    """Nobody is there to read an answer."""


class HttpError(Exception):
    """A request that is wrong as HTTP. gRPC answers these by itself."""

    def __init__(self, status: int, code: str, message: str, headers: HeaderList = ()) -> None:
        super().__init__(message)
        grpc_code = {404: "UNIMPLEMENTED", 413: "RESOURCE_EXHAUSTED"}.get(status, "INVALID_ARGUMENT")
        self.response = ErrorResponse(
            status=Status(code=grpc_code, http_status=status, reason=code.upper(), error_code=code), message=message
        )
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Request:
    """What an endpoint gets to see."""

    call: Call
    path: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `content` becomes JSON, unless it is bytes."""

    content: msgspec.Struct | dict[str, Any] | bytes
    status: int = 200
    headers: HeaderList = ()
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class EventStream:
    """Server-sent events. The status line waits for the first, so what goes wrong before has a status of its own."""

    events: AsyncGenerator[bytes, None]
    headers: HeaderList = ()


def event(data: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


def headers_of(scope: Scope, name: str) -> list[str]:
    """Values of all headers of that name."""
    wanted = name.encode()
    return [value.decode("latin-1") for key, value in scope["headers"] if key == wanted]


class BodyReader:
    """Takes bodies in. Knows how many bytes lie in those that are not complete, and refuses more than a bound."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Raises HttpError, OverloadedError, ClientGoneError."""
        # A web page can make a browser send other types anywhere, but not this one without being allowed to.
        if scope["method"] == "POST" and not _is_json(headers_of(scope, "content-type")):
            raise HttpError(415, "unsupported_media_type", "content-type must be application/json")
        if [value for value in headers_of(scope, "content-encoding") if value != "identity"]:
            raise HttpError(415, "unsupported_encoding", "content-encoding is not supported; send the body as it is")
        declared = headers_of(scope, "content-length")
        if declared and int(declared[0]) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message["body"]
                self._num_bytes += len(part)
                body += part
                if len(body) > self._max_body_bytes:
                    raise self._too_large()
                if self._num_bytes > _NUM_BODIES_AT_A_TIME * self._max_body_bytes:
                    raise OverloadedError("too many large bodies are on their way in")
                if not message.get("more_body", False):
                    return bytes(body)
        finally:
            self._num_bytes -= len(body)

    def _too_large(self) -> HttpError:
        return HttpError(413, "body_too_large", f"the body is larger than {self._max_body_bytes} bytes")


def rate_limit_headers(limits: RateLimits) -> HeaderList:
    """As OpenAI names and writes them."""
    headers = []
    for name, rate in (("requests", limits.requests), ("tokens", limits.tokens)):
        if rate is not None:
            headers += [
                (f"x-ratelimit-limit-{name}", str(rate.limit)),
                (f"x-ratelimit-remaining-{name}", str(rate.remaining)),
                (f"x-ratelimit-reset-{name}", _duration(rate.reset_s)),
            ]
    return headers


def _duration(seconds: float) -> str:
    """Rounded up: "0s", "12ms", "7.5s", "1m0s"."""
    ms = max(0, math.ceil(seconds * 1000))
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{ms / 1000:g}s"


class Responder:
    """Sends one answer, or one error, or an error in the middle of a stream."""

    def __init__(self, receive: Receive, send: Send, headers: HeaderList) -> None:
        self._receive = receive
        self._send = send
        self._headers = headers
        self._is_streaming = False
        self.more_headers: Callable[[], HeaderList] = tuple
        """Called when the answer begins: they are of that moment."""

    async def send(self, answer: Answer | EventStream) -> None:
        """All of it. Raises what making the events raises."""
        if isinstance(answer, Answer):
            content = answer.content if isinstance(answer.content, bytes) else to_json(answer.content)
            await self._send_whole(answer.status, content, answer.media_type, answer.headers)
            return
        async with aclosing(answer.events) as events:
            first = await anext(events)
            media = [("content-type", "text/event-stream"), ("cache-control", "no-store"), ("x-accel-buffering", "no")]
            await self._start(200, [*media, *answer.headers])
            self._is_streaming = True
            await self._send_part(first)
            async for part in events:
                await self._send_part(part)
        await self._send_part(DONE, is_last=True)

    async def send_error(self, response: ErrorResponse, headers: HeaderList = ()) -> None:
        """The error in OpenAI's form: as the answer, or as the last event of a stream that has begun."""
        error = Error(
            message=response.message,
            type=response.status.error_type,
            param=response.field or None,
            code=response.status.error_code,
        )
        if self._is_streaming:
            await self._send_part(event(ErrorAnswer(error)) + DONE, is_last=True)
            return
        more = [*headers]
        if response.retry_after_s is not None:
            more.append(("retry-after", str(max(1, math.ceil(response.retry_after_s)))))
        if response.status.http_status == 401:
            more.append(("www-authenticate", "Bearer"))
        if response.status.reason == "DRAINING":
            more.append(("connection", "close"))  # the next try then finds another gateway
        await self._send_whole(
            response.status.http_status, to_json(ErrorAnswer(error)), "application/json", more,
            linger=response.status.http_status == 413,
        )  # fmt: skip

    async def _send_whole(
        self, status: int, content: bytes, media_type: str, headers: HeaderList, *, linger: bool = False
    ) -> None:
        length = ("content-length", str(len(content)))
        close = [("connection", "close")] if linger else []
        await self._start(status, [("content-type", media_type), length, *headers, *close])
        if linger:
            # Closing while the client still sends would reset the connection, and the answer would be lost.
            await self._send_part(content)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_S):
                    while (await self._receive()).get("more_body", False):
                        pass
            content = b""
        await self._send_part(content, is_last=True)

    async def _start(self, status: int, headers: HeaderList) -> None:
        every = [*headers, *self._headers, *self.more_headers(), ("date", formatdate(usegmt=True))]
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in every]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _send_part(self, part: bytes, *, is_last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": not is_last})


@asynccontextmanager
async def cancelled_with_client(receive: Receive) -> AsyncIterator[None]:
    """Ends the block when the client goes away. Raises ClientGoneError then. The body must have been read."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a request belongs to a task")
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientGoneError from None
    finally:
        watcher.cancel()


def _is_json(values: Sequence[str]) -> bool:
    return len(values) == 1 and values[0].partition(";")[0].strip().lower() == "application/json"
