"""Which server decides on quotas, and that it is alive."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Two columns of the row that there is."""
    op.add_column("quota_authority", sa.Column("owner", sa.String(200)))
    op.add_column("quota_authority", sa.Column("beat", sa.BigInteger))
