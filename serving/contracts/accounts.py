"""Who sends a request, what they may still use, and what they used. Front ends and the Generator know these names alone.

`serving/tenants/` implements them with keys, quotas and a ledger; `OpenAccounts` is a gateway without tenants.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from serving.contracts.errors import PermissionDeniedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """The tenant and key that a request came with."""

    tenant_id: str
    key_id: str = ""
    """Public name of the key; never the key."""
    models: frozenset[str] | None = None
    """Names of the models that it may use; None for all."""
    is_admin: bool = False
    weight: float = 1.0
    """Share of a busy group that the tenant gets, relative to the others."""
    priority: int = 0
    """Classes of lower numbers are served first."""
    cache_salt: bytes = field(default=b"", repr=False)
    """Prefix-cache blocks are shared between requests of equal salt only, so it is a tenant's own."""

    def check_model(self, model: str) -> None:
        """Raises PermissionDeniedError."""
        if self.models is not None and model not in self.models:
            raise PermissionDeniedError(f"this key does not allow the model {model!r}")


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one request used. There is exactly one for each request that was admitted."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    num_prompt_tokens: int
    """0 when no group took the request."""
    num_cached_tokens: int
    num_completion_tokens: int
    outcome: str
    """"stop" or "length", or why there is no whole answer: "cancelled", "deadline", "rejected", "unavailable", "error"."""
    started_unix_s: float
    gateway_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimit:
    """A limit per minute, and what is left of it."""

    limit: int
    remaining: int
    reset_s: float
    """Until all of it can be used again, if nothing more is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimits:
    """None of what has no limit."""

    requests: RateLimit | None = None
    tokens: RateLimit | None = None


class Reservation(Protocol):
    """Tokens set aside for one request."""

    def settle(self, record: UsageRecord) -> None:
        """Charge what was used, give the rest back, and have the record kept. Called exactly once; never waits."""
        ...

    async def recorded(self) -> None:
        """Wait until the record is durable. Raises AccountsUnavailableError when that takes too long."""
        ...


class Accounts(Protocol):
    """What a gateway asks of keys, quotas and metering."""

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        """The sender, from the values of all `authorization` headers. Makes no remote call. Raises UnauthenticatedError."""
        ...

    async def reserve(
        self, principal: Principal, *, request_id: str, model: str, num_tokens: int, billed_id: str = ""
    ) -> Reservation:
        """Set aside the most that a request can use; of one that goes on with the stream of another, `billed_id`, what no record
        of that has counted. Raises QuotaExceededError, AccountsUnavailableError."""
        ...

    def rate_limits(self, principal: Principal) -> RateLimits:
        """What is left now of the sender's rates, for its information. Makes no remote call."""
        ...


OPEN = Principal(tenant_id="default")


class OpenAccounts:
    """Everybody is one tenant without limits, and nothing is kept. Whatever credentials come are not looked at."""

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        return OPEN

    async def reserve(
        self, principal: Principal, *, request_id: str, model: str, num_tokens: int, billed_id: str = ""
    ) -> Reservation:
        return _Unlimited()

    def rate_limits(self, principal: Principal) -> RateLimits:
        return RateLimits()


class _Unlimited:
    def settle(self, record: UsageRecord) -> None:
        pass

    async def recorded(self) -> None:
        pass
