"""Client commands against a gateway with TLS, and what they say when it does not come about."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bench.support.fake_backend import FakeBackend, card
from model_parallel.errors import ConfigError
from serving.cli.main import app
from serving.client.tls import ClientTls, client_tls
from serving.config import TlsConfig
from tests.support.certificates import Authority, Pair
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import running


@dataclass
class Pki:
    """Whom the gateway shows and trusts, and a stranger."""

    authority: Authority
    other: Authority
    client: Pair
    stranger: Pair


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    return Pki(authority, other, authority.issue("client"), other.issue("stranger"))


@asynccontextmanager
async def gateway(pki: Pki, *, is_mutual: bool = False, is_plain: bool = False) -> AsyncIterator[str]:
    """Its address."""
    pair = pki.authority.issue("server")
    client_ca = pki.authority.path if is_mutual else None
    tls = TlsConfig(certificate=pair.certificate, private_key=pair.private_key, client_ca=client_ca)
    async with running(FakeBackend(cards=[card("tiny")]), tls=None if is_plain else tls) as served:
        yield served.target


async def packtrain(*arguments: str | Path) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, [str(argument) for argument in arguments])


def showing(pair: Pair) -> tuple[str | Path, ...]:
    return "--cert", pair.certificate, "--key", pair.private_key


async def test_commands_speak_tls(pki: Pki) -> None:
    async with gateway(pki) as address:
        generated = await packtrain(
            "generate", "hi", "--max-tokens", "9", "--address", address, "--ca", pki.authority.path
        )
        assert generated.stdout == "Paris\n", generated.output
        listed = await packtrain("models", "--address", address, "--tls", "--cacert", pki.authority.path)
        assert "tiny" in listed.output


async def test_commands_show_their_certificate(pki: Pki, tmp_path: Path) -> None:
    async with gateway(pki, is_mutual=True) as address:
        flags = ("--ca", pki.authority.path, *showing(pki.client))
        generated = await packtrain("generate", "hi", "--max-tokens", "9", "--address", address, *flags)
        assert generated.stdout == "Paris\n"
        file, lengths = tmp_path / "load.json", ("--num-prompts", "3", "--input-len", "2", "--output-len", "6")
        # It handles signals, so it needs a process of its own.
        command = (sys.executable, "-c", "from serving.cli.main import main; main()", "load")
        loaded = await asyncio.create_subprocess_exec(
            *command, "--target", f"grpcs://{address}", *flags, *lengths, "--json", file
        )
        assert await asyncio.wait_for(loaded.wait(), PATIENCE_S) == 0
        assert json.loads(file.read_text())["completed"] == 3


Flags = Callable[[Pki], tuple[str | Path, ...]]
FAILURES: list[tuple[Flags, dict[str, bool], str]] = [
    (lambda pki: ("--ca", pki.other.path), {}, "the server's certificate is not trusted: unable to get local issuer"),
    (lambda pki: ("--ca", pki.authority.path), {"is_mutual": True}, "the server asks for a certificate; give one"),
    (
        lambda pki: ("--ca", pki.authority.path, *showing(pki.stranger)),
        {"is_mutual": True},
        "the server does not accept the certificate",
    ),
    (lambda pki: ("--tls",), {"is_plain": True}, "perhaps the server speaks without TLS"),
]


@pytest.mark.parametrize(("flags", "kind", "message"), FAILURES)
async def test_a_failure_of_tls_is_told(pki: Pki, flags: Flags, kind: dict[str, bool], message: str) -> None:
    async with gateway(pki, **kind) as address:
        result = await packtrain("models", "--address", address, *flags(pki))
    assert isinstance(result.exception, ConnectionError)
    assert f"TLS with {address} fails: " in str(result.exception)
    assert message in str(result.exception)


def test_nobody_there_is_not_a_matter_of_tls(pki: Pki) -> None:
    assert ClientTls(pki.authority.path, None, None).problem("127.0.0.1:9") == ""


def test_without_flags_there_is_no_tls() -> None:
    assert client_tls(False, None, None, None) is None


def test_wrong_files_are_named_before_anything_is_sent(pki: Pki, tmp_path: Path) -> None:
    pair, missing = pki.client, tmp_path / "nowhere.pem"
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    wrong: list[tuple[tuple[Path | None, Path | None, Path | None], str]] = [
        ((None, pair.certificate, None), "--cert and --key must be given together"),
        ((None, None, pair.private_key), "--cert and --key must be given together"),
        ((missing, None, None), "--ca: .*nowhere.pem is not a file"),
        ((None, missing, pair.private_key), "--cert: .*nowhere.pem is not a file"),
        ((empty, None, None), "--ca: .*empty.pem has no certificate in PEM form"),
        ((None, pair.certificate, pki.stranger.private_key), r"--cert .*client.pem and --key .*stranger.key .*\(KEY_VALUES"),
    ]  # fmt: skip
    for files, message in wrong:
        with pytest.raises(ConfigError, match=message):
            ClientTls(*files)


def test_an_api_key_that_is_taken_for_the_files_name_is_not_repeated(pki: Pki) -> None:
    with pytest.raises(ConfigError) as refused:
        ClientTls(None, pki.client.certificate, Path("pt_3f0c5a1b2d4e6f70_secret"))
    assert "--key" in str(refused.value)
    assert "secret" not in str(refused.value)
