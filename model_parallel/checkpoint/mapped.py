"""Tensors in mapped files, safetensors or torch's, and copying them out without keeping the files in memory.

Both kinds of file are mapped the way `torch.load(mmap=True)` does: privately and by the file's name, so that a tensor is a
view of the file and only what is copied is read.
"""

import json
import mmap
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model_parallel.checkpoint.stored import StoredTensor
from model_parallel.errors import CheckpointError
from model_parallel.host_memory import advise

SAFETENSORS_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAFETENSORS_WHOLE = {"I32": torch.int32, "I64": torch.int64}
_SAFETENSORS_FP8 = {"F8_E4M3": torch.float8_e4m3fn}
"""Parts of quantised weights."""
_FLOATS = frozenset(SAFETENSORS_FLOATS.values())
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""
_MAX_PICKLE_BYTES = 64 << 20
# A zip member: a header with the lengths of its name and of an extra field, these, the data, and perhaps a descriptor.
_ZIP_HEADER_BYTES = 30
_ZIP_LENGTHS_OFFSET = 26
_ZIP_LENGTHS = struct.Struct("<HH")
_ZIP_DESCRIPTOR_BYTES = 24
_UNKNOWN_GLOBAL = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")
"""In what torch says of a pickle that holds more than tensors."""
_CHUNK_BYTES = 16 << 20
"""Copied at a time: so much of a file is in this process's memory at once."""


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Raises CheckpointError naming a file that is not valid: the library checks lengths, offsets, types and overlaps."""
    try:
        with safe_open(path, framework="pt") as library, path.open("rb") as file:
            names = set(library.keys())
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(header_bytes))
        data = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    except Exception as error:  # whatever the libraries raise, the file is at fault
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
    tensors = {}
    for name in names:
        kind, shape = header[name]["dtype"], tuple(header[name]["shape"])
        dtype = (SAFETENSORS_FLOATS | _SAFETENSORS_WHOLE | _SAFETENSORS_FP8).get(kind)
        mapped = None
        if dtype is not None:
            start, stop = (_LENGTH_BYTES + header_bytes + offset for offset in header[name]["data_offsets"])
            mapped = torch.empty(0, dtype=dtype).set_(data[start:stop], 0, shape)  # type: ignore[call-overload]
        tensors[name] = StoredTensor(file=path, shape=shape, type=kind, readable=dtype in _FLOATS, mapped=mapped)
    return tensors


def open_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Raises CheckpointError naming a file that is broken, or that holds anything besides tensors by name.

    Its pickle is read by torch's own restricted reader, which knows tensors and plain containers and runs nothing else.
    """
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # a broken pickle can raise anything; the first line says what, the rest is torch's advice
        if found := _UNKNOWN_GLOBAL.search(str(error)):
            raise CheckpointError(
                f"{path} holds objects ({found[1]:.80}), which are code and not made here; save the weights alone: "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read as weights alone: {type(error).__name__}: {reason:.200}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; tensors by name are needed")
    return {name: _checked(path, name, value) for name, value in content.items()}


def _check_archive(path: Path) -> None:
    """A torch file is a zip whose members are stored, not compressed, and lie one after another.

    What is compressed could not be mapped, and could grow without bound when it is read.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        names = [member.filename for member in members]
        if len(set(names)) < len(names):
            raise CheckpointError(f"{path} holds two members of one name")
        starts = [*(member.header_offset for member in members), archive.start_dir]
        for member, following in zip(members, starts[1:], strict=True):
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise CheckpointError(f"{path}: {member.filename} is compressed; torch stores weights as they are")
            if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: {member.filename} has {member.file_size} bytes; {_MAX_PICKLE_BYTES} is the most"
                )
            archive.open(member).close()  # checks its own header against the archive's directory
            file.seek(member.header_offset + _ZIP_LENGTHS_OFFSET)
            data = member.header_offset + _ZIP_HEADER_BYTES + sum(_ZIP_LENGTHS.unpack(file.read(_ZIP_LENGTHS.size)))
            if not 0 <= following - (data + member.file_size) <= _ZIP_DESCRIPTOR_BYTES:
                raise CheckpointError(
                    f"{path}: {member.filename} does not lie where the archive's directory has room for it"
                )


def _checked(path: Path, name: object, value: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(f"{path} holds {type(value).__name__} {name!r:.80}; only tensors by name can be read")
    tensor = value.detach()
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise CheckpointError(
            f"{path}: {name} is not stored as one plain array ({tensor.device}, {tensor.layout}), or not in its order; save the "
            "file anew with tensor.cpu().contiguous() in its place"
        )
    if tensor.data_ptr() % tensor.element_size():
        raise CheckpointError(f"{path}: {name} does not lie at a multiple of its {tensor.element_size()} bytes")
    return StoredTensor(
        file=path, shape=tuple(tensor.shape), type=kind, readable=tensor.dtype in _FLOATS, mapped=tensor
    )


def copy_mapped(source: Tensor, out: Tensor) -> None:
    """Copy (a part of) a mapped tensor, converting to `out`'s dtype and device, a piece at a time.

    `source` and `out` have the same shape. The pieces' pages are given back as soon as they are copied: they stay in the
    system's cache for the host's other ranks, but this process's memory holds the shard alone.
    """
    if source.ndim == 0 or source.numel() == 0:
        out.copy_(source)
        return
    step = max(1, _CHUNK_BYTES // (source.stride(0) * source.element_size()))
    for start in range(0, len(source), step):
        part = source[start : start + step]
        out[start : start + step].copy_(part)
        # From the part's first element to its last: never beyond the mapping, whose pages are the file's own.
        last = sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
        advise(part.data_ptr(), (last + 1) * part.element_size(), mmap.MADV_DONTNEED)
