"""What has been used, and what gateways may use without asking."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """The tables that the quota authority alone writes."""
    authority = op.create_table(
        "quota_authority",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_quota_authority"),
    )
    op.bulk_insert(authority, [{"id": 1, "epoch": 0}])
    op.create_table(
        "quotas",
        sa.Column("subject", sa.String(128), nullable=False),
        sa.Column("charged_tokens", sa.BigInteger, nullable=False),
        sa.Column("requests_level", sa.Double),
        sa.Column("tokens_level", sa.Double),
        sa.Column("refilled_unix_s", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("subject", name="pk_quotas"),
    )
    op.create_table(
        "quota_gateways",
        sa.Column("id", sa.String(200), nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("reply", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_quota_gateways"),
    )
    op.create_table(
        "quota_leases",
        sa.Column("gateway_id", sa.String(200), nullable=False),
        sa.Column("subject", sa.String(128), nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("requests", "tokens", "slots", "budget")),
        sa.PrimaryKeyConstraint("gateway_id", "subject", name="pk_quota_leases"),
    )
