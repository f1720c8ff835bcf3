"""The status-code contract: how every exception is answered, on gRPC and on HTTP (in OpenAI's form).

Our exceptions carry their status (`serving.contracts.errors`). The engine's RequestError is looked up by its kind. Every other
exception is our own fault: it is answered as an internal error, and its text is not shown.
"""

import random
from dataclasses import dataclass

from model_parallel.errors import RequestError
from serving.contracts.errors import (
    ADAPTER_FAILED,
    INTERNAL,
    INVALID_REQUEST,
    OVERLOADED,
    ServingError,
    Status,
    StoreUnavailableError,
)

_OF_REQUEST_ERROR = {
    "invalid": INVALID_REQUEST,
    "overloaded": OVERLOADED,
    "numerical_error": Status(
        code="INTERNAL",
        http_status=500,
        reason="NUMERICAL_ERROR",
        error_type="server_error",
        error_code="numerical_error",
    ),
    "constraint_error": Status(
        code="INVALID_ARGUMENT", http_status=400, reason="CONSTRAINT_ERROR", error_code="constraint_error"
    ),
    "adapter_failed": ADAPTER_FAILED,
}
"""By the kind of a RequestError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorResponse:
    """One error as a client gets it."""

    status: Status
    message: str
    field: str = ""
    """The field that is wrong, by its path."""
    quota: str = ""
    """The quota that is used up."""
    retry_after_s: float | None = None
    """None when trying again does not help."""
    engine: str = ""
    """Id of the group that the error comes from."""
    max_tokens: int | None = None
    """The most output tokens that there is room for, where more were asked for."""


def error_response(error: Exception, retry_delay_s: float) -> ErrorResponse:
    """The answer to a request that raised `error`. `retry_delay_s` is told where nobody knows better."""
    match error:
        case StoreUnavailableError():
            status, message = error.status, "the database cannot be reached now; the log says why"
        case ServingError() if error.answered_by() is not INTERNAL:
            status, message = error.answered_by(), str(error)
        case RequestError() if error.kind in _OF_REQUEST_ERROR:
            status, message = _OF_REQUEST_ERROR[error.kind], str(error)
        case _:
            status, message = INTERNAL, "internal error; it was logged under the request id"
    retry_after_s = error.retry_after_s if isinstance(error, ServingError | RequestError) else None
    if status.is_retryable:
        # Clients that are refused together must not come back together.
        retry_after_s = (retry_after_s or retry_delay_s) * random.uniform(1.0, 1.5)
    return ErrorResponse(
        status=status,
        message=message,
        field=error.field if isinstance(error, ServingError) else "",
        quota=error.quota if isinstance(error, ServingError) else "",
        retry_after_s=retry_after_s,
        engine=error.engine if isinstance(error, ServingError) else "",
        max_tokens=error.max_tokens if isinstance(error, ServingError) else None,
    )
