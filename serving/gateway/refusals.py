"""The status-code contract: how every exception is answered, on gRPC and on HTTP (in OpenAI's form)."""

import random
from dataclasses import dataclass

import grpc

from model_parallel.errors import RequestError
from serving.gateway.accounts import (
    AccountsUnavailableError,
    PermissionDeniedError,
    QuotaExceededError,
    UnauthenticatedError,
)
from serving.gateway.admission import DrainingError, OverloadedError
from serving.gateway.backend import GroupUnavailableError
from serving.gateway.call import CancelledInGroupError, DeadlineExceededError, SlowReaderError
from serving.gateway.validate import UnknownModelError, ValidationError
from serving.tenants.records import AlreadyExistsError, NotFoundError, StoreUnavailableError


@dataclass(frozen=True, slots=True)
class Refusal:
    """One answer, in both forms."""

    code: grpc.StatusCode
    http_status: int
    reason: str
    """A stable label, for google.rpc.ErrorInfo, logs and metrics."""
    error_type: str
    error_code: str | None
    """`type` and `code` of OpenAI's error object."""
    message: str
    field: str = ""
    """The field that is wrong, by its path."""
    quota: str = ""
    """The quota that is used up."""
    max_tokens: int | None = None
    """Most output tokens that there is room for, where more were asked for."""
    retry_after_s: float | None = None
    """None when trying again does not help."""


def refusal_for(error: Exception, retry_delay_s: float) -> Refusal:
    """What is not known here is our own fault, and says nothing about itself. `retry_delay_s` holds where nobody knows better."""
    code, text = grpc.StatusCode, str(error)
    match error:
        case ValidationError():
            reason, error_code = ("CONTEXT_LENGTH_EXCEEDED", "context_length_exceeded") if error.is_too_long else (
                "INVALID_REQUEST", None
            )  # fmt: skip
            return Refusal(
                code.INVALID_ARGUMENT, 400, reason, "invalid_request_error", error_code, text, error.field,
                max_tokens=error.room,
            )  # fmt: skip
        case RequestError(kind="invalid"):
            return Refusal(code.INVALID_ARGUMENT, 400, "INVALID_REQUEST", "invalid_request_error", None, text)
        case UnauthenticatedError():
            return Refusal(
                code.UNAUTHENTICATED, 401, "UNAUTHENTICATED", "invalid_request_error", "invalid_api_key", text
            )
        case PermissionDeniedError():
            return Refusal(
                code.PERMISSION_DENIED, 403, "PERMISSION_DENIED", "invalid_request_error", "permission_denied", text
            )
        case UnknownModelError():
            return Refusal(
                code.NOT_FOUND, 404, "MODEL_NOT_FOUND", "invalid_request_error", "model_not_found", text, "model"
            )
        case QuotaExceededError():
            kind = "insufficient_quota" if error.retry_after_s is None else "rate_limit_exceeded"
            return Refusal(
                code.RESOURCE_EXHAUSTED, 429, "QUOTA", kind, kind, text,
                quota=error.quota, retry_after_s=error.retry_after_s,
            )  # fmt: skip
        case OverloadedError() | RequestError(kind="overloaded"):
            delay_s = _spread(getattr(error, "retry_after_s", None) or retry_delay_s)
            return Refusal(
                code.RESOURCE_EXHAUSTED, 503, "OVERLOADED", "service_unavailable_error", "server_is_overloaded", text,
                retry_after_s=delay_s,
            )  # fmt: skip
        case DrainingError() | RequestError(kind="draining"):
            return _unavailable("DRAINING", text, retry_delay_s)
        case GroupUnavailableError():
            return _unavailable("NO_GROUP", text, retry_delay_s)
        case AccountsUnavailableError():
            return _unavailable("NO_ACCOUNTS", text, retry_delay_s)
        case NotFoundError():
            return Refusal(code.NOT_FOUND, 404, "NOT_FOUND", "invalid_request_error", "not_found", text)
        case AlreadyExistsError():
            return Refusal(code.ALREADY_EXISTS, 409, "ALREADY_EXISTS", "invalid_request_error", "already_exists", text)
        case StoreUnavailableError():
            return _unavailable("NO_DATABASE", "the database cannot be asked now; the log says why", retry_delay_s)
        case DeadlineExceededError():
            return Refusal(code.DEADLINE_EXCEEDED, 504, "DEADLINE", "timeout_error", "deadline_exceeded", text)
        case SlowReaderError():
            return Refusal(code.RESOURCE_EXHAUSTED, 408, "SLOW_READER", "timeout_error", "slow_reader", text)
        case CancelledInGroupError():
            return Refusal(code.CANCELLED, 499, "CANCELLED", "server_error", "cancelled", text)
        case RequestError(kind="numerical_error"):
            return Refusal(code.INTERNAL, 500, "NUMERICAL_ERROR", "server_error", "numerical_error", text)
        case _:
            text = "internal error; it was logged under the request id"
            return Refusal(code.INTERNAL, 500, "INTERNAL", "server_error", "internal_error", text)


def _unavailable(reason: str, text: str, retry_delay_s: float) -> Refusal:
    return Refusal(
        grpc.StatusCode.UNAVAILABLE, 503, reason, "service_unavailable_error", "service_unavailable", text,
        retry_after_s=_spread(retry_delay_s),
    )  # fmt: skip


def _spread(delay_s: float) -> float:
    """Clients that are refused together must not come back together."""
    return delay_s * random.uniform(1.0, 1.5)
