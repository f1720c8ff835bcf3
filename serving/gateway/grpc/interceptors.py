"""Around every unary-request method: an id, a permit, and the one place where exceptions become status codes."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, descriptor_pool, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from serving.contracts.accounts import OPEN, Accounts, Principal
from serving.contracts.errors import SlowReaderError, ValidationError
from serving.contracts.observer import UNOBSERVED, Observe, RequestObserver, unobserved
from serving.gateway.core.admission import Admission
from serving.gateway.core.call import trace_headers
from serving.gateway.core.error_responses import ErrorResponse, error_response
from serving.gateway.grpc.convert import explain_undecodable, unknown_fields_of
from serving.observability.log import request_id

logger = logging.getLogger(__name__)

principal: ContextVar[Principal] = ContextVar("principal", default=OPEN)
"""Who sent the request that the current task handles."""
observer: ContextVar[RequestObserver] = ContextVar("observer", default=UNOBSERVED)
"""Is told what happens to it."""
ignored: ContextVar[tuple[str, ...]] = ContextVar("ignored", default=())
"""Fields of the request that this server does not know."""

_ERROR_DOMAIN = "packtrain"


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request that protobuf refused. Raised later: grpc answers INTERNAL when a deserialiser raises."""

    data: bytes


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Handlers behind it raise; clients see status codes. Methods of `admitted_service` need a permit, and all but those of
    `open_service` need credentials."""

    def __init__(
        self,
        admission: Admission,
        accounts: Accounts,
        *,
        admitted_service: str,
        open_service: str,
        retry_delay_s: float,
        slow_reader_timeout_s: float,
        is_strict: bool = False,
        observe: Observe = unobserved,
    ) -> None:
        self._observe = observe
        self._admission = admission
        self._accounts = accounts
        self._admitted_prefix = f"/{admitted_service}/"
        self._open_prefix = f"/{open_service}/"
        self._retry_delay_s = retry_delay_s
        self._slow_reader_timeout_s = slow_reader_timeout_s
        self._is_strict = is_strict

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler
        if handler.request_streaming:  # reflection, which answers its errors in its own messages
            stream = self._bidirectional(method, handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )
        make, answer = (
            (grpc.unary_stream_rpc_method_handler, self._stream(method, handler.unary_stream))
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, self._unary(method, handler.unary_unary))
        )
        return make(answer, _never_raising(handler.request_deserializer), handler.response_serializer)

    def _unary(self, method: str, behaviour: Any) -> Callable[..., Any]:
        async def answer(request: Message | _Undecodable, context: Any) -> Any:
            async with self._guard(method, context):
                return await behaviour(self._readable(method, request), context)

        return answer

    def _stream(self, method: str, behaviour: Any) -> Callable[..., Any]:
        async def answer(request: Message | _Undecodable, context: Any) -> None:
            async with self._guard(method, context):
                responses = behaviour(self._readable(method, request), context)
                if not hasattr(responses, "__aiter__"):  # health's Watch writes for itself
                    await responses
                    return
                async with aclosing(responses):  # so that a client that leaves ends the work at once
                    async for response in responses:
                        await self._write(context, response)

        return answer

    async def _write(self, context: Any, response: Any) -> None:
        """Waits while the client does not read and the connection holds as much as it may."""
        timeout_s = self._slow_reader_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await context.write(response)
        except TimeoutError:
            raise SlowReaderError(f"the answer was left unread for {timeout_s:g} s") from None

    def _bidirectional(self, method: str, behaviour: Any) -> Callable[..., Any]:
        async def answer(requests: Any, context: Any) -> None:
            async with self._guard(method, context):
                async for response in behaviour(requests, context):
                    await context.write(response)

        return answer

    def _readable(self, method: str, request: Message | _Undecodable) -> Message:
        if isinstance(request, _Undecodable):
            found = descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", "."))
            raise explain_undecodable(found.input_type, request.data)
        names = unknown_fields_of(request)
        if names and (self._is_strict or getattr(request, "strict", False)):
            why = "" if self._is_strict else ", and the request is strict"
            raise ValidationError(names[0], f"{names[0]} is not a field that this server knows{why}")
        ignored.set(tuple(names))
        observer.get().ignored(len(names))
        return request

    @asynccontextmanager
    async def _guard(self, method: str, context: Any) -> AsyncIterator[None]:
        request_id.set(uuid.uuid4().hex)
        metadata = context.invocation_metadata() or ()
        is_admitted = method.startswith(self._admitted_prefix)
        with self._watch(method, metadata) if is_admitted else UNOBSERVED as watching:
            observer.set(watching)
            try:
                if not method.startswith(self._open_prefix):
                    credentials = [str(value) for key, value in metadata if key == "authorization"]
                    principal.set(self._accounts.authenticate(credentials))
                    watching.authenticated(principal.get())
                with self._admission.permit() if is_admitted else nullcontext():
                    yield
            except grpc.aio.AbortError:
                raise
            except asyncio.CancelledError:
                if context.time_remaining() == 0:
                    watching.ended(grpc.StatusCode.DEADLINE_EXCEEDED.name)
                raise
            except Exception as error:
                if isinstance(error, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
                    # From the code that is generated for a method which nobody has written.
                    watching.failed(grpc.StatusCode.UNIMPLEMENTED.name, "UNIMPLEMENTED")
                    await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not implemented by this server")
                response = error_response(error, self._retry_delay_s)
                if response.status.code == "INTERNAL":
                    logger.exception("request %s (%s) failed", request_id.get(), method)
                watching.failed(
                    response.status.code, response.status.reason, quota=response.quota, engine=response.engine
                )
                await context.abort(grpc.StatusCode[response.status.code], response.message, _trailers(response))

    def _watch(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> RequestObserver:
        return self._observe("grpc", method, request_id.get(), trace_headers(metadata))


def _trailers(response: ErrorResponse) -> tuple[tuple[str, str | bytes], ...]:
    room = {} if response.max_tokens is None else {"max_tokens": str(response.max_tokens)}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=response.status.reason, domain=_ERROR_DOMAIN, metadata=room),
        error_details_pb2.RequestInfo(request_id=request_id.get()),
    ]
    if response.status.code == "INVALID_ARGUMENT":
        violation = error_details_pb2.BadRequest.FieldViolation(field=response.field, description=response.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if response.quota:
        quota = error_details_pb2.QuotaFailure.Violation(subject=response.quota, description=response.message)
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    pushback_ms = -1
    if response.retry_after_s is not None:
        pushback_ms = max(1, round(1000 * response.retry_after_s))
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(pushback_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=grpc.StatusCode[response.status.code].value[0], message=response.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    metadata = rpc_status.to_status(status).trailing_metadata
    return (*metadata, ("grpc-retry-pushback-ms", str(pushback_ms)))


def _never_raising(deserialise: Any) -> Callable[[bytes], Message | _Undecodable]:
    def decode(data: bytes) -> Message | _Undecodable:
        try:
            message: Message = deserialise(data)
            return message
        except DecodeError:
            return _Undecodable(data)

    return decode
