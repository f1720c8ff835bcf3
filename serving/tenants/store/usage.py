"""Questions about usage records: which, and how much in all."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select, tuple_

from serving.contracts.accounts import UsageRecord
from serving.tenants.records import UsageFilter
from serving.tenants.store.database import Database
from serving.tenants.store.schema import UsageRow

Position = tuple[float, str]
"""Start and id of a record: records are listed in this order."""

PAGE_SIZE = 1000
"""Records that are read in one transaction."""


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What one key used of one model."""

    tenant_id: str
    key_id: str
    model: str
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


def list_usage(
    database: Database, wanted: UsageFilter, *, after: Position | None = None, limit: int
) -> list[UsageRecord]:
    """At most `limit` records, by the time that they started, those behind `after`."""
    conditions = _conditions(wanted)
    if after is not None:
        conditions.append(tuple_(UsageRow.started_unix_s, UsageRow.request_id) > after)
    query = select(UsageRow).where(*conditions).order_by(UsageRow.started_unix_s, UsageRow.request_id).limit(limit)
    names = UsageRecord.__struct_fields__
    with database.read() as session:
        return [UsageRecord(**{name: getattr(row, name) for name in names}) for row in session.scalars(query)]


def all_usage(database: Database, wanted: UsageFilter) -> Iterator[UsageRecord]:
    """Every record, a page at a time, so that no transaction lasts long."""
    after: Position | None = None
    while page := list_usage(database, wanted, after=after, limit=PAGE_SIZE):
        yield from page
        after = (page[-1].started_unix_s, page[-1].request_id)


def sum_usage(database: Database, wanted: UsageFilter) -> list[UsageSum]:
    """Totals by tenant, key and model."""
    by = (UsageRow.tenant_id, UsageRow.key_id, UsageRow.model)
    tokens = (UsageRow.num_prompt_tokens, UsageRow.num_cached_tokens, UsageRow.num_completion_tokens)
    query = (
        select(*by, func.count(), *(func.sum(column) for column in tokens))
        .where(*_conditions(wanted))
        .group_by(*by)
        .order_by(*by)
    )
    with database.read() as session:
        rows = session.execute(query).all()
    return [UsageSum(*row[:3], *map(int, row[3:])) for row in rows]  # PostgreSQL sums integers into decimals


def _conditions(wanted: UsageFilter) -> list[ColumnElement[bool]]:
    equal = {
        UsageRow.tenant_id: wanted.tenant_id,
        UsageRow.key_id: wanted.key_id,
        UsageRow.model: wanted.model,
    }
    conditions = [column == value for column, value in equal.items() if value]
    if wanted.since_unix_s is not None:
        conditions.append(UsageRow.started_unix_s >= wanted.since_unix_s)
    if wanted.until_unix_s is not None:
        conditions.append(UsageRow.started_unix_s < wanted.until_unix_s)
    return conditions
