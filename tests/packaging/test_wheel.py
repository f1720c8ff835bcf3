"""What a built wheel holds."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from email import message_from_bytes
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest

from model_parallel.directories import cache_directory
from serving import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("bench", "cluster", "model_parallel", "protos", "serving")
SUFFIXES = {".py", ".pyi", ".proto", ".cpp", ".h", ".typed"}
DATA = ("bench/simulation/profiles/*.json", "bench/simulation/scenarios/*.yaml", "serving/driver/chart.json")
DIST_INFO = f"packtrain-{__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> Iterator[ZipFile]:
    with ZipFile(wheel_path) as archive:
        yield archive


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return path


def test_holds_every_module_the_proto_and_its_stubs_and_nothing_else(wheel: ZipFile) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in SUFFIXES
    }
    data = {path.relative_to(ROOT).as_posix() for pattern in DATA for path in ROOT.glob(pattern)}
    assert {name for name in wheel.namelist() if not name.startswith(f"{DIST_INFO}/")} == sources | data
    assert {Path(name).suffix for name in sources} == SUFFIXES
    assert {f"{package}/py.typed" for package in PACKAGES} <= sources


def test_metadata(wheel: ZipFile) -> None:
    metadata = message_from_bytes(wheel.read(f"{DIST_INFO}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("packtrain", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("License-File", [])) == {"LICENSE", "NOTICE"}
    assert wheel.read(f"{DIST_INFO}/licenses/NOTICE") == (ROOT / "NOTICE").read_bytes()


def test_console_script(wheel: ZipFile) -> None:
    assert wheel.read(f"{DIST_INFO}/entry_points.txt").decode().split("\n")[:2] == [
        "[console_scripts]",
        "packtrain = serving.cli.__main__:main",
    ]
    assert callable(import_module("serving.cli.__main__").main)


def _environment(directory: Path) -> dict[str, str]:
    """As after login: nothing that points to a checkout, and the models that are there already."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "PYTEST"))}
    return kept | {"PACKTRAIN_CACHE": str(cache_directory()), "PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}


def _run(environment: Path, *command: str, timeout_s: float = 1000) -> subprocess.CompletedProcess[str]:
    """From a directory that has nothing to do with a checkout."""
    return subprocess.run(
        command,
        cwd=environment,
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _serves(environment: Path) -> None:
    done = _run(environment, "packtrain", "--version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n"), done.stderr
    done = _run(environment, "packtrain", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout
    assert "Traceback" not in done.stderr and "INFO" not in done.stderr, done.stderr


@pytest.mark.timeout(1200)
def test_the_demo_runs_from_the_wheel_outside_of_a_checkout(wheel_path: Path, tmp_path: Path) -> None:
    """What the wheel depends on comes from this environment, of which only the packages are seen: no project of its own."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Without --ignore-installed pip would take this environment's own installation away.
    flags = ["--no-deps", "--no-index", "--ignore-installed", "--prefix", str(environment)]
    command = [sys.executable, "-m", "pip", "install", *flags, str(wheel_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    script = environment / "bin" / "packtrain"
    script.write_text(script.read_text().replace(f"#!{sys.executable}", f"#!{environment}/bin/python"))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    _serves(environment)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_wheel_installs_into_an_empty_environment_and_serves(wheel_path: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    done = _run(environment, "python", "-m", "pip", "install", str(wheel_path), *constraints, timeout_s=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = _run(environment, "python", "-m", "pip", "list").stdout
    assert not any(tool in names for tool in ("lm_eval", "mypy", "matplotlib", "pytest", "transformers")), names
    _serves(environment)
