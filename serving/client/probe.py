"""One look at a port of this machine, so that a wrong address is told at once and not after gRPC's retries."""

import socket
from enum import Enum, auto

_TIMEOUT_S = 2.0
_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Port(Enum):
    """What a look told."""

    CLOSED = auto()
    HTTP = auto()
    """It answers in HTTP/1."""
    OPEN = auto()
    """Somebody listens; perhaps it is gRPC."""


def look_at_port(host: str, port: int, *, tls: bool = False) -> Port:
    """Connect, and without TLS see what comes: a gRPC server sends HTTP/2 settings first, or complains in HTTP/2; a server of
    HTTP/1 answers in text."""
    try:
        connection = socket.create_connection((host, port), _TIMEOUT_S)
    except ConnectionRefusedError:
        return Port.CLOSED
    except OSError:
        return Port.OPEN
    with connection:
        if tls:
            return Port.OPEN
        try:
            connection.sendall(_REQUEST)
            first = connection.recv(5)
        except OSError:
            return Port.OPEN
    return Port.HTTP if first == b"HTTP/" else Port.OPEN
