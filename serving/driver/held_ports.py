"""The ports of a stack that starts, kept from the check before the start until the stack has stopped.

Groups take minutes to load, and a gateway that is lost comes back at its port. Meanwhile nobody else may get that port: neither
an outgoing connection of this machine, whose port the system chooses from a range that holds our defaults, nor a second
`packtrain serve`.
"""

import errno
import socket
from contextlib import suppress

from serving.contracts.addresses import open_listener, why_not_listening


class HeldPorts:
    """Ports that this process keeps. Gateways and the admin server can listen there all the same: a socket that is bound and does
    not listen is in the way of no other that has SO_REUSEADDR, as theirs have, and the system gives its port to nobody."""

    def __init__(self) -> None:
        self._sockets: dict[tuple[str, int], list[socket.socket]] = {}

    def hold(self, address: str, port: int) -> int:
        """Keep a port until `close`. Returns 0, or the errno of listening there, which is EADDRINUSE too when another stack keeps
        it. Port 0 is not kept: whoever listens gets a free one."""
        if not port or (address, port) in self._sockets:
            return why_not_listening(address, port)
        # Two sockets that are bound alike do not see each other, so a name tells other stacks. It belongs to this network
        # namespace, as ports do, and goes with the process.
        name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        held = [name]
        try:
            name.bind(f"\0packtrain {address}:{port}")
            with suppress(OSError):  # the next lines say why
                held.append(open_listener(address, port))
            number = why_not_listening(address, port)
        except OSError as error:
            number = error.errno or errno.EADDRINUSE
        if number:
            _close(held)
        else:
            self._sockets[address, port] = held
        return number

    def close(self) -> None:
        """Let go of all."""
        for held in self._sockets.values():
            _close(held)
        self._sockets.clear()


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
