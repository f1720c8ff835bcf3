"""Loading progress from one process to another."""

from pathlib import Path

from serving.replica.progress import ProgressFile, loaded_bytes, watched_progress
from tests.support.waiting import wait_until


def test_leaders_are_added_up(tmp_path: Path) -> None:
    assert loaded_bytes(tmp_path) == (0, 0)
    leader = ProgressFile(tmp_path)
    leader(0, 100, 100)
    leader(1, 50, 80)
    leader(1, 80, 80)
    (tmp_path / "loading-1.json").write_text("[5, 20]")
    assert loaded_bytes(tmp_path) == (185, 200)


def test_the_starter_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with watched_progress(tmp_path, lambda done, total: told.append((done, total))):
        ProgressFile(tmp_path)(0, 7, 7)
        assert wait_until(lambda: told)
    assert told[0] == (7, 7)
