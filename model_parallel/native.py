"""C++ that is compiled when it is first needed, with g++ alone, and kept for the next time."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from model_parallel.errors import EngineError

BUILD_TIMEOUT_S = 120.0
_COMPILER = "g++"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread")


class NativeBuildError(EngineError):
    """There is no compiler, or it refused the source. The message ends with the compiler's own words."""


def library_directory() -> Path:
    """Where compiled libraries are kept, by the hash of everything that they were made from."""
    return Path.home() / ".cache" / "packtrain" / "native"


def load_library(sources: Sequence[Path], *, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library made from `sources` (headers included, compiled are those that end in .cpp), built unless it is there.

    Calls through it release the interpreter's lock. Safe from several processes at once. Raises NativeBuildError.
    """
    compiler = shutil.which(_COMPILER)
    if compiler is None:
        raise NativeBuildError(f"{_COMPILER} is not installed")
    command = [compiler, *_FLAGS, *flags]
    target = library_directory() / f"{_fingerprint(command, sources)}.so"
    if not target.exists():
        _build(command, sources, target)
    return ctypes.CDLL(str(target))


def _fingerprint(command: Sequence[str], sources: Sequence[Path]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=BUILD_TIMEOUT_S).stdout
    digest = hashlib.sha256(version + "\0".join(command).encode())
    for source in sources:
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _build(command: Sequence[str], sources: Sequence[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        compiled = [str(source) for source in sources if source.suffix == ".cpp"]
        result = subprocess.run(
            [*command, *compiled, "-o", unfinished],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
        if result.returncode:
            raise NativeBuildError(f"{_COMPILER} failed:\n{result.stderr[-4000:]}")
        os.replace(unfinished, target)
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{_COMPILER} did not finish within {BUILD_TIMEOUT_S:g} s") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
