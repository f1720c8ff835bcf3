"""Addresses as people write them."""

import asyncio
import errno
import socket

import pytest

from model_parallel.errors import ConfigError
from serving.contracts.addresses import (
    Target,
    explain_listening,
    host_port,
    is_loopback,
    listening_addresses,
    open_listener,
    parse_target,
    plain_host,
    resolve,
    to_connect_to,
    why_not_listening,
    without_brackets,
)
from tests.support.waiting import PATIENCE_S


@pytest.mark.parametrize(
    ("text", "address", "uses_tls"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051", False),
        ("localhost:7", "localhost:7", False),
        ("localhost", "localhost:50051", False),
        ("50052", "127.0.0.1:50052", False),
        (":50052", "127.0.0.1:50052", False),
        ("http://127.0.0.1:50051", "127.0.0.1:50051", False),
        ("http://127.0.0.1:50051/v1", "127.0.0.1:50051", False),
        ("HTTP://Host:1/", "Host:1", False),
        ("https://gateway.example:443", "gateway.example:443", True),
        ("https://gateway.example", "gateway.example:50051", True),
        ("grpc://user@h:3", "h:3", False),
        ("grpcs://h:3", "h:3", True),
        ("[::1]:50051", "[::1]:50051", False),
        ("[::1]", "[::1]:50051", False),
        ("::1", "[::1]:50051", False),
        ("http://[::1]:8/v1", "[::1]:8", False),
        ("fe80::1%eth0", "[fe80::1%eth0]:50051", False),
        ("  127.0.0.1:9 ", "127.0.0.1:9", False),
        ("127.1:9", "127.0.0.1:9", False),
        ("127.1", "127.0.0.1:50051", False),
        ("http://0x7f000001:9", "127.0.0.1:9", False),
        ("[0:0:0:0:0:0:0:1]:9", "[::1]:9", False),
        ("dns:///gateway:50051", "dns:///gateway:50051", False),
        ("unix:/run/x.sock", "unix:/run/x.sock", False),
    ],
)
def test_a_target_is_understood(text: str, address: str, uses_tls: bool) -> None:
    assert parse_target(text) == Target(address, uses_tls)


@pytest.mark.parametrize(
    "text", ["ftp://h:1", "h:0", "h:65536", "h:x", "70000", "a/b:1", "1:2:3", "h:", "h:²", "", "http://", "https:///v1"]
)
def test_what_is_no_target_is_refused_by_the_flags_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--address"):
        parse_target(text)


def test_brackets() -> None:
    assert host_port("::1", 5) == "[::1]:5" and host_port("h", 5) == "h:5"
    assert without_brackets("[::1]") == "::1" == without_brackets("::1")
    assert to_connect_to("0.0.0.0") == "127.0.0.1" and to_connect_to("::") == "::1" and to_connect_to("h") == "h"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert Target(host_port(host, 1)).is_on_this_machine


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "address", "at"),
    [
        ("127.1", "127.0.0.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1", "127.0.0.1"),
        ("0177.0.0.2", "127.0.0.2", "127.0.0.2"),
        ("0", "0.0.0.0", "127.0.0.1"),
        ("0:0::0", "::", "::1"),
        ("2001:DB8::1", "2001:db8::1", "2001:db8::1"),
    ],
)
def test_another_form_of_an_address_is_printed_so_that_it_can_be_pasted(host: str, address: str, at: str) -> None:
    assert resolve(host) == [address]
    assert to_connect_to(host) == at
    assert plain_host(host) == address


@pytest.mark.parametrize(
    "host", ["h", "localhost", "127.0.0.1 h", "256.1", "1.2.3.4.5", "fe80::1%eth0", "ü.example", ""]
)
def test_what_is_no_other_form_of_an_address_stays(host: str) -> None:
    assert plain_host(host) == host


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "0"])
def test_a_client_of_a_wildcard_means_this_machine(host: str) -> None:
    assert parse_target(f"{host}:1").is_on_this_machine


def test_a_name_stands_for_each_of_its_addresses_once() -> None:
    def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
        entries = ("::1", "127.0.0.1", "::1")
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 0)) for address in entries]

    assert resolve("here", look_up) == ["::1", "127.0.0.1"]


def test_a_name_that_does_not_resolve_is_named() -> None:
    def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(ConfigError, match=r"'nowhere'.*Name or service not known"):
        resolve("nowhere", look_up)


def test_why_an_address_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert why_not_listening("127.0.0.1", port) == errno.EADDRINUSE
        assert explain_listening(errno.EADDRINUSE, "127.0.0.1", port) == f"127.0.0.1:{port} is in use"
    assert why_not_listening("127.0.0.1", port) == 0
    assert why_not_listening("192.0.2.7", 0) == errno.EADDRNOTAVAIL
    assert why_not_listening("::1%lo", 0) == why_not_listening("fe80::1%no-such0", 0) == errno.EADDRNOTAVAIL
    assert "not an address of this machine" in explain_listening(errno.EADDRNOTAVAIL, "192.0.2.7", 0)
    assert "below 1024" in explain_listening(errno.EACCES, "127.0.0.1", 80)


def test_every_address_of_a_name_that_this_machine_has_is_listened_on() -> None:
    assert listening_addresses("127.0.0.1") == ["127.0.0.1"]
    assert set(listening_addresses("localhost")) <= {"127.0.0.1", "::1"}


def test_the_ipv6_wildcard_takes_ipv4_as_well() -> None:
    try:
        sock = open_listener("::", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with sock:
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0


async def test_small_writes_to_a_client_are_sent_at_once() -> None:
    """Nagle's algorithm would keep the body of an answer back until its head is acknowledged."""
    is_off = asyncio.get_running_loop().create_future()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        is_off.set_result(bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(accept, sock=open_listener("127.0.0.1", 0)) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
            assert await is_off
        writer.close()
        await writer.wait_closed()
