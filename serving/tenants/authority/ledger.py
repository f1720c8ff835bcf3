"""Usage records and the balance of quotas in the database. One transaction a commit, so that the two never disagree."""

import math
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
from sqlalchemy import Connection, Delete, Insert, and_, bindparam, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from serving.contracts.accounts import UsageRecord
from serving.tenants.authority.buckets import Bucket
from serving.tenants.authority.quota import Account, Changes, Gateway, Holding, QuotaAuthority
from serving.tenants.messages import Amounts, Reply
from serving.tenants.store.database import Database
from serving.tenants.store.owner import BEAT_PERIOD_S, in_use, wait_until_free
from serving.tenants.store.schema import AuthorityRow, Base, LeaseRow, QuotaGatewayRow, QuotaRow, UsageRow

_BATCH = 500
"""Parameters of one statement; databases bound them."""

_FIND_RECORDS = select(UsageRow.__table__).where(UsageRow.request_id.in_(bindparam("ids", expanding=True)))
_BEAT = (
    update(AuthorityRow)
    .where(AuthorityRow.epoch == bindparam("mine"))
    .values(owner=bindparam("owner_now"), beat=bindparam("beat_now"))
)

_Row = dict[str, Any]


class SupersededError(Exception):
    """Another quota authority has opened the ledger since. This one must not decide anything any more."""


class Ledger:
    """What one quota authority writes. Every method waits for the database and raises StoreUnavailableError."""

    def __init__(self, database: Database, owner: str) -> None:
        """`owner` names the server, for people too; it stays the same when its authority starts anew."""
        self._database = database
        self._owner = owner
        self._epoch = 0
        self._num_beats = 0
        self._beaten_s = 0.0
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Reply).decode

    def open(self) -> tuple[dict[str, Account], dict[str, Gateway]]:
        """Everything as it was committed last. From now on no other authority that is still running can commit. Raises InUseError
        while another server is alive that has the database."""
        wait_until_free(self._database, self._owner)
        is_free = AuthorityRow.owner.is_(None) | (AuthorityRow.owner == self._owner)
        with self._database.write() as session:
            taken = update(AuthorityRow).where(is_free).values(epoch=AuthorityRow.epoch + 1, owner=self._owner, beat=0)
            if session.connection().execute(taken).rowcount != 1:  # another one that has waited was faster
                raise in_use(self._database, session.scalars(select(AuthorityRow.owner)).one())
            self._beaten_s = time.monotonic()
            self._epoch = session.scalars(select(AuthorityRow.epoch)).one()
            gateways = {
                row.id: Gateway(number=row.number, reply=self._decode(row.reply))
                for row in session.scalars(select(QuotaGatewayRow))
            }
            accounts = {row.subject: _account(row) for row in session.scalars(select(QuotaRow))}
            for row in session.scalars(select(LeaseRow)):
                held = Amounts(row.requests, row.tokens, row.slots, row.budget)
                # Which part of it requests use, only the gateway knows; until it says so, all of it may be free.
                accounts[row.subject].holdings[row.gateway_id] = Holding(held, free=held)
        return accounts, gateways

    def recorded(self, request_ids: Sequence[str]) -> dict[str, UsageRecord]:
        """The records that there are of these, by id."""
        found: dict[str, UsageRecord] = {}
        if not request_ids:
            return found
        with self._database.read() as session:
            for start in range(0, len(request_ids), _BATCH):
                part = request_ids[start : start + _BATCH]
                for row in session.connection().execute(_FIND_RECORDS, {"ids": part}).mappings():
                    found[row["request_id"]] = UsageRecord(**row)
        return found

    def is_beat_due(self) -> bool:
        """Whether it is time for a commit even if nothing has changed: it also tells other servers that this one is alive."""
        return time.monotonic() - self._beaten_s >= BEAT_PERIOD_S

    def release(self) -> None:
        """Another server may have the database from now on."""
        with self._database.write() as session:
            session.execute(update(AuthorityRow).where(AuthorityRow.epoch == self._epoch).values(owner=None))

    def commit(self, changes: Changes, authority: QuotaAuthority) -> None:
        """Make it durable. Raises SupersededError, and then nothing was written."""
        accounts, gateways = authority.accounts, authority.gateways
        records = [msgspec.structs.asdict(settlement.record) for settlement in changes.settlements.values()]
        quotas = [_quota_row(subject, accounts[subject]) for subject in changes.accounts]
        leases, ended_leases = [], []
        for gateway_id, subject in changes.holdings:
            key = {"gateway_id": gateway_id, "subject": subject}
            holding = accounts[subject].holdings.get(gateway_id)
            if holding is None:
                ended_leases.append(key)
            else:
                leases.append(key | msgspec.structs.asdict(holding.held))
        talks = [self._gateway_row(name, gateways[name]) for name in changes.gateways & gateways.keys()]
        ended_talks = [{"id": name} for name in changes.gateways - gateways.keys()]
        with self._database.write() as session:
            connection = session.connection()
            self._beat(connection)
            for table, rows in ((UsageRow, records), (QuotaRow, quotas), (LeaseRow, leases), (QuotaGatewayRow, talks)):
                if rows:
                    connection.execute(_upsert(table, connection.dialect.name), rows)
            for table, rows in ((LeaseRow, ended_leases), (QuotaGatewayRow, ended_talks)):
                if rows:
                    keys = [{f"the_{name}": value for name, value in row.items()} for row in rows]
                    connection.execute(_delete(table), keys)
        self._beaten_s = time.monotonic()

    def _beat(self, connection: Connection) -> None:
        """Only in its own epoch. The update also makes other authorities wait until this transaction has ended."""
        self._num_beats += 1
        values = {"mine": self._epoch, "owner_now": self._owner, "beat_now": self._num_beats}
        if connection.execute(_BEAT, values).rowcount != 1:
            raise SupersededError("another quota authority has taken over the database")

    def _gateway_row(self, name: str, gateway: Gateway) -> _Row:
        return {"id": name, "number": gateway.number, "reply": self._encode(gateway.reply)}


def _account(row: QuotaRow) -> Account:
    requests, tokens = (math.inf if level is None else level for level in (row.requests_level, row.tokens_level))
    return Account(
        charged=row.charged_tokens,
        requests=Bucket(requests, row.refilled_unix_s),
        tokens=Bucket(tokens, row.refilled_unix_s),
    )


def _quota_row(subject: str, account: Account) -> _Row:
    requests, tokens = (
        None if math.isinf(bucket.level) else bucket.level for bucket in (account.requests, account.tokens)
    )
    return {
        "subject": subject,
        "charged_tokens": account.charged,
        "requests_level": requests,
        "tokens_level": tokens,
        "refilled_unix_s": account.tokens.refilled_s,
    }


# Statements are made once: making one takes longer than running it.


@cache
def _upsert(table: type[Base], dialect_name: str) -> Insert:
    dialect = postgresql if dialect_name == "postgresql" else sqlite
    statement = dialect.insert(table)
    keys = [column.name for column in table.__table__.primary_key]
    others = {
        column.name: statement.excluded[column.name] for column in table.__table__.columns if column.name not in keys
    }
    upsert: Insert = statement.on_conflict_do_update(index_elements=keys, set_=others)
    return upsert


@cache
def _delete(table: type[Base]) -> Delete:
    keys = table.__table__.primary_key
    # A parameter of a column's own name is reserved for values.
    return delete(table).where(and_(*(column == bindparam(f"the_{column.name}") for column in keys)))
