"""Options of the TCP sockets between processes and to clients."""

import socket

DEAD_PEER_S = 15
"""A peer that vanished without a word is noticed within about this time."""


def detect_dead_peer(connection: socket.socket) -> None:
    """End the connection when the peer acknowledges nothing for DEAD_PEER_S, whether data is on its way or not."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, DEAD_PEER_S // 3),
        (socket.TCP_KEEPINTVL, DEAD_PEER_S // 3),
        (socket.TCP_KEEPCNT, 2),
        (socket.TCP_USER_TIMEOUT, 1000 * DEAD_PEER_S),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def send_at_once(connection: socket.socket) -> None:
    """Do not wait for more to send (TCP_NODELAY); asyncio does it by itself."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
