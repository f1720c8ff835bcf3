"""Run by alembic, with the connection and the transaction that `Database` has opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
