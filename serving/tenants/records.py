"""Plans, tenants and keys as plain data, checked when made. Knows neither the database nor the wire."""

import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from serving.config import MAX_TENANT_ID_LENGTH, TENANT_ID
from serving.contracts.errors import ValidationError
from serving.tenants.keys import check_key_id, without_secrets

MAX_NAME_LENGTH = MAX_TENANT_ID_LENGTH
MAX_LABEL_LENGTH = 200
MAX_LIMIT = 10**15
MAX_SCOPED_MODELS = 64
MAX_WEIGHT = 1000.0
MIN_WEIGHT = 0.001
PRIORITIES = range(-10, 11)
MAX_UNIX_S = 253402300799.0
"""The end of the year 9999."""

LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent_requests", "token_budget")
"""Names of the four limits, as quota errors and the database call them."""

_SLUG = re.compile(TENANT_ID, re.ASCII)
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The most that a tenant, or a key, may use. None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    token_budget: int | None = None
    """Tokens in all, for good."""

    @property
    def has_rate(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def __post_init__(self) -> None:
        for name in LIMITS:
            value = getattr(self, name)
            at_least = 0 if name == "token_budget" else 1
            if value is not None and not at_least <= value <= MAX_LIMIT:
                raise ValidationError(name, f"{name} must be from {at_least} to {MAX_LIMIT}, or unset, not {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Limits):
    """Limits and share that many tenants have in common."""

    name: str
    weight: float = 1.0
    """Share of a busy group, relative to other tenants."""
    priority: int = 0
    """Lower numbers are served first."""

    def __post_init__(self) -> None:
        Limits.__post_init__(self)
        _check_slug("name", self.name)
        _check_weight(self.weight)
        _check_priority(self.priority)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant(Limits):
    """A customer. Limits, weight and priority that are not None replace the plan's."""

    id: str
    plan: str
    name: str = ""
    """For people."""
    weight: float | None = None
    priority: int | None = None
    created_unix_s: float = 0.0
    disabled_unix_s: float | None = None

    def __post_init__(self) -> None:
        Limits.__post_init__(self)
        _check_slug("id", self.id)
        _check_slug("plan", self.plan)
        _check_label("name", self.name)
        if self.weight is not None:
            _check_weight(self.weight)
        if self.priority is not None:
            _check_priority(self.priority)

    def limits_under(self, plan: Plan) -> Limits:
        """What holds: its own limits, and the plan's where it has none."""
        own = {name: getattr(self, name) for name in LIMITS}
        return Limits(**{name: getattr(plan, name) if value is None else value for name, value in own.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyGrant(Limits):
    """What a key allows, as its maker asks for it. Its limits hold besides the tenant's."""

    models: tuple[str, ...] | None = None
    """Names of the models that it may use; None for all."""
    is_admin: bool = False
    """Opens packtrain.v1.Admin."""
    label: str = ""
    """For people."""
    expires_unix_s: float | None = None

    def __post_init__(self) -> None:
        Limits.__post_init__(self)
        _check_label("label", self.label)
        if self.expires_unix_s is not None and not 0 <= self.expires_unix_s <= MAX_UNIX_S:
            raise ValidationError("expires", f"expires must be from 1970 to 9999, not UNIX time {self.expires_unix_s}")
        if self.models is None:
            return
        if not (self.models or self.is_admin):
            raise ValidationError("models", "models is empty: a key must allow a model, all models, or administration")
        if len(self.models) > MAX_SCOPED_MODELS:
            raise ValidationError("models", f"models must be at most {MAX_SCOPED_MODELS} names, not {len(self.models)}")
        for model in self.models:
            if len(model) > 2 * MAX_NAME_LENGTH or not _MODEL.fullmatch(model):
                raise ValidationError("models", f"models must be names of models, not {_shown(model)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Key(KeyGrant):
    """A key as it is kept: everything but the key."""

    id: str
    tenant_id: str
    quota_id: str
    """Key that spent totals are counted under: itself, or the first of the chain that it was rotated from."""
    created_unix_s: float
    revoked_unix_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedKey:
    """A new key. This is the only time that it is seen."""

    key: Key
    text: str = field(repr=False)
    """What the client sends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageFilter:
    """Which usage records are meant. What is empty or None does not narrow them."""

    tenant_id: str = ""
    key_id: str = ""
    model: str = ""
    since_unix_s: float | None = None
    """Started then or later."""
    until_unix_s: float | None = None
    """Started before."""

    def __post_init__(self) -> None:
        check_key_id("key_id", self.key_id)
        for name in ("tenant_id", "key_id", "model"):
            if "\0" in getattr(self, name):
                raise ValidationError(name, f"{name} must have no NUL character in it")
        since, until = self.since_unix_s, self.until_unix_s
        for name, moment in (("since", since), ("until", until)):
            if moment is not None and not 0 <= moment <= MAX_UNIX_S:
                raise ValidationError(name, f"{name} must be from 1970 to 9999, not UNIX time {moment}")
        if since is not None and until is not None and since >= until:
            raise ValidationError(
                "until", f"until must be after since, which is {iso_time(since)}, not {iso_time(until)}"
            )


def iso_time(unix_s: float) -> str:
    """ISO 8601 in UTC, the second in which it lies."""
    return datetime.fromtimestamp(math.floor(unix_s), UTC).isoformat(timespec="seconds")


def _shown(text: str) -> str:
    """For an error."""
    return repr(without_secrets(text)[:MAX_NAME_LENGTH])


def _check_slug(name: str, value: str) -> None:
    if len(value) > MAX_NAME_LENGTH or not _SLUG.fullmatch(value):
        raise ValidationError(
            name,
            f"{name} must be 1 to {MAX_NAME_LENGTH} lower-case letters, digits and inner hyphens, not {_shown(value)}",
        )


def _check_label(name: str, value: str) -> None:
    if len(value) > MAX_LABEL_LENGTH or not value.isprintable():
        raise ValidationError(
            name, f"{name} must be at most {MAX_LABEL_LENGTH} printable characters, not {_shown(value)}"
        )


def _check_weight(value: float) -> None:
    if not MIN_WEIGHT <= value <= MAX_WEIGHT:
        raise ValidationError("weight", f"weight must be from {MIN_WEIGHT} to {MAX_WEIGHT}, not {value}")


def _check_priority(value: int) -> None:
    if value not in PRIORITIES:
        raise ValidationError("priority", f"priority must be from {PRIORITIES[0]} to {PRIORITIES[-1]}, not {value}")
