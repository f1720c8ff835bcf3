"""Addresses to listen on and to connect to: read as people write them, printed so that they can be pasted."""

import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from model_parallel.errors import ConfigError

DEFAULT_GRPC_PORT = 50051
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_SCHEMES = {"http": False, "https": True, "grpc": False, "grpcs": True}
"""Whether each means TLS."""


def host_port(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def without_brackets(host: str) -> str:
    """`[::1]` as `::1`; anything else as it is."""
    host = host.strip()
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def plain_host(host: str) -> str:
    """An address as everybody reads it: 127.1 is 127.0.0.1, which gRPC's resolver does not know. A name as it is."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    if any(character.isspace() for character in host):
        return host  # inet_aton ignores what follows a space
    with suppress(OSError, UnicodeError):
        return socket.inet_ntoa(socket.inet_aton(host))
    return host


def to_connect_to(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    host = plain_host(host)
    return _WILDCARDS.get(host, host)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a client connects to."""

    address: str
    """HOST:PORT, or a name for gRPC's own resolvers (dns:, unix:)."""
    uses_tls: bool = False
    """The text asks for TLS by its scheme."""

    @property
    def host_and_port(self) -> tuple[str, int] | None:
        """None for a name that gRPC resolves by itself."""
        host, _, port = self.address.rpartition(":")
        return (without_brackets(host), int(port)) if host and port.isdigit() else None

    @property
    def is_on_this_machine(self) -> bool:
        """Loopback: no proxy can be meant to stand in between."""
        parts = self.host_and_port
        return parts is not None and is_loopback(to_connect_to(parts[0]))


def parse_target(text: str, default_port: int = DEFAULT_GRPC_PORT) -> Target:
    """HOST:PORT, HOST, a port alone, or a URL. Raises ConfigError."""
    text = text.strip()
    if text.startswith(("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:")):
        return Target(text)
    uses_tls = False
    if "://" in text:
        scheme, _, rest = text.partition("://")
        if scheme.lower() not in _SCHEMES:
            raise ConfigError(f"--address: the scheme {scheme!r} is not known; give HOST:PORT or http://HOST:PORT")
        uses_tls = _SCHEMES[scheme.lower()]
        text = urlsplit(f"//{rest}").netloc.rpartition("@")[2]
    if not text:
        raise ConfigError("--address: no address is given; give HOST:PORT")
    if text.isdigit():
        return Target(host_port("127.0.0.1", _port(text)), uses_tls)
    if _is_ip(without_brackets(text)):
        return Target(host_port(plain_host(without_brackets(text)), default_port), uses_tls)
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, port = text, str(default_port)
    host = without_brackets(host) or "127.0.0.1"
    if "/" in host or " " in host or (":" in host and not _is_ip(host)):
        raise ConfigError(f"--address: {text!r} is not HOST:PORT")
    return Target(host_port(plain_host(host), _port(port)), uses_tls)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigError(f"--address: the port {text!r} is not a number from 1 to 65535")
    return int(text)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there. A name counts by all that it stands for."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = resolve(host)
    except ConfigError:
        return host == "localhost"
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def resolve(host: str, look_up: Callable[..., Sequence[tuple[object, ...]]] = socket.getaddrinfo) -> list[str]:
    """The IP addresses that a host stands for, each once, in the system's order. Raises ConfigError."""
    host = plain_host(host)
    if _is_ip(host):
        return [host]
    try:
        found = look_up(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the host {host!r} cannot be resolved: {reason}") from error
    addresses = [str(entry[4][0]) for entry in found]  # type: ignore[index]
    return list(dict.fromkeys(addresses))


def listening_addresses(host: str) -> list[str]:
    """What to bind for a host: every address of it that this machine has. Both front ends listen on the same ones.

    A name often stands for ::1 too where IPv6 is turned off, so an address that cannot be had counts only when no other can.
    Raises ConfigError when none can.
    """
    found = resolve(host)
    usable = [address for address in found if why_not_listening(address, 0) != errno.EADDRNOTAVAIL]
    return usable or found


def can_share_a_port(one: str, other: str) -> bool:
    """Whether listening at both of two IP addresses of a machine can go with one port. `::` takes IPv4 as well."""
    both = {one, other}
    if len(both) == 1 or "::" in both:
        return False
    return "0.0.0.0" not in both or any(":" in address for address in both)


def open_listener(address: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. `::` takes IPv4 as well, as gRPC has it. Raises OSError."""
    is_v6 = ":" in address
    # asyncio turns Nagle's algorithm off where it is told the protocol. With it, an answer whose head and body are written one
    # after the other waits 40 ms for the client's acknowledgement.
    sock = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        sock.bind((address, port) if not is_v6 else socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][4])
    except OSError:
        sock.close()
        raise
    return sock


def why_not_listening(address: str, port: int) -> int:
    """The errno of trying to listen there for a moment; 0 when it works."""
    try:
        with open_listener(address, port) as sock:
            sock.listen(1)
    except socket.gaierror:
        return errno.EADDRNOTAVAIL  # an IPv6 address of an interface that it cannot have
    except OSError as error:
        return _NO_SUCH_FAMILY.get(error.errno or errno.EIO, error.errno or errno.EIO)
    return 0


_NO_SUCH_FAMILY = {errno.EAFNOSUPPORT: errno.EADDRNOTAVAIL, errno.ENODEV: errno.EADDRNOTAVAIL}
"""A machine without IPv6 says either."""


def explain_listening(number: int, address: str, port: int) -> str:
    """Why a process cannot listen, for people."""
    where = host_port(address, port)
    if number == errno.EADDRINUSE:
        return f"{where} is in use"
    if number == errno.EACCES:
        return f"{where} is not allowed to this user: ports below 1024 are the system's"
    if number == errno.EADDRNOTAVAIL:
        return f"{address} is not an address of this machine"
    return f"{where} cannot be had: {os.strerror(number)}"
