"""Every operation on plans, tenants, keys and usage records, each one transaction.

Any process that can reach the database may use it: the server, and the command line, whether a server runs or not.
"""

import hmac
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

from sqlalchemy import URL, select, update
from sqlalchemy.orm import Session

from model_parallel.directories import cache_directory
from serving.config import TenancyConfig
from serving.contracts.accounts import UsageRecord
from serving.contracts.errors import AlreadyExistsError, NotFoundError, ValidationError
from serving.tenants.directory import KeyEntry, Snapshot, TenantEntry
from serving.tenants.keys import check_key_id, new_key, without_secrets
from serving.tenants.records import (
    LIMITS,
    MAX_UNIX_S,
    IssuedKey,
    Key,
    KeyGrant,
    Limits,
    Plan,
    Tenant,
    UsageFilter,
    iso_time,
)
from serving.tenants.store.database import Database
from serving.tenants.store.schema import Base, DeploymentRow, KeyRow, PlanRow, TenantRow
from serving.tenants.store.usage import Position, list_usage

PLAN_FIELDS = ("weight", "priority", *LIMITS)
"""What `update_plan` changes."""
TENANT_FIELDS = ("name", "plan", "weight", "priority", *LIMITS)
"""What `update_tenant` changes."""

MAX_OVERLAP_S = 365 * 86400
"""Of an old key and the one in its place."""

_EXPIRED_KEPT_S = 86_400.0
"""No clocks of one deployment differ by more."""

_Record = TypeVar("_Record", Plan, Tenant, KeyGrant)
_Row = TypeVar("_Row", bound=Base)


def database_url(tenancy: TenancyConfig) -> str:
    """The configured database, or the file that is used where none is."""
    path = cache_directory().absolute() / "tenants.db"
    return tenancy.database or URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


class Store:
    """Tenants and what belongs to them. Safe to use from many threads; every method waits for the database."""

    def __init__(self, database: Database, *, wall_clock: Callable[[], float] = time.time) -> None:
        """`wall_clock` gives UNIX seconds."""
        self.database = database
        self._wall_clock = wall_clock

    # Plans

    def create_plan(self, plan: Plan) -> Plan:
        """Raises AlreadyExistsError."""
        with self._change() as session:
            if session.get(PlanRow, plan.name) is not None:
                raise AlreadyExistsError(f"there is a plan {plan.name!r} already")
            session.add(PlanRow(**_values(plan)))
        return plan

    def list_plans(self) -> list[Plan]:
        """All of them, by name."""
        with self.database.read() as session:
            return [_record(Plan, row) for row in session.scalars(select(PlanRow).order_by(PlanRow.name))]

    def update_plan(self, name: str, changes: Mapping[str, Any]) -> Plan:
        """Change the fields named by `changes`, for all tenants on the plan. Raises NotFoundError and ValidationError."""
        with self._change() as session:
            row = _found(session, PlanRow, name, "plan")
            plan = _changed(_record(Plan, row), changes, PLAN_FIELDS)
            _write(row, changes)
        return plan

    # Tenants

    def create_tenant(self, tenant: Tenant) -> Tenant:
        """With the time of its making. Raises AlreadyExistsError, and NotFoundError for the plan."""
        tenant = replace(tenant, created_unix_s=self._wall_clock(), disabled_unix_s=None)
        with self._change() as session:
            if session.get(TenantRow, tenant.id) is not None:
                raise AlreadyExistsError(f"there is a tenant {tenant.id!r} already")
            _found(session, PlanRow, tenant.plan, "plan")
            session.add(TenantRow(**_values(tenant)))
        return tenant

    def get_tenant(self, tenant_id: str) -> Tenant:
        """Raises NotFoundError."""
        with self.database.read() as session:
            return _record(Tenant, _found(session, TenantRow, tenant_id, "tenant"))

    def list_tenants(self, *, after: str = "", limit: int | None = None) -> list[Tenant]:
        """By id: at most `limit` of them, those with ids greater than `after`."""
        query = select(TenantRow).where(TenantRow.id > after).order_by(TenantRow.id).limit(limit)
        with self.database.read() as session:
            return [_record(Tenant, row) for row in session.scalars(query)]

    def update_tenant(self, tenant_id: str, changes: Mapping[str, Any]) -> Tenant:
        """Change the fields named by `changes`. Raises NotFoundError and ValidationError."""
        with self._change() as session:
            row = _found(session, TenantRow, tenant_id, "tenant")
            tenant = _changed(_record(Tenant, row), changes, TENANT_FIELDS)
            _found(session, PlanRow, tenant.plan, "plan")
            _write(row, changes)
        return tenant

    def set_tenant_disabled(self, tenant_id: str, is_disabled: bool) -> Tenant:
        """Refuse all keys of a tenant, or accept them again. Raises NotFoundError."""
        with self._change() as session:
            row = _found(session, TenantRow, tenant_id, "tenant")
            if is_disabled != (row.disabled_unix_s is not None):
                row.disabled_unix_s = self._wall_clock() if is_disabled else None
            return _record(Tenant, row)

    # Keys

    def create_key(self, tenant_id: str, grant: KeyGrant) -> IssuedKey:
        """Raises NotFoundError for the tenant, and ValidationError for a time of expiry that has passed."""
        with self._change() as session:
            _found(session, TenantRow, tenant_id, "tenant")
            return self._issue(session, tenant_id, grant, quota_id=None)

    def list_keys(self, *, tenant_id: str | None = None, after: str = "", limit: int | None = None) -> list[Key]:
        """By id, all or those of one tenant, with expired and revoked ones. Raises NotFoundError for the tenant."""
        query = select(KeyRow).where(KeyRow.id > after).order_by(KeyRow.id).limit(limit)
        with self.database.read() as session:
            if tenant_id is not None:
                _found(session, TenantRow, tenant_id, "tenant")
                query = query.where(KeyRow.tenant_id == tenant_id)
            return [_key(row) for row in session.scalars(query)]

    def rotate_key(self, key_id: str, *, overlap_s: float) -> IssuedKey:
        """A new key that allows the same, for as long as the old one was made for; the old one ends after `overlap_s`.

        Both spend one quota. Raises NotFoundError, and ValidationError for a key that has ended and for what cannot be an id.
        """
        check_key_id("id", key_id)
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise ValidationError(
                "overlap", f"overlap must be from 0 to {MAX_OVERLAP_S} seconds (a year), not {overlap_s}"
            )
        with self._change() as session:
            row = _found(session, KeyRow, key_id, "key")
            old, now_unix_s = _key(row), self._wall_clock()
            if old.revoked_unix_s is not None or _is_past(old.expires_unix_s, now_unix_s):
                raise ValidationError(
                    "id", f"id must name a key that is still good, and {key_id!r} is revoked or expired"
                )
            grant = KeyGrant(**{field.name: getattr(old, field.name) for field in fields(KeyGrant)})
            if row.lifetime_s is None:
                row.lifetime_s = math.inf if old.expires_unix_s is None else old.expires_unix_s - old.created_unix_s
            ends_unix_s = None if math.isinf(row.lifetime_s) else min(now_unix_s + row.lifetime_s, MAX_UNIX_S)
            grant = replace(grant, expires_unix_s=ends_unix_s)
            row.expires_unix_s = min(now_unix_s + overlap_s, old.expires_unix_s or float("inf"))
            if not overlap_s:
                row.revoked_unix_s = now_unix_s  # it ends now, whatever the clocks of gateways say
            return self._issue(session, old.tenant_id, grant, quota_id=old.quota_id)

    def revoke_key(self, key_id: str) -> Key:
        """For good; again changes nothing. Raises NotFoundError, and ValidationError for what cannot be an id."""
        check_key_id("id", key_id)
        with self._change() as session:
            row = _found(session, KeyRow, key_id, "key")
            if row.revoked_unix_s is None:
                row.revoked_unix_s = self._wall_clock()
            return _key(row)

    def _issue(self, session: Session, tenant_id: str, grant: KeyGrant, *, quota_id: str | None) -> IssuedKey:
        now_unix_s = self._wall_clock()
        if grant.expires_unix_s is not None and grant.expires_unix_s <= now_unix_s:
            raise ValidationError(
                "expires", f"expires must be after now, {iso_time(now_unix_s)}, not {iso_time(grant.expires_unix_s)}"
            )
        secret = new_key()
        key = Key(
            **_values(grant),
            id=secret.id,
            tenant_id=tenant_id,
            quota_id=quota_id or secret.id,
            created_unix_s=now_unix_s,
        )
        values = _values(key) | {"models": None if key.models is None else list(key.models)}
        session.add(KeyRow(**values, hash=secret.hash()))
        return IssuedKey(key=key, text=secret.text)

    # Usage

    def list_usage(self, wanted: UsageFilter, *, after: Position | None, limit: int) -> list[UsageRecord]:
        """At most `limit` records, by the time that they started, those behind `after`."""
        return list_usage(self.database, wanted, after=after, limit=limit)

    # What gateways hold

    def generation(self) -> int:
        """Greater after every change of plans, tenants and keys. A snapshot of the same number is still right."""
        with self.database.read() as session:
            return session.execute(select(DeploymentRow.generation)).scalar_one()

    def snapshot(self) -> Snapshot:
        """All keys that a gateway may have to authenticate, with what their tenants may use. The gateway decides by its own
        clock whether a key has expired, and this one may be ahead of it; so only those that expired long ago are left out."""
        now_unix_s = self._wall_clock()
        with self.database.read() as session:
            deployment = session.scalars(select(DeploymentRow)).one()
            plans = {row.name: _record(Plan, row) for row in session.scalars(select(PlanRow))}
            live = select(TenantRow).where(TenantRow.disabled_unix_s.is_(None)).order_by(TenantRow.id)
            tenants = [
                _tenant_entry(tenant, plans[tenant.plan], deployment.salt_secret)
                for tenant in (_record(Tenant, row) for row in session.scalars(live))
            ]
            tenant_ids = {tenant.id for tenant in tenants}
            rows = session.scalars(select(KeyRow).where(KeyRow.revoked_unix_s.is_(None)).order_by(KeyRow.id))
            keys = [
                _key_entry(row)
                for row in rows
                if row.tenant_id in tenant_ids and not _is_past(row.expires_unix_s, now_unix_s - _EXPIRED_KEPT_S)
            ]
        return Snapshot(generation=deployment.generation, tenants=tuple(tenants), keys=tuple(keys))

    @contextmanager
    def _change(self) -> Iterator[Session]:
        """A transaction that caches must notice. Its first statement also makes PostgreSQL run changes one by one."""
        with self.database.write() as session:
            session.execute(update(DeploymentRow).values(generation=DeploymentRow.generation + 1))
            yield session


def _values(record: Plan | Tenant | KeyGrant) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _record(kind: type[_Record], row: Base) -> _Record:
    return kind(**{field.name: getattr(row, field.name) for field in fields(kind)})


def _key(row: KeyRow) -> Key:
    values = {field.name: getattr(row, field.name) for field in fields(Key)}
    return Key(**values | {"models": None if row.models is None else tuple(row.models)})


def _found(session: Session, table: type[_Row], name: str, kind: str) -> _Row:
    row = None if "\0" in name else session.get(table, name)  # PostgreSQL takes no NUL, and nothing has one in its name
    if row is None:
        raise NotFoundError(f"there is no {kind} {without_secrets(name)[:80]!r}")
    return row


def _changed(record: _Record, changes: Mapping[str, Any], allowed: tuple[str, ...]) -> _Record:
    assert changes and set(changes) <= set(allowed), f"{set(changes)} of {allowed}"
    return replace(record, **changes)


def _write(row: Base, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        setattr(row, name, value)


def _is_past(unix_s: float | None, now_unix_s: float) -> bool:
    return unix_s is not None and unix_s <= now_unix_s


def _tenant_entry(tenant: Tenant, plan: Plan, salt_secret: bytes) -> TenantEntry:
    return TenantEntry(
        id=tenant.id,
        limits=tenant.limits_under(plan),
        weight=plan.weight if tenant.weight is None else tenant.weight,
        priority=plan.priority if tenant.priority is None else tenant.priority,
        cache_salt=hmac.digest(salt_secret, tenant.id.encode(), "sha256"),
    )


def _key_entry(row: KeyRow) -> KeyEntry:
    return KeyEntry(
        id=row.id,
        tenant_id=row.tenant_id,
        quota_id=row.quota_id,
        hash=row.hash,
        models=None if row.models is None else tuple(row.models),
        is_admin=row.is_admin,
        limits=Limits(**{name: getattr(row, name) for name in LIMITS}),
        expires_unix_s=row.expires_unix_s,
    )
