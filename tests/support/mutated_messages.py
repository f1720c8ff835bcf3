"""Protobuf messages that are broken on purpose: good ones of any type, and what mutations make of them."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_TEXTS = ["tiny", "plain", "acme", "gold", "user", "assistant", "hello", "", "é", "weight", "x" * 300, "\0"]
_INTEGERS = [0, 1, 2, 5, 100, 269, 2**31 - 1]
_DOUBLES = [0.0, 0.5, 1.0, 2.0, -1.0, math.nan, math.inf, 1e308]
_OVERLONG_VARINT = b"\xff" * 10 + b"\x01"


def filled(rng: random.Random, kind: type[Message]) -> Message:
    """A message of this type, about half of whose fields are set to something that is at least of their type."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[rng.choice(_INTEGERS)] = rng.choice(_DOUBLES)
        elif field.message_type is not None:
            inner = [filled(rng, GetMessageClass(field.message_type)) for _ in range(rng.randint(1, 3))]
            if field.is_repeated:
                getattr(message, field.name).extend(inner)
            else:
                getattr(message, field.name).CopyFrom(inner[0])
        elif field.is_repeated:
            getattr(message, field.name).extend(_scalar(rng, field) for _ in range(rng.randint(1, 4)))
        else:
            setattr(message, field.name, _scalar(rng, field))
    return message


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(_TEXTS)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice(_DOUBLES[:-1])
        case _:
            return rng.choice(_INTEGERS)


def _noise(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]


def _flipped_bit(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _cut_short(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at]


def _taken_out(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + data[at + rng.randint(1, 8) :]


def _twice(rng: random.Random, data: bytes, at: int) -> bytes:
    return data + data[at : at + rng.randint(1, 40)]


def _other_wire_type(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] & ~7 | rng.randrange(8)]) + data[at + 1 :]


def _unknown_field(rng: random.Random, data: bytes, at: int) -> bytes:
    number, kind = rng.randrange(1, 2**29), rng.choice([0, 1, 2, 5])
    value = {0: b"\x01", 1: bytes(8), 2: b"\x03abc", 5: bytes(4)}[kind]
    return data[:at] + _varint(number << 3 | kind) + value + data[at:]


def _overlong_varint(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + _OVERLONG_VARINT + data[at:]


def _nested(rng: random.Random, data: bytes, at: int) -> bytes:
    """Groups, or messages, in one another, deeper than any parser should go."""
    depth = rng.choice([50, 99, 101, 5000])
    if rng.random() < 0.5:
        return data + b"\x0b" * depth + b"\x0c" * depth
    inner = b""
    for _ in range(min(depth, 101)):
        inner = b"\x12" + _varint(len(inner)) + inner
    return data + inner


def _huge_length(rng: random.Random, data: bytes, at: int) -> bytes:
    return (
        data[:at] + bytes([rng.randrange(1, 16) << 3 | 2]) + _varint(rng.choice([2**31 - 1, 2**32, 2**63])) + data[at:]
    )


def _bad_text(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + b"\x0a\x03\xff\xfe\x80" + data[at:]


_MUTATIONS: list[Callable[[random.Random, bytes, int], bytes]] = [
    _noise, _flipped_bit, _cut_short, _taken_out, _twice, _other_wire_type, _unknown_field, _overlong_varint, _nested,
    _huge_length, _bad_text,
]  # fmt: skip


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` after one to three mutations."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_MUTATIONS)(rng, data or b"\0", rng.randrange(len(data) or 1))
    return data


def mutants(seed: int, kinds: dict[str, type[Message]]) -> Iterator[tuple[str, bytes]]:
    """Without end: a method of `kinds`, and bytes that are almost its request. One in eight is not mutated."""
    rng = random.Random(seed)
    names = sorted(kinds)
    while True:
        name = rng.choice(names)
        data = filled(rng, kinds[name]).SerializeToString()
        yield name, data if rng.random() < 1 / 8 else mutated(rng, data)


def _varint(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])
