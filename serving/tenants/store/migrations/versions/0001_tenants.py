"""Plans, tenants, keys and usage records; the deployment's secret; and one plan to begin with."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """From an empty database."""
    deployment = op.create_table(
        "deployment",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("salt_secret", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_deployment"),
    )
    plans = op.create_table(
        "plans",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        *_limits(),
        sa.PrimaryKeyConstraint("name", name="pk_plans"),
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("plan", sa.String(64), nullable=False),
        sa.Column("created_unix_s", sa.Double, nullable=False),
        sa.Column("disabled_unix_s", sa.Double),
        sa.Column("weight", sa.Double),
        sa.Column("priority", sa.Integer),
        *_limits(),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.ForeignKeyConstraint(["plan"], ["plans.name"], name="fk_tenants_plan"),
    )
    op.create_index("ix_tenants_plan", "tenants", ["plan"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("quota_id", sa.String(64), nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("models", sa.JSON(none_as_null=True)),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.Column("created_unix_s", sa.Double, nullable=False),
        sa.Column("expires_unix_s", sa.Double),
        sa.Column("revoked_unix_s", sa.Double),
        *_limits(),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_keys_tenant_id"),
    )
    op.create_index("ix_keys_tenant_id", "keys", ["tenant_id"])
    op.create_table(
        "usage_records",
        sa.Column("request_id", sa.String(200), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens")
        ),
        sa.Column("outcome", sa.String(64), nullable=False),
        *(
            sa.Column(name, sa.Double, nullable=False)
            for name in ("started_unix_s", "gateway_s", "queue_s", "prefill_s", "decode_s", "total_s")
        ),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage_records"),
    )
    op.create_index("ix_usage_records_started", "usage_records", ["started_unix_s", "request_id"])
    op.create_index("ix_usage_records_tenant_started", "usage_records", ["tenant_id", "started_unix_s", "request_id"])

    op.bulk_insert(deployment, [{"id": 1, "generation": 1, "salt_secret": secrets.token_bytes(32)}])
    op.bulk_insert(plans, [{"name": "unlimited", "weight": 1.0, "priority": 0}])


def _limits() -> list[sa.Column[int]]:
    names = ("requests_per_minute", "tokens_per_minute", "max_concurrent_requests", "token_budget")
    return [sa.Column(name, sa.BigInteger) for name in names]
