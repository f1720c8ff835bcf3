"""Spare processes: imported without haste, and made ready on a node by one leader at a time."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import ray_api, spares


def test_modules_are_imported_at_the_lowest_priority_and_the_process_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spare_test_module.py").write_text(
        "import os, threading\npriority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    slept_s: list[float] = []
    spares.import_quietly(["spare_test_module"], 1000.0, slept_s.append)
    assert sys.modules.pop("spare_test_module").priority == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    assert 900 < slept_s[0] <= 1000


def test_what_cannot_be_imported_is_told() -> None:
    with pytest.raises(ImportError, match="no_such_module"):
        spares.import_quietly(["no_such_module"], 0.0, lambda seconds: None)


class Cluster:
    """Ray's control store, and nodes whose tasks do nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: dict[str, bytes] = {}
        self.asked: list[tuple[str, int]] = []
        self.outcome: BaseException | None = None
        self.num_at_work = self.most_at_work = 0
        for name in ("create_record", "read_record", "write_record", "start_on_node"):
            monkeypatch.setattr(ray_api, name, getattr(self, name))
        monkeypatch.setattr(spares, "RETRY_S", 0.001)

    def create_record(self, key: str, value: bytes) -> bool:
        return self.records.setdefault(key, value) is value

    def read_record(self, key: str) -> bytes | None:
        return self.records.get(key)

    def write_record(self, key: str, value: bytes | None) -> None:
        if value is None:
            del self.records[key]
        else:
            self.records[key] = value

    def start_on_node(
        self, function: Callable[..., Any], node_id: str, num_tasks: int, modules: Sequence[str], busy_s: float
    ) -> list[Any]:
        self.asked.append((node_id, num_tasks))
        return [asyncio.ensure_future(self._task()) for _ in range(num_tasks)]

    async def _task(self) -> None:
        self.num_at_work += 1
        self.most_at_work = max(self.most_at_work, self.num_at_work)
        await asyncio.sleep(0.01)
        self.num_at_work -= 1
        if self.outcome is not None:
            raise self.outcome


async def test_one_leader_at_a_time_makes_spares_ready_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    await asyncio.gather(*(spares.keep_spares({"a": 3, "b": 2}, ["module"]) for _ in range(4)))
    assert sorted(cluster.asked) == [("a", 3)] * 4 + [("b", 2)] * 4
    assert cluster.most_at_work <= 3 + 2
    assert cluster.records == {}


async def test_a_leader_that_has_died_at_it_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    cluster.records[spares._note("a")] = b"1.0"
    await spares.keep_spares({"a": 1}, ["module"])
    assert cluster.asked == [("a", 1)]


async def test_spares_that_do_not_come_are_told_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(monkeypatch)
    cluster.outcome = ImportError("no_such_module")
    await spares.keep_spares({"a": 2}, ["no_such_module"])
    assert "2 of 2 spare processes are not there: no_such_module" in caplog.text
    assert cluster.records == {}
