"""Where requests go: an address that was given, and never another."""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from model_parallel.errors import ConfigError

_SCHEMES = {"grpc": 50051, "grpcs": 50051, "http": 80, "https": 443}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A server."""

    scheme: str
    host: str
    port: int
    path: str
    """Before /v1, of an HTTP server that lies below one; otherwise empty."""

    @property
    def is_grpc(self) -> bool:
        return self.scheme in ("grpc", "grpcs")

    @property
    def is_secure(self) -> bool:
        return self.scheme in ("grpcs", "https")

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """By its name alone: what a resolver says can change under the run."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_target(text: str) -> Target:
    """Raises ValueError that names what is wrong."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is not an address: {error}") from None
    if port == 0:
        raise ValueError(f"{text!r} has port 0, at which nothing can listen")
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ValueError(f"{text!r} must be like grpc://127.0.0.1:50051 or http://127.0.0.1:8000 (or grpcs, https)")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("no user, query or fragment may be in a target")
    path = parts.path.rstrip("/").removesuffix("/v1")
    if path and parts.scheme in ("grpc", "grpcs"):
        raise ValueError(f"{text!r} has a path, which a gRPC target has not")
    return Target(
        scheme=parts.scheme, host=parts.hostname, port=_SCHEMES[parts.scheme] if port is None else port, path=path
    )


def check_allowed(targets: list[Target], owns_them: bool) -> None:
    """Raises ConfigError for a target beyond this machine that nobody said they own."""
    for target in targets:
        if not target.is_loopback and not owns_them:
            raise ConfigError(
                f"target {target.scheme}://{target.address} is not on loopback; a load test can take a server down. "
                "Give --yes-i-own-this if it is yours to load"
            )
