"""TLS of the client commands: whom to trust, what to show, and why a connection cannot be made."""

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer

from model_parallel.errors import ConfigError

_PROBE_TIMEOUT_S = 5.0

UseTls = Annotated[bool, typer.Option("--tls", help="Connect over TLS; --ca and --cert imply it.")]
CaFile = Annotated[
    Path | None, typer.Option("--ca", "--cacert", help="PEM file of the authorities to trust; unset, the public ones.")
]
CertFile = Annotated[Path | None, typer.Option("--cert", help="PEM file of a certificate to show (mutual TLS).")]
KeyFile = Annotated[Path | None, typer.Option("--key", help="PEM file of its private key.")]


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files that have been tried."""

    ca: Path | None
    certificate: Path | None
    private_key: Path | None

    def __post_init__(self) -> None:
        """Raises ConfigError that names the flag, the file and what is wrong with it."""
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("--cert and --key must be given together")
        for flag, path in (("--ca", self.ca), ("--cert", self.certificate), ("--key", self.private_key)):
            if path is not None and not path.is_file():
                # Not its name: somebody may have taken the flag for that of an API key.
                shown = "the value" if flag == "--key" else str(path)
                raise ConfigError(f"{flag}: {shown} is not a file; it must be a PEM file")
        self.context()

    def credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel."""
        ca, certificate, private_key = (
            None if path is None else path.read_bytes() for path in (self.ca, self.certificate, self.private_key)
        )
        return grpc.ssl_channel_credentials(ca, private_key, certificate)

    def problem(self, address: str) -> str:
        """Why TLS with `address` (HOST:PORT) fails, found by trying; "" when it does not, or when nobody is there."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            plain = socket.create_connection((host, int(port)), _PROBE_TIMEOUT_S)
        except (OSError, ValueError):
            return ""
        with plain:
            try:
                secure = self.context().wrap_socket(plain, server_hostname=host)
            except ssl.SSLCertVerificationError as error:
                return f"the server's certificate is not trusted: {error.verify_message}"
            except OSError as error:
                return f"no handshake; perhaps the server speaks without TLS ({_reason(error)})"
            with secure:
                if _sends(secure):
                    return ""
        if self.certificate is None:
            return "the server asks for a certificate; give one with --cert and --key"
        return f"the server does not accept the certificate {self.certificate}"

    def context(self, protocol: str = "h2") -> ssl.SSLContext:
        """For sockets; `protocol` is what ALPN offers. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols([protocol])
        if self.ca is None:
            context.load_default_certs()
        else:
            try:
                context.load_verify_locations(self.ca)
            except (ssl.SSLError, OSError) as error:
                raise ConfigError(f"--ca: {self.ca} has no certificate in PEM form ({_reason(error)})") from error
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.private_key, password=_no_password)
            except (ssl.SSLError, OSError) as error:
                raise ConfigError(
                    f"--cert {self.certificate} and --key {self.private_key} are not a certificate and its private key in "
                    f"PEM form, without password ({_reason(error)})"
                ) from error
        return context


def client_tls(use_tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> ClientTls | None:
    """What the four flags come to; None without TLS. Raises ConfigError."""
    if not use_tls and ca is None and cert is None and key is None:
        return None
    return ClientTls(ca, cert, key)


def _sends(secure: ssl.SSLSocket) -> bool:
    """gRPC servers send first. One that does not like the client's certificate closes instead, after the handshake (TLS 1.3)."""
    try:
        return bool(secure.recv(1))
    except OSError:
        return False


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)


def _no_password() -> str:
    return ""  # otherwise OpenSSL asks for one at the terminal
