"""Every exception that ends a request, with the status that answers it on gRPC and on HTTP (in OpenAI's form).

ServingError
├── ValidationError            a field is wrong
├── UnknownModelError          no served model has this name
├── UnauthenticatedError       no key, or not a valid one
├── PermissionDeniedError      the key does not allow this
├── QuotaExceededError         the tenant or the key has used up a limit
├── AccountsUnavailableError   keys, quotas or usage records cannot be reached now
├── OverloadedError            as many requests are open as are allowed
├── DrainingError              the gateway stops
├── GroupRefusedError          a replica group has not accepted the request
├── GroupUnavailableError      no live replica group, or the one that ran the request is lost
│   ├── GroupSilentError       the one that was asked does not answer
│   ├── GroupCallLostError     the one that was asked was lost before it answered
│   └── GroupDrainingError     the ones that were asked take nothing new, and will be replaced
├── PoisonedRequestError       every group that ran the request was lost
├── CannotResumeError          a broken stream cannot be gone on with
├── DeadlineExceededError      the client's deadline passed
├── CancelledInGroupError      the group cancelled the request, and this gateway did not ask for it
├── SlowReaderError            the client does not read its answer
├── ChangeError                what is served cannot be changed so, or not now
└── TenancyError
    ├── NotFoundError          no plan, tenant or key of that name
    ├── AlreadyExistsError     the name is taken
    └── StoreUnavailableError  the database cannot be reached now

The engine's own errors (`model_parallel.errors.RequestError`) get their status in `serving.gateway.core.error_responses`.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """One answer, in both forms."""

    code: str
    """Name of the gRPC status code."""
    http_status: int
    reason: str
    """A stable label, for google.rpc.ErrorInfo, logs and metrics."""
    error_type: str = "invalid_request_error"
    error_code: str | None = None
    """`type` and `code` of OpenAI's error object."""
    is_retryable: bool = False
    """Trying again can help."""


def _unavailable(reason: str) -> Status:
    return Status(
        code="UNAVAILABLE",
        http_status=503,
        reason=reason,
        error_type="service_unavailable_error",
        error_code="service_unavailable",
        is_retryable=True,
    )


INVALID_REQUEST = Status(code="INVALID_ARGUMENT", http_status=400, reason="INVALID_REQUEST")
CONTEXT_LENGTH_EXCEEDED = Status(
    code="INVALID_ARGUMENT", http_status=400, reason="CONTEXT_LENGTH_EXCEEDED", error_code="context_length_exceeded"
)
INTERNAL = Status(
    code="INTERNAL", http_status=500, reason="INTERNAL", error_type="server_error", error_code="internal_error"
)
ADAPTER_FAILED = Status(
    code="FAILED_PRECONDITION",
    http_status=500,
    reason="ADAPTER_FAILED",
    error_type="server_error",
    error_code="adapter_failed",
)
"""The files of the request's adapter cannot be used any more."""
OVERLOADED = Status(
    code="RESOURCE_EXHAUSTED",
    http_status=503,
    reason="OVERLOADED",
    error_type="service_unavailable_error",
    error_code="server_is_overloaded",
    is_retryable=True,
)


class ServingError(Exception):
    """A request that cannot be answered. The message is fit for the client to read."""

    status: ClassVar[Status]
    field: str = ""
    """The field that is wrong, by its path."""
    quota: str = ""
    """The quota that is used up."""
    retry_after_s: float | None = None
    """When to try again, where that is known."""
    engine: str = ""
    """Id of the group that the error comes from."""
    max_tokens: int | None = None
    """The most output tokens that there is room for, where more were asked for."""

    def answered_by(self) -> Status:
        """The status of this one error; the class's own unless the error says more."""
        return self.status


class ValidationError(ServingError, ValueError):
    """A request that can never be served. `field` is the one to correct, "" when the request has no readable fields."""

    status = INVALID_REQUEST

    def __init__(self, field: str, message: str, *, is_too_long: bool = False, max_tokens: int | None = None) -> None:
        """`is_too_long` when prompt and answer do not fit the model; `max_tokens` is then what does."""
        super().__init__(message)
        self.field = field
        self.is_too_long = is_too_long
        self.max_tokens = max_tokens

    def answered_by(self) -> Status:
        return CONTEXT_LENGTH_EXCEEDED if self.is_too_long else self.status


class UnknownModelError(ServingError, LookupError):
    """No served model has this name."""

    status = Status(code="NOT_FOUND", http_status=404, reason="MODEL_NOT_FOUND", error_code="model_not_found")
    field = "model"


class UnauthenticatedError(ServingError):
    """No key, a wrong, expired or revoked one, or more than one. Says the same in every case."""

    status = Status(code="UNAUTHENTICATED", http_status=401, reason="UNAUTHENTICATED", error_code="invalid_api_key")


class PermissionDeniedError(ServingError):
    """The key is valid and does not allow this."""

    status = Status(
        code="PERMISSION_DENIED", http_status=403, reason="PERMISSION_DENIED", error_code="permission_denied"
    )


class QuotaExceededError(ServingError):
    """The tenant, or the key, has used up what it may."""

    status = Status(
        code="RESOURCE_EXHAUSTED",
        http_status=429,
        reason="QUOTA",
        error_type="rate_limit_exceeded",
        error_code="rate_limit_exceeded",
    )
    _BUDGET_SPENT: ClassVar[Status] = Status(
        code="RESOURCE_EXHAUSTED",
        http_status=429,
        reason="QUOTA",
        error_type="insufficient_quota",
        error_code="insufficient_quota",
    )

    def __init__(self, message: str, *, quota: str, retry_after_s: float | None) -> None:
        """`quota` is a stable label such as "tokens_per_minute"; `retry_after_s` is None when waiting does not help."""
        super().__init__(message)
        self.quota = quota
        self.retry_after_s = retry_after_s

    def answered_by(self) -> Status:
        return self._BUDGET_SPENT if self.retry_after_s is None else self.status


class AccountsUnavailableError(ServingError):
    """Nobody can tell now what the sender may still use, or keep what it has used."""

    status = _unavailable("NO_ACCOUNTS")


class OverloadedError(ServingError):
    """As many requests are open as are allowed."""

    status = OVERLOADED


class DrainingError(ServingError):
    """The gateway is stopping."""

    status = _unavailable("DRAINING")


class GroupUnavailableError(ServingError):
    """No live replica group, or the one that ran the request is lost."""

    status = _unavailable("NO_GROUP")

    def __init__(self, message: str, *, may_have_run: bool = True) -> None:
        """Without `may_have_run`, the group has said that it has not begun; another one may."""
        super().__init__(message)
        self.may_have_run = may_have_run


class PoisonedRequestError(ServingError):
    """As many groups as are allowed were lost while they ran the request, the last one while it ran nothing else."""

    status = Status(
        code="INTERNAL",
        http_status=500,
        reason="REQUEST_POISONED",
        error_type="server_error",
        error_code="request_poisoned",
    )


class CannotResumeError(ServingError):
    """The rest of a broken stream cannot be made any more: its token has expired, or the model is another one by now."""

    status = Status(
        code="FAILED_PRECONDITION",
        http_status=412,
        reason="CANNOT_RESUME",
        error_code="cannot_resume",
    )

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class GroupSilentError(GroupUnavailableError):
    """The replica group that was asked to run the request does not answer. Another one may."""


class GroupCallLostError(GroupUnavailableError):
    """The leader that the request was sent to has died. Nothing of it was delivered, and another group may run it; whether it had
    begun is not known."""


class GroupDrainingError(GroupUnavailableError):
    """The replica groups that were asked take nothing new, because they are to be replaced. Others will be there."""

    def __init__(self, message: str) -> None:
        super().__init__(message, may_have_run=False)


class GroupRefusedError(ServingError):
    """A replica group has not accepted the request."""

    status = OVERLOADED

    def __init__(self, message: str, *, kind: str, engine: str = "", retry_after_s: float | None = None) -> None:
        """`kind` as in `model_parallel.errors.RequestError`; `engine` is the id of the group, "" when all refused."""
        super().__init__(message)
        self.kind = kind
        self.engine = engine
        self.retry_after_s = retry_after_s

    def answered_by(self) -> Status:
        known = {"overloaded": OVERLOADED, "invalid": INVALID_REQUEST, "adapter_failed": ADAPTER_FAILED}
        return known.get(self.kind, INTERNAL)


class DeadlineExceededError(ServingError):
    """The client's deadline passed first."""

    status = Status(
        code="DEADLINE_EXCEEDED",
        http_status=504,
        reason="DEADLINE",
        error_type="timeout_error",
        error_code="deadline_exceeded",
    )


class CancelledInGroupError(ServingError):
    """The replica group was told to cancel the request by someone other than this gateway."""

    status = Status(
        code="CANCELLED", http_status=499, reason="CANCELLED", error_type="server_error", error_code="cancelled"
    )


class SlowReaderError(ServingError):
    """The client does not read its answer."""

    status = Status(
        code="RESOURCE_EXHAUSTED",
        http_status=408,
        reason="SLOW_READER",
        error_type="timeout_error",
        error_code="slow_reader",
    )


class ChangeError(ServingError):
    """What is served cannot be changed in this way, or not now. What was served before still is."""

    status = Status(code="FAILED_PRECONDITION", http_status=409, reason="CHANGE_FAILED", error_code="change_failed")


class TenancyError(ServingError):
    """What was asked for cannot be done."""


class NotFoundError(TenancyError):
    """There is no such plan, tenant or key."""

    status = Status(code="NOT_FOUND", http_status=404, reason="NOT_FOUND", error_code="not_found")


class AlreadyExistsError(TenancyError):
    """There is one of that name."""

    status = Status(code="ALREADY_EXISTS", http_status=409, reason="ALREADY_EXISTS", error_code="already_exists")


class StoreUnavailableError(TenancyError):
    """The database cannot be reached now. The message is for operators: clients are told less."""

    status = _unavailable("NO_DATABASE")
