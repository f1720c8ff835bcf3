"""packtrain.v1.Admin beside `packtrain serve`: in the process that began the server, on the node that has the database file."""

import asyncio
import threading

from serving.admin.service import AdminServer
from serving.config import ServingConfig, TenancyConfig
from serving.gateway.tls import load_tls
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store, database_url

TIMEOUT_S = 30.0
"""For starting, and for stopping."""


class AdminThread:
    """The admin server on an event loop of its own. Serves from its construction until `stop`."""

    def __init__(self, config: ServingConfig, tenancy: TenancyConfig) -> None:
        """Raises ConfigError when certificates cannot be used or the port cannot be had, StoreUnavailableError, TimeoutError."""
        credentials = None if config.gateway.tls is None else load_tls(config.gateway.tls).grpc
        self._database = Database(database_url(tenancy))
        self._server = AdminServer(
            config.admin, Store(self._database), refresh_s=tenancy.refresh_s, credentials=credentials
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
            self._database.close()
