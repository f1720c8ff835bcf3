"""How long keys were made for, which a rotation must know after the one before has brought their end forward."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """One column. Of a key in an overlap that began before, nothing is known but that it ends with it."""
    op.add_column("keys", sa.Column("lifetime_s", sa.Double))
