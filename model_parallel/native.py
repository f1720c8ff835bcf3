"""C++ that is compiled with g++ alone and kept for the next time, below the cache directory.

Where there is no compiler, what was compiled before is used. `python -m model_parallel.native` compiles ahead of time what ranks
of this machine load; it needs nothing but the standard library. The kernels of each instruction set are a library of their own,
because each takes a core many seconds, and a rank needs one of them.
"""

import argparse
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from model_parallel.directories import private_directories, readable_caches, why_not_writable
from model_parallel.errors import ConfigError, EngineError

ISA_VARIABLE = "PACKTRAIN_CPU_ISA"
INSTRUCTION_SETS: tuple[str, ...] = (
    ("avx512_bf16", "avx512", "avx2", "scalar") if platform.machine() == "x86_64" else ("scalar",)
)
"""The best one first. A machine that has one has those after it."""
BUILD_TIMEOUT_S = 600.0
"""Of one source: seconds on an idle machine."""
_LOCK_POLL_S = 0.05
_COMPILER = "g++"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread")
_PACKAGE = Path(__file__).parent


class NativeBuildError(EngineError):
    """There is no compiler, or it refused the source. The message ends with the compiler's own words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One shared library and what it is made from."""

    name: str
    directory: Path
    flags: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    """Names of the .cpp files that it is made of, with all headers of the directory; all of them unless given."""

    @property
    def sources(self) -> tuple[Path, ...]:
        """Headers included; compiled are those that end in .cpp."""
        code = (path for path in self.directory.iterdir() if path.suffix == ".cpp")
        taken = [path for path in code if not self.only or path.name in self.only]
        return tuple(sorted([*taken, *self.directory.glob("*.h")]))

    @property
    def source_id(self) -> str:
        """Hash of everything that it is made from, but the compiler."""
        digest = hashlib.sha256("\0".join((platform.machine(), *_FLAGS, *self.flags)).encode())
        for source in self.sources:
            digest.update(hashlib.sha256(source.read_bytes()).digest())
        return digest.hexdigest()[:24]


CPU_KERNELS = Library(
    name="cpu_kernels",
    directory=_PACKAGE / "kernels" / "cpu",
    only=("api.cpp", "pool.cpp"),
    # A fused multiply-add where the source has none would depend on how a loop was unrolled. GCC 12 warns of its own intrinsics.
    flags=("-std=c++20", "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
CPU_OPERATIONS = {
    isa: replace(
        CPU_KERNELS,
        name=f"cpu_{isa}",
        only=("products.cpp", "group_products.cpp", "operations.cpp"),
        flags=(*CPU_KERNELS.flags, f"-DISA_{isa.upper()}"),
    )
    for isa in INSTRUCTION_SETS
}
"""What CPU_KERNELS calls, by instruction set."""
SHARED_MEMORY = Library(name="shared_memory", directory=_PACKAGE / "collectives" / "shared_memory")
LIBRARIES = (CPU_KERNELS, SHARED_MEMORY, *CPU_OPERATIONS.values())


def library_directories(*, create: bool = False) -> Iterator[Path]:
    """Where compiled libraries are looked for; they are written to the first that takes them, which `create` is for."""
    yield from (cache / "native" for cache in readable_caches())
    yield from (directory / "native" for directory in private_directories(create=create))


def load_library(library: Library) -> ctypes.CDLL:
    """Built unless it is there. Calls through it release the interpreter's lock. Safe from several processes at once, of
    which one builds and the others wait. Raises NativeBuildError."""
    compiler = shutil.which(_COMPILER)
    if compiler is None:
        if (loaded := _load_any(library)) is not None:
            return loaded
        raise NativeBuildError(
            f"{_COMPILER} is not installed, and nothing compiled before is in {next(library_directories())}"
        )
    try:
        return _load_or_build(library, compiler)
    except NativeBuildError:
        if (loaded := _load_any(library)) is not None:
            return loaded
        raise


def machine_instruction_sets(kernels: ctypes.CDLL) -> tuple[str, ...]:
    """Those of INSTRUCTION_SETS that this machine has, by CPU_KERNELS, which is loaded."""
    return tuple(isa for isa in INSTRUCTION_SETS if kernels.packtrain_has_isa(isa.encode()))


def chosen_instruction_set(kernels: ctypes.CDLL, wanted: str = "") -> str:
    """What a rank computes with: what is wanted here or by PACKTRAIN_CPU_ISA, or else the best one.

    Raises EngineError when the machine lacks it.
    """
    wanted = wanted or os.environ.get(ISA_VARIABLE, "")
    available = machine_instruction_sets(kernels)
    if wanted and wanted not in available:
        raise EngineError(
            f"this machine does not have {wanted}; {ISA_VARIABLE} is {', '.join(INSTRUCTION_SETS)} or not set"
        )
    return wanted or available[0]


def check_wanted_instruction_set() -> None:
    """Whether PACKTRAIN_CPU_ISA names one; whether the machine has it is known when the kernels are compiled. Raises
    ConfigError."""
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted and wanted not in INSTRUCTION_SETS:
        raise ConfigError(f"{ISA_VARIABLE} is {wanted!r} and must be one of {', '.join(INSTRUCTION_SETS)}, or not set")


def is_ready() -> bool:
    """Whether all that ranks of this machine load is compiled."""
    if not (is_compiled(CPU_KERNELS) and is_compiled(SHARED_MEMORY)):
        return False
    with suppress(EngineError):
        return is_compiled(CPU_OPERATIONS[chosen_instruction_set(load_library(CPU_KERNELS))])
    return False


def is_compiled(library: Library) -> bool:
    """Whether something made from these sources is kept where `load_library` looks first; a quick look."""
    with suppress(OSError):
        return any(any(directory.glob(f"{library.source_id}-*.so")) for directory in library_directories())
    return False


def _load_or_build(library: Library, compiler: str) -> ctypes.CDLL:
    command = [compiler, *_FLAGS, *library.flags]
    name = f"{library.source_id}-{_compiler_id(compiler)}.so"
    for directory in library_directories():
        if (loaded := _load(directory / name)) is not None:
            return loaded
    reasons = []
    for directory in library_directories(create=True):
        if reason := why_not_writable(directory):
            reasons.append(f"{directory} {reason}")
            continue
        with _alone(directory / f"{name}.lock"):
            if (loaded := _load(directory / name)) is None:
                _build(command, library, directory / name)
                loaded = _load(directory / name)
        if loaded is not None:
            return loaded
        reasons.append(f"code in {directory} may not be run")
    raise NativeBuildError(f"there is no directory for compiled code: {'; '.join(reasons)}")


def _load_any(library: Library) -> ctypes.CDLL | None:
    """Made from the same sources, by whatever compiler."""
    for directory in library_directories():
        with suppress(OSError):
            for path in sorted(directory.glob(f"{library.source_id}-*.so")):
                if (loaded := _load(path)) is not None:
                    return loaded
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    """None when it is not there or cannot be loaded: made for another system, or on a noexec mount."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


@cache
def _compiler_id(compiler: str) -> str:
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, check=True, timeout=BUILD_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"{compiler} cannot be run: {error}") from error
    return hashlib.sha256(version).hexdigest()[:8]


@contextmanager
def _alone(lock_path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system drops it when its holder ends in any way. Raises NativeBuildError."""
    deadline = time.monotonic() + 2 * BUILD_TIMEOUT_S
    with lock_path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NativeBuildError(f"another process holds {lock_path} and does not finish") from None
                time.sleep(_LOCK_POLL_S)
        yield


def _build(command: Sequence[str], library: Library, target: Path) -> None:
    """Compile all sources at the same time, then link. No compiler is left running, however this ends."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        compiled = [source for source in library.sources if source.suffix == ".cpp"]
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in compiled]
        unfinished = str(Path(scratch) / "library.so")
        running: list[subprocess.Popen[str]] = []
        compile_one = partial(_compile, command, {"TMPDIR": scratch}, running)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            jobs = [("-c", str(source), "-o", made) for source, made in zip(compiled, objects, strict=True)]
            futures = [pool.submit(compile_one, job) for job in jobs]
            try:
                for future in futures:
                    future.result()
                pool.submit(compile_one, (*objects, "-o", unfinished)).result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):
                    _kill(process)
                raise
        os.replace(unfinished, target)


def _compile(
    command: Sequence[str],
    variables: dict[str, str],
    running: "list[subprocess.Popen[str]]",
    arguments: Sequence[str],
) -> None:
    """Run the compiler once. `variables` go before the environment's own, whose TMPDIR may be full or missing."""
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        env=os.environ | variables,
        process_group=0,  # g++ is a driver: what computes is a child of it
    )  # fmt: skip
    running.append(process)
    try:
        _, errors = process.communicate(timeout=BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{_COMPILER} did not finish within {BUILD_TIMEOUT_S:g} s") from error
    finally:
        _kill(process)
        assert process.stderr is not None
        process.stderr.close()  # which is open still when it did not finish
    if process.returncode:
        raise NativeBuildError(f"{_COMPILER} failed:\n{errors[-4000:]}")


def _kill(process: "subprocess.Popen[str]") -> None:
    """With its children. Does nothing when it has ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Build libraries ahead of time. The status is 1 when one cannot be built."""
    parser = argparse.ArgumentParser(prog="python -m model_parallel.native", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--machine", action="store_true", help="every instruction set that this machine has, as tests use"
    )
    which.add_argument("--all", action="store_true", help="every instruction set, for other machines")
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        kernels = load_library(CPU_KERNELS)
        if parsed.all:
            chosen = INSTRUCTION_SETS
        else:
            chosen = machine_instruction_sets(kernels) if parsed.machine else (chosen_instruction_set(kernels),)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    status = 0
    for library in (SHARED_MEMORY, *(CPU_OPERATIONS[isa] for isa in chosen)):
        try:
            load_library(library)
        except NativeBuildError as error:
            print(f"{library.name}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
