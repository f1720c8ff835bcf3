"""What goes back over HTTP: JSON, server-sent events, and errors in OpenAI's form, as Starlette's responses."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.contracts.accounts import RateLimits
from serving.contracts.errors import Status
from serving.gateway.core.error_responses import ErrorResponse
from serving.gateway.core.ticks import with_ticks
from serving.gateway.http.objects import Error, ErrorAnswer

HeaderList = Sequence[tuple[str, str]]

to_json = msgspec.json.Encoder().encode
NUM_EVENTS = "packtrain.num_events"
"""In the scope of a stream: a function that tells how many events it has had."""
DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"

_LINGER_S = 1.0
_JSON = "application/json"
_EVENT_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}


class HttpError(Exception):
    """A request that is wrong as HTTP. gRPC answers these by itself."""

    def __init__(self, status: int, code: str, message: str, headers: HeaderList = ()) -> None:
        super().__init__(message)
        grpc_code = {404: "UNIMPLEMENTED", 413: "RESOURCE_EXHAUSTED"}.get(status, "INVALID_ARGUMENT")
        self.response = ErrorResponse(
            status=Status(code=grpc_code, http_status=status, reason=code.upper(), error_code=code), message=message
        )
        self.headers = headers


def json_answer(content: msgspec.Struct | dict[str, Any], status: int = 200, headers: HeaderList = ()) -> Response:
    """A whole answer."""
    return Response(to_json(content), status, dict(headers), _JSON)


class EventStream(Response):
    """Server-sent events. The status line waits for the first, so what goes wrong before has a status of its own.

    Not Starlette's StreamingResponse: that sends the status line first, and watches for a client that leaves with two more
    tasks, where `cancelled_with_client` watches from before the first event on.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: HeaderList = (),
        *,
        num_events: Callable[[], int],
        keep_alive_s: float | None = None,
        end: bytes = DONE,
    ) -> None:
        """With `keep_alive_s` there is a comment after every silence of that length. The first sends the status line too."""
        self._events = events
        self._num_events = num_events
        self._keep_alive_s = keep_alive_s
        self._end = end
        self.status_code = 200
        self.init_headers(_EVENT_HEADERS | dict(headers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All of it. Raises what making the events raises."""
        scope[NUM_EVENTS] = self._num_events
        parts: AsyncGenerator[bytes | None, None] = self._events
        if self._keep_alive_s is not None:
            parts = with_ticks(self._events, self._keep_alive_s)
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        has_begun = False
        async with aclosing(parts):
            async for part in parts:
                if not has_begun:
                    await send(start)
                    has_begun = True
                body = _KEEP_ALIVE if part is None else part
                await send({"type": "http.response.body", "body": body, "more_body": True})
        if not has_begun:  # of a resumed stream whose client had all but the end
            await send(start)
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


def event(data: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


class LastResponse(Response):
    """Closes the connection of a client that may still be sending. Closing at once would reset the connection, and the answer
    would be lost."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads on for a while before the end."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_answer(error: ErrorResponse, headers: HeaderList = ()) -> Response:
    """The error as a whole answer."""
    more, status = dict(headers), error.status.http_status
    if error.retry_after_s is not None:
        more["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if status == 401:
        more["www-authenticate"] = "Bearer"
    if error.status.reason == "DRAINING" or status == 413:
        more["connection"] = "close"  # after a drain the next try finds another gateway
    kind = LastResponse if status == 413 else Response
    return kind(to_json(_error_object(error)), status, more, _JSON)


def error_event(error: ErrorResponse) -> bytes:
    """The error as the end of a stream that has begun."""
    return event(_error_object(error)) + DONE


def _error_object(error: ErrorResponse) -> ErrorAnswer:
    status = error.status
    return ErrorAnswer(
        Error(message=error.message, type=status.error_type, param=error.field or None, code=status.error_code)
    )


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
