"""The ports of a stack that starts, kept from the check before the start until the stack has stopped.

Groups take minutes to load, and a gateway that is lost comes back at its port. Meanwhile nobody else may get that port: neither
an outgoing connection of this machine, whose port the system chooses from a range that holds our defaults, nor a second
`packtrain serve`.
"""

import errno
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serving.contracts.addresses import can_share_a_port, open_listener, why_not_listening

_TURN_TIMEOUT_S = 30.0
_POLL_S = 0.01


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
        held: list[socket.socket] = []
        try:
            with _turn(port):
                ours = {held for held, of_port in self._sockets if of_port == port}
                if not all(can_share_a_port(address, other) for other in _addresses_held(port) - ours):
                    return errno.EADDRINUSE
                held.append(_named(f"{address}:{port}"))
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


def _named(what: str) -> socket.socket:
    """A socket with that name. Raises OSError where there is one already."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0packtrain {what}")
    except BaseException:
        name.close()
        raise
    return name


@contextmanager
def _turn(port: int) -> Iterator[None]:
    """One process at a time looks who keeps a port, and keeps it: of two that start together one gets it. Raises OSError when the
    other one does not come to an end."""
    deadline_s = time.monotonic() + _TURN_TIMEOUT_S
    while True:
        try:
            turn = _named(f"looks at {port}")
            break
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)
    with turn:
        yield


def _addresses_held(port: int) -> set[str]:
    """At which stacks keep the port. None can be seen where the system does not tell the names of sockets."""
    try:
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    names = [name for _, found, name in (line.partition("@packtrain ") for line in lines) if found]
    return {address for address, _, number in (name.rpartition(":") for name in names) if number == str(port)}


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
