"""Frames on a byte stream: length (u32) · CRC32 of length and payload (u32) · payload. Big-endian."""

import struct
import zlib

MAX_FRAME_BYTES = 64 << 20
_HEADER = struct.Struct("!II")


class LinkError(Exception):
    """The peer is gone, sent something that is not a frame, or is not who it must be."""


def encode_frame(payload: bytes) -> bytes:
    """Raises LinkError for a payload over MAX_FRAME_BYTES."""
    if len(payload) > MAX_FRAME_BYTES:
        raise LinkError(f"a message of {len(payload)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(payload), _checksum(payload)) + payload


class FrameReader:
    """Cuts a byte stream into payloads. After an error the stream is of no use: its borders are lost."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take(self, num_bytes: int) -> bytes | None:
        """The next `num_bytes` as they are, or None until more is fed. For a handshake before the first frame."""
        if len(self._buffer) < num_bytes:
            return None
        taken = bytes(self._buffer[:num_bytes])
        del self._buffer[:num_bytes]
        return taken

    def next_payload(self) -> bytes | None:
        """The next whole payload, or None until more is fed. Raises LinkError for an oversized or damaged frame."""
        if len(self._buffer) < _HEADER.size:
            return None
        length, checksum = _HEADER.unpack_from(self._buffer)
        if length > MAX_FRAME_BYTES:
            raise LinkError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        if _checksum(payload) != checksum:
            raise LinkError(f"the checksum of a frame of {length} bytes does not match")
        return payload


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(len(payload).to_bytes(4, "big")))
