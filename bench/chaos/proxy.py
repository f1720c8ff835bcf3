"""A TCP proxy on loopback whose connections can be made to say nothing, and then cut."""

import contextlib
import select
import socket
import threading
from dataclasses import dataclass

_CHUNK_BYTES = 1 << 16
_LOOK_S = 0.2
_CONNECT_TIMEOUT_S = 5.0


@dataclass(kw_only=True)
class Observed:
    """What a partition did."""

    num_connections: int = 0
    """Cut in it, or refused."""
    num_bytes: int = 0
    """Swallowed."""


class Proxy:
    """Listens at a free port of 127.0.0.1. Use it as a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_LOOK_S)
        self._is_closing = threading.Event()
        self._is_parted = threading.Event()
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self.observed = Observed()
        self._thread = threading.Thread(target=self._accept, name="chaos-proxy", daemon=True)

    @property
    def address(self) -> str:
        """For clients."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing.set()
        self._listener.close()
        self._cut()
        self._thread.join()

    def part(self) -> None:
        """From now on nothing passes, in either direction."""
        self.observed = Observed()
        self._is_parted.set()

    def join(self) -> None:
        """Cut what is open, as a peer does that has waited for too long, and let new connections pass."""
        self.observed.num_connections += self._cut()
        self._is_parted.clear()

    def _cut(self) -> int:
        with self._lock:
            pairs = list(self._pairs)
        for one, other in pairs:
            for sock in (one, other):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        return len(pairs)

    def _accept(self) -> None:
        while not self._is_closing.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:  # closed
                return
            if self._is_parted.is_set():
                self.observed.num_connections += 1
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, _CONNECT_TIMEOUT_S)
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._carry, args=(client, server), name="chaos-proxy", daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self._pairs.add((client, server))
        other = {client: server, server: client}
        for sock in other:
            sock.settimeout(_CONNECT_TIMEOUT_S)
        try:
            while True:
                for sock in select.select(list(other), [], [])[0]:
                    data = sock.recv(_CHUNK_BYTES)
                    if not data:
                        return
                    if self._is_parted.is_set():
                        self.observed.num_bytes += len(data)
                    else:
                        other[sock].sendall(data)
        except OSError:
            return
        finally:
            with self._lock:
                self._pairs.discard((client, server))
            client.close()
            server.close()
