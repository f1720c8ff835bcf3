"""The certificates of both front ends: read and tried out when the gateway starts, not when the first client comes."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from model_parallel.errors import ConfigError
from serving.config import TlsConfig


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates that have been tried."""

    http: ssl.SSLContext
    grpc: grpc.ServerCredentials


def load_tls(config: TlsConfig) -> Tls:
    """Raises ConfigError that names the file and what is wrong with it."""
    chain = _read("certificate", config.certificate)
    key = _read("private_key", config.private_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.certificate, config.private_key, password=_no_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"gateway.tls: {config.certificate} and {config.private_key} are not a certificate and its private key "
            f"in PEM form, without password ({error.reason or error})"
        ) from error
    _try_out(context, config.certificate)
    client_ca = None
    if config.client_ca is not None:
        client_ca = _read("client_ca", config.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(config.client_ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"gateway.tls.client_ca: {config.client_ca} has no certificate in PEM form ({error.reason or error})"
            ) from error
    credentials = grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )
    return Tls(context, credentials)


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"gateway.tls.{field}: {path}: {error.strerror}") from error


def _no_password() -> str:
    return ""  # otherwise OpenSSL asks for one at the terminal


def _try_out(server: ssl.SSLContext, certificate: Path) -> None:
    """Shake hands within memory as a client that trusts the certificate itself: what is left to refuse are its dates."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_end = client.wrap_bio(to_client, to_server)
    server_end = server.wrap_bio(to_server, to_client, server_side=True)
    for end in (client_end, server_end, client_end):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(f"gateway.tls.certificate: {certificate}: {error.verify_message}") from error
        except ssl.SSLError as error:
            raise ConfigError(f"gateway.tls.certificate: {certificate} cannot be used: {error.reason}") from error
