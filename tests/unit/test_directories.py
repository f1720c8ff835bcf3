"""Where files go when home, temporary directory or both cannot be used."""

import os
from pathlib import Path

import pytest

from model_parallel.directories import (
    Unusable,
    cache_choice,
    cache_directory,
    expand_home,
    private_directories,
    readable_caches,
    temporary_parents,
    why_not_writable,
)

NOWHERE = "/proc/nowhere"
"""Nobody can make a directory there, root included."""


def test_the_named_cache_is_taken_as_it_is() -> None:
    assert cache_choice({"PACKTRAIN_CACHE": NOWHERE, "HOME": "/root"}) == (Path(NOWHERE), None)


def test_the_cache_of_the_home(tmp_path: Path) -> None:
    assert cache_choice({"HOME": str(tmp_path)}) == (tmp_path / ".cache" / "packtrain", None)
    assert cache_choice({"HOME": NOWHERE, "XDG_CACHE_HOME": str(tmp_path)}) == (tmp_path / "packtrain", None)


@pytest.mark.parametrize(
    ("environment", "setting"),
    [({"HOME": NOWHERE}, "HOME"), ({"HOME": "/root", "XDG_CACHE_HOME": NOWHERE}, "XDG_CACHE_HOME")],
)
def test_a_home_that_cannot_be_written_is_replaced_and_named(
    environment: dict[str, str], setting: str, tmp_path: Path
) -> None:
    path, unusable = cache_choice(environment | {"TMPDIR": str(tmp_path)})
    assert path == tmp_path / f"packtrain-cache-{os.getuid()}"
    assert isinstance(unusable, Unusable) and unusable.setting == setting and NOWHERE in unusable.path
    assert readable_caches(environment | {"TMPDIR": str(tmp_path)})[0] == path


def test_a_user_without_an_entry_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    path, unusable = cache_choice({"TMPDIR": str(tmp_path)})
    assert path.parent == tmp_path
    assert unusable == Unusable("HOME", "", "is not set")
    assert readable_caches({"TMPDIR": str(tmp_path)}) == [path]


def test_somebody_elses_directory_is_not_used(tmp_path: Path) -> None:
    (tmp_path / f"packtrain-cache-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"packtrain-cache-{os.getuid()}").chmod(0o777)
    assert all(path.parent != tmp_path for path in private_directories({"TMPDIR": str(tmp_path)}))


def test_who_only_looks_makes_no_directory(tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path)}
    assert all(path.parent != tmp_path for path in private_directories(environment, create=False))
    assert list(tmp_path.iterdir()) == []
    made = next(private_directories(environment))
    assert next(private_directories(environment, create=False)) == made


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / f"packtrain-cache-{os.getuid()}").symlink_to(other)
    assert all(path.parent != tmp_path for path in private_directories({"TMPDIR": str(tmp_path)}))


def test_temporary_directories_that_cannot_be_written_are_passed_over(tmp_path: Path) -> None:
    assert next(temporary_parents({"TMPDIR": str(tmp_path)})) == tmp_path
    assert Path(NOWHERE) not in temporary_parents({"TMPDIR": NOWHERE})


def test_why_a_directory_cannot_be_written(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path) == ""
    assert why_not_writable(tmp_path / "a" / "b") == "" and (tmp_path / "a" / "b").is_dir()
    assert why_not_writable(tmp_path / "c", create=False) == "does not exist"
    assert why_not_writable(Path("/dev/full")).startswith("cannot be written")


def test_a_full_directory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert why_not_writable(tmp_path) == "is full"


def test_the_process_has_a_cache() -> None:
    assert cache_directory().name


def test_a_tilde_is_the_home_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/model") == expand_home(Path("~/model")) == tmp_path / "model"
    for path in ("~no-such-user/model", "model", "/a/~/b"):
        assert expand_home(path) == Path(path)
    named = cache_directory({"HOME": str(tmp_path), "PACKTRAIN_CACHE": "~no-such-user/x"})
    assert named == Path("~no-such-user/x").absolute()
