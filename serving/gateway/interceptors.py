"""Around every unary-request method: an id, a permit, and the one place where exceptions become status codes."""

import logging
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, descriptor_pool, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from model_parallel.errors import RequestError
from serving.gateway.admission import Admission, DrainingError, OverloadedError
from serving.gateway.backend import GroupUnavailableError
from serving.gateway.convert import explain_undecodable, refuse_unknown_fields
from serving.gateway.generation import CancelledInGroupError, DeadlineExceededError
from serving.gateway.validate import UnknownModelError, ValidationError

logger = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id")
"""Of the RPC that the current task handles. Made by the server; unique."""

_ERROR_DOMAIN = "packtrain"


@dataclass(frozen=True, slots=True)
class Refusal:
    """How an exception is answered. `reason` is a stable label, for google.rpc.ErrorInfo."""

    code: grpc.StatusCode
    reason: str
    message: str
    retry: bool = False


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request that protobuf refused. Raised later: grpc answers INTERNAL when a deserialiser raises."""

    data: bytes


def refusal_for(error: Exception) -> Refusal:
    """The status-code contract. What is not known here is our own fault, and says nothing about itself."""
    code = grpc.StatusCode
    match error:
        case ValidationError() | RequestError(kind="invalid"):
            return Refusal(code.INVALID_ARGUMENT, "INVALID_REQUEST", str(error))
        case UnknownModelError():
            return Refusal(code.NOT_FOUND, "MODEL_NOT_FOUND", str(error))
        case OverloadedError() | RequestError(kind="overloaded"):
            return Refusal(code.RESOURCE_EXHAUSTED, "OVERLOADED", str(error), retry=True)
        case DrainingError() | RequestError(kind="draining"):
            return Refusal(code.UNAVAILABLE, "DRAINING", str(error), retry=True)
        case GroupUnavailableError():
            return Refusal(code.UNAVAILABLE, "NO_GROUP", str(error), retry=True)
        case DeadlineExceededError():
            return Refusal(code.DEADLINE_EXCEEDED, "DEADLINE", str(error))
        case CancelledInGroupError():
            return Refusal(code.CANCELLED, "CANCELLED", str(error))
        case RequestError(kind="numerical_error"):
            return Refusal(code.INTERNAL, "NUMERICAL_ERROR", str(error))
        case _:
            return Refusal(code.INTERNAL, "INTERNAL", "internal error; it was logged under the request id")


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Handlers behind it raise; clients see status codes. Methods of `admitted_service` need a permit."""

    def __init__(self, admission: Admission, *, admitted_service: str, retry_delay_s: float) -> None:
        self._admission = admission
        self._admitted_prefix = f"/{admitted_service}/"
        self._retry_delay_s = retry_delay_s
        self._random = random.Random()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the method's handler. Reflection, which streams requests, answers its errors in its own messages."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        method = handler_call_details.method
        make, answer = (
            (grpc.unary_stream_rpc_method_handler, self._stream(method, handler.unary_stream))
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, self._unary(method, handler.unary_unary))
        )
        return make(answer, _never_raising(handler.request_deserializer), handler.response_serializer)

    def _unary(self, method: str, behaviour: Any) -> Callable[..., Any]:
        async def answer(request: Message | _Undecodable, context: Any) -> Any:
            async with self._guard(method, context):
                return await behaviour(_readable(method, request), context)

        return answer

    def _stream(self, method: str, behaviour: Any) -> Callable[..., Any]:
        async def answer(request: Message | _Undecodable, context: Any) -> None:
            async with self._guard(method, context):
                responses = behaviour(_readable(method, request), context)
                if not hasattr(responses, "__aiter__"):  # health's Watch writes for itself
                    await responses
                    return
                async with aclosing(responses):  # so that a client that leaves ends the work at once
                    async for response in responses:
                        await context.write(response)

        return answer

    @asynccontextmanager
    async def _guard(self, method: str, context: Any) -> AsyncIterator[None]:
        request_id.set(uuid.uuid4().hex)
        try:
            with self._admission.permit() if method.startswith(self._admitted_prefix) else nullcontext():
                yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            refusal = refusal_for(error)
            if refusal.code is grpc.StatusCode.INTERNAL:
                logger.exception("request %s (%s) failed", request_id.get(), method)
            field = error.field if isinstance(error, ValidationError) else ""
            trailers = self._trailers(refusal, field)
            await context.abort(refusal.code, refusal.message, trailers)

    def _trailers(self, refusal: Refusal, field: str) -> tuple[tuple[str, str | bytes], ...]:
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=refusal.reason, domain=_ERROR_DOMAIN),
            error_details_pb2.RequestInfo(request_id=request_id.get()),
        ]
        if refusal.code is grpc.StatusCode.INVALID_ARGUMENT:
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=refusal.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        pushback_ms = -1
        if refusal.retry:
            # Spread, so that clients refused together do not come back together.
            pushback_ms = round(1000 * self._retry_delay_s * self._random.uniform(1.0, 1.5))
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(pushback_ms)
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message)
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


def _readable(method: str, request: Message | _Undecodable) -> Message:
    if isinstance(request, _Undecodable):
        found = descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", "."))
        raise explain_undecodable(found.input_type, request.data)
    refuse_unknown_fields(request)
    return request
