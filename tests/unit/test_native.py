"""Compiled code: kept in the cache, found again, and used where there is no compiler."""

import shutil
from pathlib import Path

import pytest

from model_parallel import native
from model_parallel.native import INSTRUCTION_SETS, LIBRARIES, Library, NativeBuildError, load_library
from tests.support.processes import is_running
from tests.support.waiting import wait_until

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return %s; }\n'


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Of one source, with a cache of its own and no other place for compiled code."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "private_directories", lambda create: iter([tmp_path / "private"]))
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "answer.cpp").write_text(SOURCE % 42)
    return Library(name="answer", directory=directory)


def compiled(tmp_path: Path, place: str = "cache") -> list[Path]:
    return sorted((tmp_path / place / "native").glob("*.so"))


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_code_is_compiled_once_below_the_cache(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_library(library).answer() == 42
    (path,) = compiled(tmp_path)
    assert path.name.startswith(library.source_id)
    monkeypatch.setattr(native, "_build", pytest.fail)
    assert load_library(library).answer() == 42
    assert not list((tmp_path / "cache" / "native").glob(".build-*"))


def test_without_a_compiler_what_is_there_is_used(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library(library)
    without_compiler(monkeypatch)
    assert load_library(library).answer() == 42


def test_without_a_compiler_and_with_nothing_there_it_says_so(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(monkeypatch)
    with pytest.raises(NativeBuildError, match=r"g\+\+ is not installed"):
        load_library(library)


def test_code_of_other_sources_is_not_used(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library(library)
    library.sources[0].write_text(SOURCE % 43)
    without_compiler(monkeypatch)
    with pytest.raises(NativeBuildError):
        load_library(library)


def test_a_cache_that_cannot_be_written_is_passed_over(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKTRAIN_CACHE", "/proc/nowhere")
    assert load_library(library).answer() == 42
    assert compiled(tmp_path, "private")


def test_a_library_that_cannot_be_loaded_is_made_anew(library: Library, tmp_path: Path) -> None:
    """Of another system, or cut."""
    load_library(library)
    (path,) = compiled(tmp_path)
    path.unlink()
    path.write_bytes(b"no library")
    assert load_library(library).answer() == 42


def test_where_code_may_not_be_run_the_next_directory_is_used(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount with noexec, which this imitates."""
    load = native._load

    def no_exec(path: Path) -> object:
        return None if path.is_relative_to(tmp_path / "cache") else load(path)

    monkeypatch.setattr(native, "_load", no_exec)
    assert load_library(library).answer() == 42
    assert compiled(tmp_path, "private")


def test_a_compiler_that_refuses_is_quoted(library: Library, tmp_path: Path) -> None:
    library.sources[0].write_text("this is not C++\n")
    with pytest.raises(NativeBuildError, match="this is not"):
        load_library(library)
    assert not compiled(tmp_path)


def test_a_compiler_that_hangs_is_ended_with_its_children(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "g++"
    pid = tmp_path / "pid"
    slow.write_text(f"#!/bin/sh\ncase $1 in --version) exit 0;; esac\nsleep 600 & echo $! > {pid}\nwait\n")
    slow.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(slow))
    monkeypatch.setattr(native, "BUILD_TIMEOUT_S", 5.0)
    with pytest.raises(NativeBuildError, match="did not finish within 5 s"):
        load_library(library)
    # The kernel ends it after the signal was sent, not while.
    assert wait_until(lambda: not is_running(int(pid.read_text())))


def test_a_broken_compiler_does_not_hide_what_is_there(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library(library)
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    assert load_library(library).answer() == 42


def test_a_missing_tmpdir_does_not_matter(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    assert load_library(library).answer() == 42


def test_the_sources_of_every_library_are_there() -> None:
    for one in LIBRARIES:
        assert any(source.suffix == ".cpp" for source in one.sources)
        assert len(one.source_id) == 24
    assert len({one.source_id for one in LIBRARIES}) == len(LIBRARIES)


class Processor:
    """CPU_KERNELS as loaded on a machine with some instruction sets."""

    def __init__(self, *instruction_sets: str) -> None:
        self.instruction_sets = instruction_sets

    def packtrain_has_isa(self, name: bytes) -> int:
        return name.decode() in self.instruction_sets


@pytest.mark.parametrize(
    ("arguments", "wanted", "expected"),
    [
        ([], "", {"avx2"}),
        ([], "scalar", {"scalar"}),
        (["--machine"], "", {"avx2", "scalar"}),
        (["--all"], "", set(INSTRUCTION_SETS)),
    ],
)
def test_what_is_compiled_ahead_of_time(
    arguments: list[str], wanted: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default what ranks of this machine load, and then nothing is left to compile."""
    compiled: set[Library] = set()
    monkeypatch.setenv(native.ISA_VARIABLE, wanted)
    monkeypatch.setattr(native, "load_library", lambda one: compiled.add(one) or Processor("avx2", "scalar"))
    monkeypatch.setattr(native, "is_compiled", compiled.__contains__)
    assert not native.is_ready()
    assert native.main(arguments) == 0
    assert compiled == {native.CPU_KERNELS, native.SHARED_MEMORY, *(native.CPU_OPERATIONS[isa] for isa in expected)}
    assert native.is_ready()


def test_an_instruction_set_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "avx512")
    monkeypatch.setattr(native, "load_library", lambda one: Processor("avx2", "scalar"))
    monkeypatch.setattr(native, "is_compiled", lambda one: True)
    assert native.main([]) == 1
    assert "this machine does not have avx512" in capsys.readouterr().err
    assert not native.is_ready()
