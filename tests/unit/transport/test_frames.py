"""Framing: whatever happens to the bytes, a wrong message never comes out."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.config import GroupConfig
from model_parallel.errors import ConfigError
from model_parallel.runtime.rank_link import LeaderMessage, Start, Step, Stop
from model_parallel.transport import frames as link
from model_parallel.transport.frames import FrameReader, LinkError, encode_frame
from tests.support.fake_rank import group_config, plan

PAYLOADS = st.lists(st.binary(max_size=300), max_size=5)


def read_all(reader: FrameReader) -> list[bytes]:
    payloads = []
    while (payload := reader.next_payload()) is not None:
        payloads.append(payload)
    return payloads


@given(PAYLOADS, st.integers(1, 64))
def test_payloads_survive_any_cutting_of_the_stream(payloads: list[bytes], piece: int) -> None:
    stream = b"".join(encode_frame(p) for p in payloads)
    reader, received = FrameReader(), []
    for i in range(0, len(stream), piece):
        reader.feed(stream[i : i + piece])
        received += read_all(reader)
    assert received == payloads


@given(PAYLOADS, st.data())
def test_truncated_stream_gives_only_the_whole_frames(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(p) for p in payloads)
    reader = FrameReader()
    reader.feed(stream[: data.draw(st.integers(0, len(stream)))])
    received = read_all(reader)
    assert received == payloads[: len(received)]


@given(PAYLOADS.filter(bool), st.data())
def test_flipped_bit_never_yields_another_message(payloads: list[bytes], data: st.DataObject) -> None:
    stream = bytearray(b"".join(encode_frame(p) for p in payloads))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[bit // 8] ^= 1 << bit % 8
    reader, received = FrameReader(), []
    reader.feed(bytes(stream))
    try:
        while (payload := reader.next_payload()) is not None:
            received.append(payload)
    except LinkError:
        pass
    assert received == payloads[: len(received)]
    assert len(received) < len(payloads)


def test_oversized_frame_is_refused_from_its_header_alone() -> None:
    reader = FrameReader()
    reader.feed((link.MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"\0\0\0\0")
    with pytest.raises(LinkError, match="exceeds the limit"):
        reader.next_payload()


def test_oversized_message_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_FRAME_BYTES", 10)
    encode_frame(b"x" * 10)
    with pytest.raises(LinkError, match="11 bytes exceeds the limit of 10"):
        encode_frame(b"x" * 11)


@pytest.mark.parametrize(
    "message",
    [Start(group_config(3), Rendezvous(bind_host="127.0.0.1", store_path="/x")), Step(plan(1, (2, 3))), Stop()],
)
def test_messages_round_trip(message: LeaderMessage) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=LeaderMessage) == message


def test_decoding_validates_the_configuration() -> None:
    good = msgspec.msgpack.encode(group_config(1))
    bad = good.replace(b"\xa7tp_size\x01", b"\xa7tp_size\x00")
    assert bad != good
    with pytest.raises((ConfigError, msgspec.ValidationError), match="tp_size"):
        msgspec.msgpack.decode(bad, type=GroupConfig)
