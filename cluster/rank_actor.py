"""The Ray actor that one rank lives in. Ray places and starts it; steps come over the link, not through Ray."""

import os
import socket
from collections.abc import Callable

from cluster import ray_api
from cluster.placement import RankLocation
from model_parallel.runtime.rank_link import Launch


class RankActor:
    """Used in this order: `describe`, for rank 0 of a group on several nodes `open_store`, `serve`."""

    def __init__(self) -> None:
        self._store_listener: socket.socket | None = None

    def describe(self, bundle: int) -> RankLocation:
        """Where the actor of this bundle has come to lie."""
        node_id, ip = ray_api.this_node()
        return RankLocation(bundle=bundle, node_id=node_id, ip=ip, pid=os.getpid(), gpu_ids=ray_api.this_gpu_ids())

    def open_store(self, host: str) -> int:
        """Listen at `host` for the ranks' key-value store; returns the port."""
        self._store_listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        port: int = self._store_listener.getsockname()[1]
        return port

    def serve(self, launch: Launch, configure_logging: Callable[[str], None] | None) -> None:
        """Be a rank until the leader stops it. Ends the process when the leader is gone or the rank fails.
        `configure_logging` is told what the process is."""
        if configure_logging is not None:
            configure_logging(f"rank {launch.rank}")
        from model_parallel.runtime.rank_process import serve_rank  # noqa: PLC0415 - torch only here, not in the leader

        serve_rank(launch, self._store_listener)
