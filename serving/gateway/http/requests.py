"""One HTTP request on its way in: its body within bounds, its deadline, and a client that may leave."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from starlette.datastructures import Headers, QueryParams
from starlette.types import Receive, Scope

from serving.contracts.errors import DeadlineExceededError, OverloadedError, ValidationError
from serving.gateway.core.call import Call
from serving.gateway.core.ticks import only_number
from serving.gateway.http.body import Body, parse
from serving.gateway.http.responses import HttpError
from serving.gateway.http.resuming import Position

T = TypeVar("T", bound=Body)

TIMEOUT_HEADER = "x-request-timeout-s"
_MAX_TIMEOUT_S = 86400.0
# The group ends a request at its deadline. This much later the gateway does, in case no group is there to do it.
_DEADLINE_MARGIN_S = 1.0
_NUM_BODIES_AT_A_TIME = 64
"""Of the largest size, as far as memory goes."""


class ClientGoneError(Exception):
    """Nobody is there to read an answer."""


@dataclass(frozen=True, slots=True)
class Request:
    """What an endpoint gets to see."""

    call: Call
    path_params: Mapping[str, str]
    query_params: QueryParams
    body: bytes = b""
    keep_alive_s: float | None = None
    """How long a stream may be silent."""
    has_event_ids: bool = False
    """Its events have ids, by which it can be resumed."""
    resumed: Position | None = None
    """Where a broken stream goes on."""

    def read(self, schema: type[T]) -> T:
        """The body. Raises ValidationError."""
        body, names = parse(schema, self.body)
        self.call.ignore(names)
        return body


class BodyReader:
    """Takes bodies in. Knows how many bytes lie in those that are not complete, and refuses more than a bound."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Raises HttpError, OverloadedError, ClientGoneError."""
        headers = Headers(scope=scope)
        # A web page can make a browser send other types anywhere, but not this one without being allowed to.
        if scope["method"] == "POST" and not _is_json(headers.getlist("content-type")):
            raise HttpError(415, "unsupported_media_type", "content-type must be application/json")
        if any(each.strip().lower() not in ("", "identity") for each in headers.getlist("content-encoding")):
            raise HttpError(415, "unsupported_encoding", "content-encoding is not supported; send the body as it is")
        if int(headers.get("content-length", 0)) > self._max_body_bytes:
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


def _is_json(values: Sequence[str]) -> bool:
    return len(values) == 1 and values[0].partition(";")[0].strip().lower() == "application/json"


def timeout_of(headers: Headers) -> float | None:
    """Seconds that the client gives the request. Raises ValidationError."""
    values = headers.getlist(TIMEOUT_HEADER)
    if not values:
        return None
    timeout_s = only_number(values)
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise ValidationError(
            TIMEOUT_HEADER, f"{TIMEOUT_HEADER} must be one number of seconds, above 0 and at most {_MAX_TIMEOUT_S:g}"
        )
    return timeout_s


@asynccontextmanager
async def deadline(timeout_s: float | None) -> AsyncIterator[None]:
    """Ends the block. Raises DeadlineExceededError then."""
    timeout = asyncio.timeout(None if timeout_s is None else timeout_s + _DEADLINE_MARGIN_S)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise DeadlineExceededError("the deadline passed before the answer was complete") from None


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
