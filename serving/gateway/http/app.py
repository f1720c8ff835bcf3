"""Around every HTTP request: an id, an observer, credentials, a permit, and the one place where exceptions become answers."""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from serving.contracts.accounts import OPEN, Accounts
from serving.contracts.errors import DeadlineExceededError, ValidationError
from serving.contracts.observer import UNOBSERVED, Observe, RequestObserver, unobserved
from serving.gateway.core.admission import Admission
from serving.gateway.core.call import Call, printable_label
from serving.gateway.core.error_responses import error_response
from serving.gateway.core.generation import Generator
from serving.gateway.core.health import HealthMonitor
from serving.gateway.http.endpoints import METERED_PATHS, MODELS, OPEN_PATHS, PATHS, Endpoint, Endpoints
from serving.gateway.http.exchange import (
    BodyReader,
    ClientGoneError,
    HttpError,
    Receive,
    Request,
    Responder,
    Scope,
    Send,
    cancelled_with_client,
    headers_of,
    rate_limit_headers,
)
from serving.observability.log import request_id

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-request-timeout-s"
_MAX_TIMEOUT_S = 86400.0
_TRACE_HEADERS = ("traceparent", "tracestate")
# The group ends a request at its deadline. This much later the gateway does, in case no group is there to do it.
_DEADLINE_MARGIN_S = 1.0


class HttpFrontEnd:
    """The ASGI application."""

    def __init__(
        self,
        generator: Generator,
        accounts: Accounts,
        admission: Admission,
        health: HealthMonitor,
        *,
        max_body_bytes: int,
        retry_delay_s: float,
        observe: Observe = unobserved,
    ) -> None:
        self._observe = observe
        self._generator = generator
        self._accounts = accounts
        self._admission = admission
        self._routes = Endpoints(generator, health).routes
        self._bodies = BodyReader(max_body_bytes)
        self._retry_delay_s = retry_delay_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request_id.set(uuid.uuid4().hex)
        headers = [("x-request-id", request_id.get())]
        if labels := headers_of(scope, "x-client-request-id") or headers_of(scope, "x-request-id"):
            headers.append(("x-client-request-id", printable_label(labels[0])))
        responder = Responder(receive, send, headers)
        with self._watch(scope) as watching:
            try:
                await self._answer(scope, receive, responder, watching)
            except ClientGoneError:
                watching.ended(grpc.StatusCode.CANCELLED.name)
            except Exception as error:
                of_http = error if isinstance(error, HttpError) else None
                response = of_http.response if of_http else error_response(error, self._retry_delay_s)
                if response.status.code == "INTERNAL":
                    logger.exception("request %s (%s) failed", request_id.get(), _known_path(scope))
                watching.failed(
                    response.status.code, response.status.reason, quota=response.quota, engine=response.engine
                )
                await responder.send_error(response, of_http.headers if of_http else ())

    def _watch(self, scope: Scope) -> RequestObserver:
        if scope["path"] in OPEN_PATHS:
            return UNOBSERVED
        headers = {name: values[0] for name in _TRACE_HEADERS if (values := headers_of(scope, name))}
        return self._observe("http", _known_path(scope), request_id.get(), headers)

    async def _answer(self, scope: Scope, receive: Receive, responder: Responder, watching: RequestObserver) -> None:
        arrived_s = self._generator.clock()
        path: str = scope["path"]
        is_open = path in OPEN_PATHS
        principal = OPEN if is_open else self._accounts.authenticate(headers_of(scope, "authorization"))
        endpoint = self._endpoint(path, scope["method"])
        timeout_s = None if is_open else _timeout_s(headers_of(scope, TIMEOUT_HEADER))
        call = Call(
            request_id=request_id.get(),
            arrived_s=arrived_s,
            timeout_s=timeout_s,
            principal=principal,
            observer=watching,
        )
        if is_open:
            await responder.send(await endpoint(Request(call, path, b"")))
            return
        watching.authenticated(principal)
        if path in METERED_PATHS:
            responder.more_headers = lambda: rate_limit_headers(self._accounts.rate_limits(principal))
        body = await self._bodies.read(scope, receive)
        async with cancelled_with_client(receive), _deadline(timeout_s):
            with self._admission.permit():
                await responder.send(await endpoint(Request(call, path, body)))

    def _endpoint(self, path: str, method: str) -> Endpoint:
        methods = self._routes.get(_route(path))
        if methods is None:
            raise HttpError(404, "unknown_url", "there is no such path; see /openapi.json")
        endpoint = methods.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            allowed = ", ".join(methods)
            headers = [("allow", allowed)]
            raise HttpError(405, "method_not_allowed", f"this path takes {allowed} and no other method", headers)
        return endpoint


def _route(path: str) -> str:
    return MODELS if path.startswith(MODELS) else path


def _known_path(scope: Scope) -> str:
    """For metrics and logs, in which nothing of a client's own making may stand."""
    path = _route(scope["path"])
    return path if path in PATHS else "other"


def _timeout_s(values: list[str]) -> float | None:
    if not values:
        return None
    try:
        timeout_s = float(values[0]) if len(values) == 1 else math.nan
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise ValidationError(
            TIMEOUT_HEADER, f"{TIMEOUT_HEADER} must be one number of seconds, above 0 and at most {_MAX_TIMEOUT_S:g}"
        )
    return timeout_s


@asynccontextmanager
async def _deadline(timeout_s: float | None) -> AsyncIterator[None]:
    timeout = asyncio.timeout(None if timeout_s is None else timeout_s + _DEADLINE_MARGIN_S)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise DeadlineExceededError("the deadline passed before the answer was complete") from None
