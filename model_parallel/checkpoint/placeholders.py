"""Files that are not what their names say: what a download, a clone or a full disk leaves in a checkpoint's place.

Nothing but the first bytes, the lengths and a header of each file is read, so that a directory is judged in milliseconds,
before any library opens it, and all that is wrong with it is said at once.
"""

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from model_parallel.errors import CheckpointError

_HEAD_BYTES = 2048
_LFS = b"version https://git-lfs.github.com/spec/"
_XET = b"# xet version"
_LFS_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body|\?xml|!--)", re.IGNORECASE)
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")
_BINARY_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
GGUF_MAGIC = b"GGUF"
_ZIP, _GZIP = b"PK\x03\x04", b"\x1f\x8b"
_OLD_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""torch.save's before 1.6: a pickle of the number 0x1950a86a20f9469cfc6c."""
_LENGTH_BYTES = 8
MAX_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the library's own bound."""
_QUOTED_CHARS = 60
_NOT_THE_FILE = ("is a link", "is a directory", "is a Git LFS pointer", "is a pointer", "is an HTML page", "is a text")


def is_present(path: Path) -> bool:
    """Whether the directory has an entry of this name. A link to a file that does not exist counts too: the file is meant to be
    there, and opening it raises an error that says what is wrong."""
    return path.exists() or path.is_symlink()


def what_it_is(path: Path) -> str:
    """What a file is instead of what its name says, to follow its path in a sentence; "" when it looks right."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist; download it again"
    if path.is_dir():
        return "is a directory, not a file"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not size:
        return "is empty; download it again"
    if head.startswith(_LFS):
        found = _LFS_SIZE.search(head)
        stands_for = f" to a file of {int(found[1]):,} bytes" if found else ""
        return f"is a Git LFS pointer{stands_for}, not the file itself; run `git lfs pull` in the repository"
    if head.startswith(_XET):
        return "is a pointer of Git Xet, not the file itself; run `git xet checkout`, or download it again"
    if _HTML.match(head):
        return "is an HTML page, which a download got instead of the file; download it again, signed in if need be"
    if path.suffix in _BINARY_SUFFIXES and size <= _HEAD_BYTES and _TEXT.fullmatch(head):
        return f"is a text, {head.decode().strip()[:_QUOTED_CHARS]!r}, not a file of weights; download it again"
    if path.suffix in _BINARY_SUFFIXES and (other := _other_format(path, head)):
        return other
    if path.suffix == ".safetensors":
        return _cut_safetensors(path, size, head)
    if path.suffix in (".bin", ".pth", ".pt"):
        return _cut_archive(path, head)
    return ""


def refuse(paths: Iterable[Path]) -> None:
    """Raise CheckpointError that names every one of these files that is not what its name says, and what it is."""
    problems = [f"{path} {found}" for path in dict.fromkeys(paths) if (found := what_it_is(path))]
    if problems:
        raise CheckpointError("; ".join(problems))


def refuse_pointers(paths: Iterable[Path]) -> None:
    """The same for what is no checkpoint's file at all; when there is such a one, everything else that is wrong is said too."""
    files = tuple(dict.fromkeys(paths))
    if any(what_it_is(path).startswith(_NOT_THE_FILE) for path in files):
        refuse(files)


def _other_format(path: Path, head: bytes) -> str:
    """What a file of weights is, of the formats that people have, where its name says another."""
    header_bytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
    is_safetensors = head[_LENGTH_BYTES:].startswith(b"{") and header_bytes <= MAX_SAFETENSORS_HEADER
    if is_safetensors and path.suffix != ".safetensors":
        return "is a safetensors file; give it the name model.safetensors"
    if head.startswith(GGUF_MAGIC) and path.suffix != ".gguf":
        return "is a GGUF file; give it a name that ends in .gguf, and serve it by that"
    if head.startswith(_ZIP) and path.suffix in (".safetensors", ".gguf"):
        return "is a zip archive, as torch writes; give it the name pytorch_model.bin"
    if head.startswith(_OLD_TORCH):
        return (
            "is of the form that torch wrote before 1.6, which cannot be mapped; write it anew: torch.save(torch.load(FILE, "
            "weights_only=True), FILE)"
        )
    return "is compressed with gzip; unpack it" if head.startswith(_GZIP) else ""


def _cut_safetensors(path: Path, size: int, head: bytes) -> str:
    """Whether a file is shorter or longer than its own header says; what is wrong inside it is the library's to say."""
    header_bytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if size >= _LENGTH_BYTES and header_bytes > MAX_SAFETENSORS_HEADER:
        return ""
    end = _LENGTH_BYTES + header_bytes
    if size >= end:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(end)[_LENGTH_BYTES:])
            end += max((int(t["data_offsets"][1]) for n, t in header.items() if n != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError):
            return ""
    if size < end:
        return f"is cut off: it has {size:,} of {end:,} bytes; download it again"
    return f"is {size - end:,} bytes longer than its header says; download it again" if size > end else ""


def _cut_archive(path: Path, head: bytes) -> str:
    if not head.startswith(_ZIP) or zipfile.is_zipfile(path):
        return ""
    return "is cut off: the end of its archive is missing; download it again"
