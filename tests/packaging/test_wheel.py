"""What a built wheel holds."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_bytes
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("bench", "cluster", "model_parallel", "protos", "serving")
DIST_INFO = "packtrain-0.1.0.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    """Built from a copy, since setuptools packs whatever an earlier build left beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").iterdir()
    with ZipFile(path) as archive:
        yield archive


def test_holds_every_module_the_proto_and_its_stubs_and_nothing_else(wheel: ZipFile) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".pyi", ".proto", ".cpp", ".h"}
    }
    assert {name for name in wheel.namelist() if not name.startswith(f"{DIST_INFO}/")} == sources
    assert {Path(name).suffix for name in sources} == {".py", ".pyi", ".proto", ".cpp", ".h"}


def test_metadata(wheel: ZipFile) -> None:
    metadata = message_from_bytes(wheel.read(f"{DIST_INFO}/METADATA"))
    assert metadata["Name"] == "packtrain"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("License-File", [])) == {"LICENSE", "NOTICE"}
    assert wheel.read(f"{DIST_INFO}/licenses/NOTICE") == (ROOT / "NOTICE").read_bytes()


def test_console_script(wheel: ZipFile) -> None:
    assert wheel.read(f"{DIST_INFO}/entry_points.txt").decode().split("\n")[:2] == [
        "[console_scripts]",
        "packtrain = serving.cli.main:main",
    ]
    assert callable(import_module("serving.cli.main").main)
