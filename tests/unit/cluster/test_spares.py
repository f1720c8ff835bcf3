"""Spare processes: imported without haste, and started by one leader at a time."""

import asyncio
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from cluster import ray_api, spare_imports, spares
from tests.support.waiting import PATIENCE_S, until


async def test_an_unused_process_imports_what_is_noted_at_the_lowest_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spare_test_module.py").write_text(
        "import os, threading\npriority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(spare_imports, "is_unused", lambda: True)
    monkeypatch.setattr(spare_imports, "LOOK_PERIOD_S", 0.01)
    note = tmp_path / "note"
    thread = threading.Thread(target=spare_imports.import_when_noted, args=(note,))
    thread.start()
    await asyncio.sleep(0.05)
    assert "spare_test_module" not in sys.modules
    before = os.getpriority(os.PRIO_PROCESS, os.getpid())
    note.write_text("spare_test_module")
    await until(lambda: not thread.is_alive())
    assert sys.modules.pop("spare_test_module").priority == 19
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == before


async def test_a_process_that_is_used_imports_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spare_test_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(spare_imports, "is_unused", lambda: False)
    monkeypatch.setattr(spare_imports, "LOOK_PERIOD_S", 0.01)
    note = tmp_path / "note"
    threads = [threading.Thread(target=spare_imports.import_when_noted, args=(note,))]
    threads[0].start()
    await until(lambda: not threads[0].is_alive())
    note.write_text("spare_test_module")
    threads.append(threading.Thread(target=spare_imports.import_when_noted, args=(note,)))
    threads[1].start()
    await until(lambda: not threads[1].is_alive())
    assert "spare_test_module" not in sys.modules


GATE = """
import threading
begun, goes_on = threading.Event(), threading.Event()
"""
WAITS = """
import spare_test_gate
spare_test_gate.begun.set()
assert spare_test_gate.goes_on.wait({patience_s})
import {other}
"""


def _write_modules(directory: Path, monkeypatch: pytest.MonkeyPatch, *, noted: str) -> ModuleType:
    """Two modules that import each other, of which `noted` is in the note. Returns the gate at which the first one waits."""
    (directory / "spare_test_gate.py").write_text(GATE)
    (directory / "spare_test_one.py").write_text(WAITS.format(patience_s=PATIENCE_S, other="spare_test_two"))
    (directory / "spare_test_two.py").write_text("import spare_test_one\nsaw = dir(spare_test_one)\n")
    (directory / "note").write_text(noted)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(spare_imports, "is_unused", lambda: True)
    monkeypatch.setattr(spare_imports, "LOOK_PERIOD_S", 0.01)
    return importlib.import_module("spare_test_gate")


def _import_noted(note: Path) -> threading.Thread:
    thread = threading.Thread(target=spare_imports.import_when_noted, args=(note,))
    thread.start()
    return thread


async def test_nobody_else_imports_while_a_spare_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _write_modules(tmp_path, monkeypatch, noted="spare_test_one")
    spare = _import_noted(tmp_path / "note")
    await until(gate.begun.is_set)
    user = threading.Thread(target=importlib.import_module, args=("spare_test_two",))
    user.start()
    await asyncio.sleep(0.1)
    assert "spare_test_two" not in sys.modules, "the user's import has begun beside the spare's"
    gate.goes_on.set()
    await until(lambda: not spare.is_alive() and not user.is_alive())
    assert sys.modules.pop("spare_test_one").spare_test_two is sys.modules.pop("spare_test_two")
    del sys.modules["spare_test_gate"]


async def test_a_spare_process_imports_nothing_in_the_middle_of_another_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two would wait for each other: the spare's module is imported by what is imported already."""
    gate = _write_modules(tmp_path, monkeypatch, noted="spare_test_two")
    user = threading.Thread(target=importlib.import_module, args=("spare_test_one",))
    user.start()
    await until(gate.begun.is_set)
    spare = _import_noted(tmp_path / "note")
    await asyncio.sleep(0.1)
    assert "spare_test_two" not in sys.modules
    gate.goes_on.set()
    await until(lambda: not spare.is_alive() and not user.is_alive())
    assert sys.modules.pop("spare_test_one").spare_test_two is sys.modules.pop("spare_test_two")
    del sys.modules["spare_test_gate"]


class Cluster:
    """Ray's control store, and a node that starts processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.records: dict[str, bytes] = {}
        self.num_idle = self.num_starting = 0
        self.num_started = 0
        for name in ("create_record", "read_record", "write_record", "start_idle_worker"):
            monkeypatch.setattr(ray_api, name, getattr(self, name))
        monkeypatch.setattr(spares, "num_workers", self.num_workers)
        monkeypatch.setattr(spares, "note_of_modules", lambda: tmp_path / "note")
        monkeypatch.setattr(spares, "POLL_S", 0.001)
        memory = SimpleNamespace(available=1 << 40)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        self.memory = memory

    def create_record(self, key: str, value: bytes) -> bool:
        return self.records.setdefault(key, value) is value

    def read_record(self, key: str) -> bytes | None:
        return self.records.get(key)

    def write_record(self, key: str, value: bytes | None) -> None:
        if value is None:
            del self.records[key]
        else:
            self.records[key] = value

    def start_idle_worker(self, timeout_s: float) -> None:
        assert self.num_starting == 0, "one at a time"
        self.num_starting = 1
        self.num_started += 1

    def num_workers(self) -> tuple[int, int]:
        """Those that have begun to start are there at the next look."""
        found = self.num_idle, self.num_starting
        self.num_idle, self.num_starting = self.num_idle + self.num_starting, 0
        return found


async def test_leaders_together_start_as_many_as_the_largest_group_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster = Cluster(monkeypatch, tmp_path)
    await asyncio.gather(*(spares.keep_spares(num, ["one", "two"]) for num in (3, 3, 5, 2)))
    assert cluster.num_idle == cluster.num_started == 5
    assert (tmp_path / "note").read_text().split() == ["one", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    assert cluster.records == {}


async def test_only_what_is_missing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.num_idle = 2
    await spares.keep_spares(3, ["one"])
    await spares.keep_spares(3, ["one"])
    assert cluster.num_started == 1


async def test_a_leader_that_has_died_at_it_stops_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster(monkeypatch, tmp_path)
    with subprocess.Popen(["true"]) as process:
        pass
    cluster.records[spares._CLAIM] = str(process.pid).encode()
    await spares.keep_spares(1, ["one"])
    assert cluster.num_started == 1


async def test_none_is_started_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(monkeypatch, tmp_path)
    cluster.memory.available = 1 << 30
    await spares.keep_spares(3, ["one"])
    assert cluster.num_started == 0
    assert "0 of 3 spare processes are kept: 1024 MiB are available" in caplog.text
