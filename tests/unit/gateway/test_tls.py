"""Both front ends over TLS, with and without certificates of clients; and what is wrong with certificates, told at start."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.config import TlsConfig
from serving.gateway.tls import load_tls
from tests.support.certificates import Authority, Pair
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import running
from tests.unit.gateway.http_client import COMPLETION

ASK = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))


def context_of(authority: Authority, pair: Pair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.path)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.private_key)
    return context


async def ask_both(config: TlsConfig, authority: Authority, pair: Pair | None) -> None:
    """A request over each front end, as a client that trusts `authority` and shows `pair`."""
    async with running(http_port=0, tls=config) as gateway:
        url = f"https://127.0.0.1:{gateway.http_port}"
        async with httpx2.AsyncClient(base_url=url, verify=context_of(authority, pair)) as http:
            answer = await http.post("/v1/completions", json=COMPLETION | {"stream": True})
            assert answer.text.endswith("data: [DONE]\n\n")
        files = (None, None) if pair is None else (pair.private_key.read_bytes(), pair.certificate.read_bytes())
        credentials = grpc.ssl_channel_credentials(authority.path.read_bytes(), *files)
        async with grpc.aio.secure_channel(gateway.target, credentials) as channel:
            stub: Any = InferenceStub(channel)
            assert (await stub.Generate(ASK, timeout=PATIENCE_S)).choices[0].text == "Paris"


async def test_both_front_ends_speak_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    await ask_both(TlsConfig(certificate=pair.certificate, private_key=pair.private_key), authority, None)


async def test_clients_must_show_a_certificate_of_the_right_authority(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pair = authority.issue("server")
    config = TlsConfig(certificate=pair.certificate, private_key=pair.private_key, client_ca=authority.path)
    await ask_both(config, authority, authority.issue("client"))
    for stranger in (None, other.issue("stranger")):
        with pytest.raises((httpx2.TransportError, ssl.SSLError)):
            await ask_both(config, authority, stranger)


async def test_strangers_are_refused_over_grpc_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    tls = TlsConfig(certificate=pair.certificate, private_key=pair.private_key, client_ca=authority.path)
    credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
    async with running(tls=tls) as gateway, grpc.aio.secure_channel(gateway.target, credentials) as channel:
        stub: Any = InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ASK, timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert gateway.backend.requests == []


def missing(authority: Authority, pair: Pair, directory: Path) -> TlsConfig:
    return TlsConfig(certificate=pair.certificate, private_key=directory / "nowhere.key")


def mismatched(authority: Authority, pair: Pair, directory: Path) -> TlsConfig:
    return TlsConfig(certificate=pair.certificate, private_key=authority.issue("other").private_key)


def not_pem(authority: Authority, pair: Pair, directory: Path) -> TlsConfig:
    (directory / "text.pem").write_text("hello")
    return TlsConfig(certificate=directory / "text.pem", private_key=pair.private_key)


def expired(authority: Authority, pair: Pair, directory: Path) -> TlsConfig:
    old = authority.issue("old", days=-1)
    return TlsConfig(certificate=old.certificate, private_key=old.private_key)


def no_authority(authority: Authority, pair: Pair, directory: Path) -> TlsConfig:
    return TlsConfig(certificate=pair.certificate, private_key=pair.private_key, client_ca=pair.private_key)


@pytest.mark.parametrize(
    ("broken", "parts"),
    [
        (missing, ["private_key", "nowhere.key", "No such file"]),
        (mismatched, ["server.pem", "other.key", "private key"]),
        (not_pem, ["text.pem", "PEM"]),
        (expired, ["old.pem", "expired"]),
        (no_authority, ["client_ca", "server.key"]),
    ],
)
def test_bad_certificates_are_told_at_start(
    broken: Callable[[Authority, Pair, Path], TlsConfig], parts: list[str], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    config = broken(authority, authority.issue("server"), tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_tls(config)
    for part in parts:
        assert part in str(caught.value)
