"""The tables. Times are UNIX seconds, since SQLite knows no time zones; a limit that is null does not apply.

A change here goes with a file in migrations/versions; a test compares the two.
"""

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, LargeBinary, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from serving.tenants.records import MAX_LABEL_LENGTH, MAX_NAME_LENGTH

_Count = BigInteger
_Id = String(MAX_NAME_LENGTH)
_Label = String(MAX_LABEL_LENGTH)


class Base(DeclarativeBase):
    """Constraints have names of one form, by which migrations can find them."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )


class DeploymentRow(Base):
    """One row: what all processes of one deployment share."""

    __tablename__ = "deployment"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Always 1."""
    generation: Mapped[int] = mapped_column(_Count)
    """Goes up by one with every change of plans, tenants and keys, in the same transaction. Caches poll it."""
    salt_secret: Mapped[bytes] = mapped_column(LargeBinary(32))
    """Random. A tenant's cache salt is HMAC-SHA256 of its id under this secret, so nobody outside can choose or guess it."""


class LimitColumns:
    """The four limits of a plan, of a tenant (in place of the plan's) or of a key (besides the tenant's)."""

    requests_per_minute: Mapped[int | None] = mapped_column(_Count)
    tokens_per_minute: Mapped[int | None] = mapped_column(_Count)
    max_concurrent_requests: Mapped[int | None] = mapped_column(_Count)
    token_budget: Mapped[int | None] = mapped_column(_Count)
    """Tokens in all, for good."""


class PlanRow(LimitColumns, Base):
    """Limits and share that many tenants have in common. Null is unlimited."""

    __tablename__ = "plans"

    name: Mapped[str] = mapped_column(_Id, primary_key=True)
    weight: Mapped[float] = mapped_column(Double)
    """Share of a busy group, relative to other tenants."""
    priority: Mapped[int]
    """Lower numbers are served first."""


class TenantRow(LimitColumns, Base):
    """A customer. Limits, weight and priority that are not null replace the plan's."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(_Id, primary_key=True)
    name: Mapped[str] = mapped_column(_Label)
    plan: Mapped[str] = mapped_column(ForeignKey("plans.name"), index=True)
    created_unix_s: Mapped[float] = mapped_column(Double)
    disabled_unix_s: Mapped[float | None] = mapped_column(Double)
    """When all of its keys stopped being accepted; null while they are."""
    weight: Mapped[float | None] = mapped_column(Double)
    priority: Mapped[int | None]


class KeyRow(LimitColumns, Base):
    """An API key. Limits that are not null hold besides the tenant's; the key itself is not kept."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(_Id, primary_key=True)
    """Public: it stands inside the key, in usage records and in logs."""
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    quota_id: Mapped[str] = mapped_column(_Id)
    """Key that spent totals are counted under: itself, or for a rotated key the first of the chain, so that rotating a key
    does not renew its budget."""
    hash: Mapped[bytes] = mapped_column(LargeBinary(32))
    """SHA-256 of the whole key. A slow, salted hash would add nothing: the key is 256 random bits, not a password."""
    label: Mapped[str] = mapped_column(_Label)
    models: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    """Names of the models that it may use; null for all."""
    is_admin: Mapped[bool]
    created_unix_s: Mapped[float] = mapped_column(Double)
    expires_unix_s: Mapped[float | None] = mapped_column(Double)
    lifetime_s: Mapped[float | None] = mapped_column(Double)
    """What it was made for, kept when a rotation brings its end forward; infinite without an end. Null before that: until
    `expires_unix_s`."""
    revoked_unix_s: Mapped[float | None] = mapped_column(Double)


class UsageRow(Base):
    """What one request used: the columns of UsageRecord. No foreign keys: a record is kept whatever it names."""

    __tablename__ = "usage_records"

    request_id: Mapped[str] = mapped_column(_Label, primary_key=True)
    """So that writing a record again changes nothing."""
    tenant_id: Mapped[str] = mapped_column(_Id)
    key_id: Mapped[str] = mapped_column(_Id)
    model: Mapped[str] = mapped_column(_Label)
    num_prompt_tokens: Mapped[int] = mapped_column(_Count)
    num_cached_tokens: Mapped[int] = mapped_column(_Count)
    num_completion_tokens: Mapped[int] = mapped_column(_Count)
    outcome: Mapped[str] = mapped_column(_Id)
    started_unix_s: Mapped[float] = mapped_column(Double)
    gateway_s: Mapped[float] = mapped_column(Double)
    queue_s: Mapped[float] = mapped_column(Double)
    prefill_s: Mapped[float] = mapped_column(Double)
    decode_s: Mapped[float] = mapped_column(Double)
    total_s: Mapped[float] = mapped_column(Double)

    __table_args__ = (
        Index("ix_usage_records_started", "started_unix_s", "request_id"),
        Index("ix_usage_records_tenant_started", "tenant_id", "started_unix_s", "request_id"),
    )


class AuthorityRow(Base):
    """One row: which life of which server's quota authority may write the tables below."""

    __tablename__ = "quota_authority"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Always 1."""
    epoch: Mapped[int] = mapped_column(_Count)
    owner: Mapped[str | None] = mapped_column(_Label)
    """The server, all of whose authority's lives have one name; null when it has stopped in good order, or seems to be dead."""
    beat: Mapped[int | None] = mapped_column(_Count)
    """Changes at least every few seconds while it is alive."""


class QuotaRow(Base):
    """The balance of a tenant or a key, over all time."""

    __tablename__ = "quotas"

    subject: Mapped[str] = mapped_column(String(2 * MAX_NAME_LENGTH), primary_key=True)
    """`tenant:ID` or `key:QUOTA_ID`."""
    charged_tokens: Mapped[int] = mapped_column(_Count)
    """The sum over its usage records."""
    requests_level: Mapped[float | None] = mapped_column(Double)
    tokens_level: Mapped[float | None] = mapped_column(Double)
    """What the buckets of requests_per_minute and tokens_per_minute held at `refilled_unix_s`; null without such a limit."""
    refilled_unix_s: Mapped[float] = mapped_column(Double)


class QuotaGatewayRow(Base):
    """How far the authority's conversation with a gateway has come."""

    __tablename__ = "quota_gateways"

    id: Mapped[str] = mapped_column(_Label, primary_key=True)
    number: Mapped[int] = mapped_column(_Count)
    """Of the last exchange."""
    reply: Mapped[bytes] = mapped_column(LargeBinary)
    """To it, in case it got lost (msgpack, messages.Reply)."""


class LeaseRow(Base):
    """What a gateway holds of a subject: reserved for its requests, or leased to it ahead of need."""

    __tablename__ = "quota_leases"

    gateway_id: Mapped[str] = mapped_column(_Label, primary_key=True)
    subject: Mapped[str] = mapped_column(String(2 * MAX_NAME_LENGTH), primary_key=True)
    requests: Mapped[int] = mapped_column(_Count)
    tokens: Mapped[int] = mapped_column(_Count)
    slots: Mapped[int] = mapped_column(_Count)
    budget: Mapped[int] = mapped_column(_Count)
