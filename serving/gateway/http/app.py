"""Around every HTTP request: an id, an observer, credentials, a permit, and the one place where exceptions become answers."""

import logging
import uuid
from collections.abc import Callable, Sequence
from email.utils import formatdate
from functools import partial

import grpc
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.contracts.accounts import Accounts, Principal
from serving.contracts.observer import UNOBSERVED, Observe, RequestObserver, unobserved
from serving.gateway.core.admission import Admission
from serving.gateway.core.call import Call, printable_label, trace_headers
from serving.gateway.core.error_responses import ErrorResponse, error_response
from serving.gateway.core.fields import IGNORED_HEADER, ignored_header
from serving.gateway.core.generation import Generator
from serving.gateway.core.health import HealthMonitor
from serving.gateway.core.ticks import KEEP_ALIVE_HEADER, keep_alive_of
from serving.gateway.http.endpoints import METERED_PATHS, MODELS, OPEN_PATHS, PATHS, RESPONSES, Endpoints, Handler
from serving.gateway.http.requests import (
    BodyReader,
    ClientGoneError,
    Request,
    cancelled_with_client,
    deadline,
    timeout_of,
)
from serving.gateway.http.responses import (
    NUM_EVENTS,
    HeaderList,
    HttpError,
    error_answer,
    error_event,
    rate_limit_headers,
)
from serving.gateway.http.responses_form import response_error_event
from serving.gateway.http.resuming import LAST_EVENT_HEADER, RESUMABLE_HEADER, position_of, resumable_of
from serving.observability.log import request_id

logger = logging.getLogger(__name__)

_EXPOSED_HEADERS = [
    "x-request-id", "x-client-request-id", "x-seed", IGNORED_HEADER, "retry-after",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
]  # fmt: skip
_CALL = "packtrain.call"
"""Where in a request's scope its Call is."""


class HttpFrontEnd:
    """The ASGI application: Starlette's router, behind what holds for every path."""

    def __init__(
        self,
        generator: Generator,
        accounts: Accounts,
        admission: Admission,
        health: HealthMonitor,
        *,
        max_body_bytes: int,
        retry_delay_s: float,
        keep_alive_s: float | None = None,
        observe: Observe = unobserved,
    ) -> None:
        self._observe = observe
        self._clock = generator.clock
        self._accounts = accounts
        self._retry_delay_s = retry_delay_s
        bodies = BodyReader(max_body_bytes)
        self._router = Router(
            [
                Route(
                    MODELS + "{model:path}" if path == MODELS else path,
                    _Open(handler) if path in OPEN_PATHS else _Admitted(handler, admission, bodies, keep_alive_s),
                    methods=methods,
                )
                for path, methods, handler in Endpoints(generator, health).routes
            ],
            redirect_slashes=False,
            default=_no_such_path,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"]
        if len(path) > 1 and path.endswith("/") and not path.endswith("//"):
            scope["path"] = path[:-1]  # a redirect would lose some clients' bodies
        request_id.set(uuid.uuid4().hex)
        headers = Headers(scope=scope)
        answer = _Answer(send, headers)
        scope["app"] = self  # so that the router raises what it would else answer by itself
        with self._watch(scope["path"], headers) as watching:
            try:
                scope[_CALL] = self._call(scope["path"], headers, answer, watching)
                await self._router(scope, receive, answer.send)
            except ClientGoneError:
                watching.ended(grpc.StatusCode.CANCELLED.name)
            except Exception as error:
                wrong = _wrong_method(error) if isinstance(error, HTTPException) else error
                of_http = wrong if isinstance(wrong, HttpError) else None
                response = of_http.response if of_http else error_response(wrong, self._retry_delay_s)
                if response.status.code == "INTERNAL":
                    logger.exception("request %s (%s) failed", request_id.get(), _known_path(scope["path"]))
                watching.failed(
                    response.status.code, response.status.reason, quota=response.quota, engine=response.engine
                )
                await answer.send_error(response, of_http.headers if of_http else (), scope, receive)

    def _watch(self, path: str, headers: Headers) -> RequestObserver:
        if path in OPEN_PATHS:
            return UNOBSERVED
        return self._observe("http", _known_path(path), request_id.get(), trace_headers(headers.items()))

    def _call(self, path: str, headers: Headers, answer: "_Answer", watching: RequestObserver) -> Call:
        """Raises UnauthenticatedError, ValidationError."""
        arrived_s = self._clock()
        if path in OPEN_PATHS:
            return Call(request_id=request_id.get(), arrived_s=arrived_s, timeout_s=None)
        principal = self._accounts.authenticate(headers.getlist("authorization"))
        watching.authenticated(principal)
        if path in METERED_PATHS:
            answer.limits_of(self._accounts, principal)
        return Call(
            request_id=request_id.get(),
            arrived_s=arrived_s,
            timeout_s=timeout_of(headers),
            principal=principal,
            observer=watching,
        )


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let web pages of these origins use `app` from browsers. Keys are theirs to send; cookies are not looked at."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=_EXPOSED_HEADERS,
    )


class _Open:
    """A path that needs nothing and costs nothing."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope[_CALL], scope["path_params"], QueryParams()))
        await response(scope, receive, send)


class _Admitted:
    """Any other path: its body is read, it needs a permit, and it ends with its deadline or its client."""

    def __init__(self, handler: Handler, admission: Admission, bodies: BodyReader, keep_alive_s: float | None) -> None:
        self._handler = handler
        self._admission = admission
        self._bodies = bodies
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope[_CALL]
        headers = Headers(scope=scope)
        resumed = position_of(headers.getlist(LAST_EVENT_HEADER))
        request = Request(
            call,
            scope["path_params"],
            QueryParams(scope["query_string"]),
            await self._bodies.read(scope, receive),
            keep_alive_of(headers.getlist(KEEP_ALIVE_HEADER), self._keep_alive_s),
            has_event_ids=resumable_of(headers.getlist(RESUMABLE_HEADER)) or resumed is not None,
            resumed=resumed,
        )
        async with cancelled_with_client(receive), deadline(call.timeout_s):
            with self._admission.permit():
                response = await self._handler(request)
                await response(scope, receive, partial(_send_with_ignored, send, call))


async def _send_with_ignored(send: Send, call: Call, message: Message) -> None:
    """Of a stream it is known only when it begins."""
    if message["type"] == "http.response.start" and call.ignored:
        message["headers"] = [*message["headers"], (IGNORED_HEADER.encode(), ignored_header(call.ignored).encode())]
    await send(message)


class _Answer:
    """The way back: adds the headers that every answer has, and knows whether one has begun."""

    def __init__(self, send: Send, request_headers: Headers) -> None:
        self._send = send
        self._label = request_headers.get("x-client-request-id") or request_headers.get("x-request-id")
        self._limits: Callable[[], HeaderList] = tuple
        self.has_begun = False

    def limits_of(self, accounts: Accounts, principal: Principal) -> None:
        """Tell what is left of the sender's rates when the answer begins."""
        self._limits = lambda: rate_limit_headers(accounts.rate_limits(principal))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = [("x-request-id", request_id.get()), *self._limits(), ("date", formatdate(usegmt=True))]
            if self._label:
                headers.append(("x-client-request-id", printable_label(self._label)))
            message["headers"] += [(name.encode(), value.encode("latin-1")) for name, value in headers]
        await self._send(message)

    async def send_error(self, error: ErrorResponse, headers: HeaderList, scope: Scope, receive: Receive) -> None:
        """As the answer, or as the last event of a stream that has begun."""
        if self.has_begun:
            is_numbered = scope["path"] == RESPONSES and NUM_EVENTS in scope
            body = response_error_event(error, scope[NUM_EVENTS]()) if is_numbered else error_event(error)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            await error_answer(error, headers)(scope, receive, self.send)


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise HttpError(404, "unknown_url", "there is no such path; see /openapi.json")


def _wrong_method(error: HTTPException) -> HttpError:
    """The router raises nothing else."""
    allowed = ", ".join(sorted(set((error.headers or {})["Allow"].split(", ")) - {"HEAD"}))
    message = f"this path takes {allowed} and no other method"
    return HttpError(405, "method_not_allowed", message, [("allow", allowed)])


def _known_path(path: str) -> str:
    """For metrics and logs, in which nothing of a client's own making may stand."""
    path = MODELS if path.startswith(MODELS) else path
    return path if path in PATHS else "other"
