"""Between packtrain.v1.Admin's messages and records. The rules about values are the records' own."""

import base64
import binascii
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from protos import admin_pb2 as pb
from serving.contracts.accounts import UsageRecord
from serving.contracts.errors import ValidationError
from serving.contracts.models import AdapterCard
from serving.contracts.operations import ModelStatus, Progress
from serving.tenants.records import LIMITS, MAX_UNIX_S, Key, KeyGrant, Plan, Tenant, UsageFilter

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_SHARE = ("weight", "priority")
_NANOS = 10**9
_MICROS = 10**6
# What FieldMasks may name: all but what identifies the record, and what the server sets.
_PLAN_FIELDS = (*_SHARE, *LIMITS)
_TENANT_FIELDS = ("name", "plan", *_SHARE, *LIMITS)

_Position = TypeVar("_Position", bound=tuple[Any, ...])


@contextmanager
def within(message: str, *own: str) -> Iterator[None]:
    """Wrong fields of a record are named by their path in the request, under `message`; those in `own` are beside it."""
    try:
        yield
    except ValidationError as error:
        field = error.field if error.field in own else f"{message}.{error.field}"
        raise ValidationError(field, str(error)) from error


def plan(message: pb.Plan) -> Plan:
    """Raises ValidationError."""
    return Plan(name=message.name, **_set_fields(message, (*_SHARE, *LIMITS)))


def plan_changes(message: pb.Plan, mask: FieldMask) -> dict[str, Any]:
    """The masked fields, with the defaults of those that are unset."""
    changes = _masked(message, mask, _PLAN_FIELDS)
    defaults = {field.name: field.default for field in fields(Plan)}
    return {name: defaults[name] if value is None else value for name, value in changes.items()}


def plan_message(record: Plan) -> pb.Plan:
    """A plan on the wire."""
    return pb.Plan(**{field.name: getattr(record, field.name) for field in fields(record)})


def tenant(message: pb.Tenant) -> Tenant:
    """Raises ValidationError, also for what the server sets."""
    for field in ("created", "disabled"):
        if message.HasField(field):
            raise ValidationError(field, f"{field} is set by the server, and must be left out")
    return Tenant(id=message.id, name=message.name, plan=message.plan, **_set_fields(message, (*_SHARE, *LIMITS)))


def tenant_changes(message: pb.Tenant, mask: FieldMask) -> dict[str, Any]:
    """The masked fields; None for those that go back to the plan's."""
    return _masked(message, mask, _TENANT_FIELDS)


def tenant_message(record: Tenant) -> pb.Tenant:
    """A tenant on the wire."""
    return pb.Tenant(
        **{name: getattr(record, name) for name in ("id", *_TENANT_FIELDS)},
        created=_timestamp(record.created_unix_s),
        disabled=_timestamp(record.disabled_unix_s),
    )


def key_grant(message: pb.KeyGrant) -> KeyGrant:
    """Raises ValidationError."""
    return KeyGrant(
        label=message.label,
        models=None if message.all_models else tuple(message.only_models.names),
        is_admin=message.admin,
        expires_unix_s=_unix_s(message, "expires"),
        **_set_fields(message, LIMITS),
    )


def new_adapter(message: pb.Adapter) -> tuple[str, str, str, tuple[str, ...] | None]:
    """Name, model, source and tenants. Raises ValidationError for what the server sets."""
    for field in ("rank", "num_bytes", "digest", "is_configured"):
        if getattr(message, field):
            raise ValidationError(field, f"{field} is set by the server, and must be left out")
    tenants = tuple(message.tenants.ids) if message.HasField("tenants") else None
    return message.name, message.model, message.source, tenants


def adapter_message(card: AdapterCard) -> pb.Adapter:
    """An adapter on the wire."""
    return pb.Adapter(
        name=card.name,
        model=card.parent,
        source=card.ref.path,
        tenants=None if card.tenants is None else pb.TenantIds(ids=card.tenants),
        rank=card.rank,
        num_bytes=card.num_bytes,
        digest=card.ref.digest,
        is_configured=card.is_configured,
    )


def key_message(record: Key) -> pb.Key:
    """A key on the wire: all that is kept of it but its hash."""
    grant = pb.KeyGrant(
        label=record.label,
        admin=record.is_admin,
        expires=_timestamp(record.expires_unix_s),
        **{name: getattr(record, name) for name in LIMITS},
    )
    if record.models is None:
        grant.all_models = True
    else:
        grant.only_models.CopyFrom(pb.ModelNames(names=record.models))
    return pb.Key(
        id=record.id,
        tenant_id=record.tenant_id,
        grant=grant,
        quota_id=record.quota_id,
        created=_timestamp(record.created_unix_s),
        revoked=_timestamp(record.revoked_unix_s),
    )


def usage_filter(message: pb.ListUsageRequest) -> UsageFilter:
    """Raises ValidationError."""
    return UsageFilter(
        tenant_id=message.tenant_id,
        key_id=message.key_id,
        model=message.model,
        since_unix_s=_unix_s(message, "since"),
        until_unix_s=_unix_s(message, "until"),
    )


def usage_message(record: UsageRecord) -> pb.UsageRecord:
    """A usage record on the wire."""
    return pb.UsageRecord(
        request_id=record.request_id,
        tenant_id=record.tenant_id,
        key_id=record.key_id,
        model=record.model,
        prompt_tokens=record.num_prompt_tokens,
        cached_tokens=record.num_cached_tokens,
        completion_tokens=record.num_completion_tokens,
        outcome=record.outcome,
        started=_timestamp(record.started_unix_s),
        gateway_s=record.gateway_s,
        queue_s=record.queue_s,
        prefill_s=record.prefill_s,
        decode_s=record.decode_s,
        total_s=record.total_s,
    )


def model_message(status: ModelStatus) -> pb.DeployedModel:
    """A served model on the wire."""
    return pb.DeployedModel(
        name=status.name,
        state=status.state,
        num_groups=status.num_groups,
        num_running_groups=status.num_running,
        config=status.config,
        change=status.change,
    )


def progress_message(progress: Progress) -> pb.ChangeProgress:
    """A change's progress on the wire."""
    return pb.ChangeProgress(
        stage=progress.stage, text=progress.text, num_done=progress.num_done, num_total=progress.num_total
    )


def max_unavailable(number: int) -> int:
    """Groups that may be away at a time. Raises ValidationError."""
    if number < 0:
        raise ValidationError("max_unavailable", f"max_unavailable must be 1 or more, or 0 for 1, not {number}")
    return number or 1


def group_numbers(message: pb.ScaleModelRequest) -> dict[str, int | None]:
    """By name; None for those that are unset."""
    names = ("num_groups", "min_groups", "max_groups")
    return {name: getattr(message, name) if message.HasField(name) else None for name in names}


def duration_s(message: Duration) -> float:
    """Seconds."""
    return message.seconds + message.nanos / _NANOS


def page_size(message: pb.ListTenantsRequest | pb.ListKeysRequest | pb.ListUsageRequest) -> int:
    """Raises ValidationError."""
    if not 0 <= message.page_size <= MAX_PAGE_SIZE:
        raise ValidationError(
            "page_size",
            f"page_size must be from 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, not {message.page_size}",
        )
    return message.page_size or DEFAULT_PAGE_SIZE


def page_token(position: tuple[Any, ...]) -> str:
    """Stands for the position of the last item of a page."""
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode()


def position(token: str, kind: type[_Position]) -> _Position | None:
    """Of the item after which a page begins; None for the first page. Raises ValidationError."""
    if not token:
        return None
    try:
        found: _Position = msgspec.json.decode(base64.b64decode(token, altchars=b"-_", validate=True), type=kind)
        if any(
            isinstance(part, str) and "\0" in part for part in found
        ):  # which no id has, and PostgreSQL does not take
            raise ValueError("a NUL character")
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise ValidationError(
            "page_token", "page_token must be the next_page_token of an answer to this call"
        ) from error
    return found


def _set_fields(message: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _masked(message: Any, mask: FieldMask, allowed: Sequence[str]) -> dict[str, Any]:
    if not mask.paths:
        raise ValidationError("update_mask", f"update_mask must name what to change, of {', '.join(allowed)}")
    for path in mask.paths:
        if path not in allowed:
            raise ValidationError("update_mask", f"update_mask may name {', '.join(allowed)}, not {path[:64]!r}")
    given = {field.name for field, _ in message.ListFields()}
    optional = {field.name for field in message.DESCRIPTOR.fields if field.has_presence}
    return {path: None if path in optional - given else getattr(message, path) for path in mask.paths}


def _timestamp(unix_s: float | None) -> Timestamp | None:
    """The last microsecond that is not after it, as `_unix_s` reads it: what began then is found from its own time on."""
    if unix_s is None:
        return None
    microseconds = round(unix_s * _MICROS)
    if microseconds / _MICROS > unix_s:
        microseconds -= 1
    timestamp = Timestamp()
    timestamp.FromMicroseconds(microseconds)
    return timestamp


def _unix_s(message: Any, field: str) -> float | None:
    if not message.HasField(field):
        return None
    timestamp: Timestamp = getattr(message, field)
    if not (0 <= timestamp.seconds <= MAX_UNIX_S and 0 <= timestamp.nanos < _NANOS):
        raise ValidationError(
            field, f"{field} must be a time from 1970 to 9999, not {timestamp.seconds} s {timestamp.nanos} ns"
        )
    return (timestamp.seconds * _NANOS + timestamp.nanos) / _NANOS  # rounded once
