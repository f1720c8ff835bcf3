"""packtrain.v1.Admin beside `packtrain serve`: in the process that began the server, on the node that has the database file."""

import asyncio
import threading
from typing import TYPE_CHECKING

from serving.admin.operator_key import make_operator_key
from serving.admin.service import AdminServer
from serving.config import ServingConfig, TenancyConfig
from serving.contracts.operations import Operations
from serving.gateway.tls import load_tls

if TYPE_CHECKING:  # sqlalchemy is imported where there are tenants
    from serving.tenants.store.database import Database
    from serving.tenants.store.store import Store

TIMEOUT_S = 30.0
"""For starting, and for stopping."""


class AdminThread:
    """The admin server on an event loop of its own. Serves from its construction until `stop`."""

    def __init__(self, config: ServingConfig, operations: Operations) -> None:
        """Raises ConfigError when certificates cannot be used, the port cannot be had or the operator's key not be kept,
        StoreUnavailableError, TimeoutError."""
        tenancy = config.tenancy
        credentials = None if config.gateway.tls is None else load_tls(config.gateway.tls).grpc
        opened = None if tenancy is None else _open_store(tenancy)
        self._close_database = None if opened is None else opened[0].close
        self._server = AdminServer(
            config.admin,
            None if opened is None else opened[1],
            refresh_s=1.0 if tenancy is None else tenancy.refresh_s,
            operations=operations,
            operator_key="" if tenancy is not None else make_operator_key(),
            credentials=credentials,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="admin", daemon=True)
        self._thread.start()
        try:
            self.port = asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(TIMEOUT_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Close the port and the database."""
        try:
            asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result(TIMEOUT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(TIMEOUT_S)
            self._loop.close()
            if self._close_database is not None:
                self._close_database()


def _open_store(tenancy: TenancyConfig) -> "tuple[Database, Store]":
    from serving.tenants.store.database import Database  # noqa: PLC0415
    from serving.tenants.store.store import Store, database_url  # noqa: PLC0415

    database = Database(database_url(tenancy))
    return database, Store(database)
