"""The header of a GGUF file: metadata and where each tensor lies. Neither torch nor tensor data is touched.

The format's own reader decodes every token of the vocabulary when a file is opened, which takes seconds; here an array
is skipped over and decoded only when it is asked for. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import itertools
import math
import mmap
import os
import struct
import time
from collections.abc import KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from model_parallel.checkpoint.placeholders import GGUF_MAGIC
from model_parallel.errors import CheckpointError

_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
_U32 = _SCALARS[GGUFValueType.UINT32]
_U64 = _SCALARS[GGUFValueType.UINT64]


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """Where one tensor lies."""

    shape: tuple[int, ...]
    """Outermost dimension first, as in torch; the file has it the other way round."""
    type: GGMLQuantizationType
    offset: int
    """From the start of the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        block_size, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block_size * block_bytes


@dataclass(frozen=True, slots=True)
class _Array:
    """An array that was skipped over."""

    item_type: GGUFValueType
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class _Header:
    metadata: Mapping[str, Any]
    """Arrays as `_Array`."""
    tensors: Mapping[str, GgufTensor]


_MAX_KEPT = 8
_kept: dict[tuple[int, ...], _Header] = {}
"""Headers by what identifies a file: a start looks at each file several times, and one of 49,000 tokens takes 25 ms or more."""
_SETTLED_NS = 1_000_000_000
"""After so long a file that changes once more has another time, however coarse the file system's clock is."""


class GgufFile:
    """A mapped GGUF file (version 2 or 3, little-endian). Raises CheckpointError naming the file when it is broken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                state = os.fstat(file.fileno())
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        identity = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
        header = _kept.get(identity)
        if header is None:
            header = _HeaderReader(path, self.data).read()
            if len(_kept) >= _MAX_KEPT:
                _kept.clear()
            if time.time_ns() - state.st_ctime_ns > _SETTLED_NS:
                _kept[identity] = header
        self._metadata = header.metadata
        self.tensors = header.tensors

    @property
    def metadata_keys(self) -> KeysView[str]:
        """Every key that `get` knows."""
        return self._metadata.keys()

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`; an array comes as a list, decoded now."""
        value = self._metadata.get(key, default)
        if not isinstance(value, _Array):
            return value
        if value.item_type is not GGUFValueType.STRING:
            return list(
                struct.unpack_from(f"<{value.length}{_SCALARS[value.item_type].format[1:]}", self.data, value.start)
            )
        data, position, strings = self.data, value.start, []
        try:
            for _ in range(value.length):
                (num_bytes,) = _U64.unpack_from(data, position)
                start, position = position + _U64.size, position + _U64.size + num_bytes
                strings.append(data[start:position].decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} holds a string that is not UTF-8") from error
        return strings

    def array_length(self, key: str) -> int:
        """Number of items of the array `key`; 0 when there is none."""
        value = self._metadata.get(key)
        return value.length if isinstance(value, _Array) else 0


class _HeaderReader:
    """Goes through the header of a file once."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = 0

    def read(self) -> _Header:
        """Raises CheckpointError."""
        try:
            return self._read()
        except struct.error as error:
            raise CheckpointError(f"{self._path} is truncated: its header goes past the end of the file") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self._path} is not a valid GGUF file: a string in its header is not UTF-8"
            ) from error

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is not a valid GGUF file: {message}")

    def _read(self) -> _Header:
        if self._data[:4] != GGUF_MAGIC:
            raise self._fail(f"it begins with {self._data[:4]!r}")
        self._position = 4
        version = self._unpack(_U32)
        if version not in (2, 3):
            raise CheckpointError(
                f"{self._path} is GGUF version {version}; versions 2 and 3, little-endian, can be read"
            )
        num_tensors, num_values = self._unpack(_U64), self._unpack(_U64)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            value_type = self._value_type(key)
            metadata[key] = self._skip_array(key) if value_type is GGUFValueType.ARRAY else self._scalar(value_type)
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._fail(f"general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, tensor_type, offset in infos:
            tensor = GgufTensor(shape=shape, type=tensor_type, offset=start + offset)
            if name in tensors:
                raise self._fail(f"the tensor {name} stands in it twice")
            if tensor.offset + tensor.num_bytes > len(self._data):
                raise CheckpointError(
                    f"{self._path} is truncated: the tensor {name} ends at byte {tensor.offset + tensor.num_bytes} "
                    f"and the file has {len(self._data)}"
                )
            tensors[name] = tensor
        self._check_layout(tensors, alignment)
        return _Header(MappingProxyType(metadata), MappingProxyType(tensors))

    def _check_layout(self, tensors: Mapping[str, GgufTensor], alignment: int) -> None:
        """Tensors are aligned, and none lies in another's bytes."""
        in_order = sorted(tensors.items(), key=lambda item: item[1].offset)
        for name, tensor in in_order:
            if tensor.offset % alignment:
                raise self._fail(f"the tensor {name} begins at byte {tensor.offset}, not a multiple of {alignment}")
        for (first, tensor), (second, following) in itertools.pairwise(in_order):
            if tensor.offset + tensor.num_bytes > following.offset:
                raise self._fail(f"the tensors {first} and {second} overlap")

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        num_dims = self._unpack(_U32)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._fail(f"the tensor {name} has {num_dims} dimensions")
        shape = tuple(self._unpack(_U64) for _ in range(num_dims))[::-1]
        code, offset = self._unpack(_U32), self._unpack(_U64)
        try:
            tensor_type = GGMLQuantizationType(code)
        except ValueError as error:
            raise self._fail(f"the tensor {name} is of the unknown type {code}") from error
        if shape[-1] % GGML_QUANT_SIZES[tensor_type][0]:
            raise self._fail(f"the tensor {name} has rows of {shape[-1]}, not a multiple of {tensor_type.name}'s block")
        return name, shape, tensor_type, offset

    def _unpack(self, scalar: struct.Struct) -> Any:
        (value,) = scalar.unpack_from(self._data, self._position)
        self._position += scalar.size
        return value

    def _string(self) -> str:
        start = self._skip(self._unpack(_U64))
        return self._data[start : self._position].decode()

    def _scalar(self, value_type: GGUFValueType) -> Any:
        return self._string() if value_type is GGUFValueType.STRING else self._unpack(_SCALARS[value_type])

    def _value_type(self, key: str) -> GGUFValueType:
        code = self._unpack(_U32)
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise self._fail(f"{key} is of the unknown type {code}") from error

    def _skip_array(self, key: str) -> _Array:
        item_type = self._value_type(key)
        if item_type is GGUFValueType.ARRAY:
            raise self._fail(f"{key} is an array of arrays")
        array = _Array(item_type, self._unpack(_U64), self._position)
        if item_type is GGUFValueType.STRING:
            # A vocabulary has a hundred thousand: without a call for each.
            data, position, end, unpack_from = self._data, self._position, len(self._data), _U64.unpack_from
            for _ in range(array.length):
                position += 8 + unpack_from(data, position)[0]
                if position > end:
                    raise struct.error
            self._position = position
        else:
            self._skip(array.length * _SCALARS[item_type].size)
        return array

    def _skip(self, num_bytes: int) -> int:
        """Go `num_bytes` on and return where it began."""
        start = self._position
        if num_bytes > len(self._data) - start:
            raise struct.error
        self._position += num_bytes
        return start
