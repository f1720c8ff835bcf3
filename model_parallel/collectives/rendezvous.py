"""Where the ranks of a group meet. Plain data: the leader sends it to each rank."""

import msgspec


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True):
    """Where the ranks of a group find each other. Exactly one of memory_path, store_path and store_port is set."""

    bind_host: str
    """The one address at which this rank listens for its peers."""
    memory_path: str = ""
    """All ranks on one host: a file that they map, to exchange through it."""
    store_path: str = ""
    """All ranks on one host: a file where they leave their addresses."""
    store_host: str = ""
    store_port: int = 0
    """Ranks on several hosts: rank 0's key-value store."""
