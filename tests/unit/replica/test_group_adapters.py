"""A leader comes to know the adapters that requests name."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from model_parallel.checkpoint.adapter_files import describe_adapter
from model_parallel.config import AdapterConfig, ParallelConfig
from model_parallel.engine.request import AdapterRef
from model_parallel.errors import CheckpointError, RequestError
from serving.contracts.models import AdapterCard
from serving.replica.adapters import FAILED, GroupAdapters, load_at_start
from tests.support.adapter_directories import MODEL, save_adapter
from tests.support.engine import Harness
from tests.support.waiting import PATIENCE_S, until


def _harness(max_loaded: int = 2, max_bytes: int = 1 << 20) -> Harness:
    return Harness(adapters=AdapterConfig(max_loaded=max_loaded, max_bytes=max_bytes))


def _ref(path: Path) -> AdapterRef:
    return AdapterRef(describe_adapter(path, MODEL).digest, str(path))


async def test_it_is_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path)
    ref, harness, seen = _ref(tmp_path), _harness(), []

    def counted(path: Path, model: object) -> object:
        seen.append(path)
        return describe_adapter(path, MODEL)

    monkeypatch.setattr("serving.replica.adapters.describe_adapter", counted)
    adapters = GroupAdapters(harness.engine, MODEL, ParallelConfig())
    await adapters.know(None)
    await asyncio.gather(*(adapters.know(ref) for _ in range(5)))
    await adapters.know(ref)
    assert seen == [tmp_path]
    assert harness.engine.knows_adapter(ref.digest)


async def test_what_is_not_there_or_has_changed_is_refused(tmp_path: Path) -> None:
    adapters = GroupAdapters(_harness().engine, MODEL, ParallelConfig())
    with pytest.raises(RequestError, match="could not be loaded") as caught:
        await adapters.know(AdapterRef("00" * 32, str(tmp_path / "nowhere")))
    assert caught.value.kind == "adapter_failed"
    assert "nowhere" not in str(caught.value), "clients are not told where files lie"
    save_adapter(tmp_path)
    with pytest.raises(RequestError, match="could not be loaded"):
        await adapters.know(AdapterRef("00" * 32, str(tmp_path)))
    save_adapter(tmp_path)
    await adapters.know(_ref(tmp_path))  # a failure is not remembered


async def test_one_that_is_too_large_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    adapters = GroupAdapters(_harness(max_bytes=10).engine, MODEL, ParallelConfig())
    with pytest.raises(RequestError, match="max_bytes is 10"):
        await adapters.know(_ref(tmp_path))


@contextmanager
def _stepping(harness: Harness) -> Iterator[None]:
    """Another thread drives the engine, as in a leader."""
    is_over = threading.Event()

    def drive() -> None:
        while not is_over.is_set():
            if harness.engine.has_work:
                harness.engine.step()
            else:
                time.sleep(0.001)

    thread = threading.Thread(target=drive)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(PATIENCE_S)


def _card(path: Path) -> AdapterCard:
    return AdapterCard(name="sql", parent="tiny", ref=_ref(path), num_bytes=10, rank=4)


async def test_it_is_loaded_and_unloaded_while_the_engine_runs(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    harness, card = _harness(), _card(tmp_path)
    adapters = GroupAdapters(harness.engine, MODEL, ParallelConfig())
    with _stepping(harness):
        assert await adapters.load(card) == ""
        assert harness.engine.loaded_adapters() == [card.ref.digest]
        assert await adapters.load(card) == "", "again changes nothing"
        adapters.unload(card.ref.digest)
        await until(lambda: not harness.executor.adapters)
        assert not harness.engine.knows_adapter(card.ref.digest)
        adapters.unload(card.ref.digest)  # nor does this


async def test_what_a_rank_says_is_told_and_nothing_stays(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    harness, card = _harness(), _card(tmp_path)
    harness.executor.broken_adapters.add(card.ref.digest)
    adapters = GroupAdapters(harness.engine, MODEL, ParallelConfig())
    with _stepping(harness):
        assert await adapters.load(card) == "rank 1: it is broken"
        assert not harness.engine.knows_adapter(card.ref.digest)
        harness.executor.broken_adapters.clear()
        assert await adapters.load(card) == "", "it may be better the next time"
        assert await adapters.load(msgspec.structs.replace(card, ref=AdapterRef("00" * 32, "/nowhere"))) == FAILED


def test_those_of_the_start_are_loaded_before_anything_else() -> None:
    harness = _harness()
    refs = [(AdapterRef(f"{n:064x}", f"/adapters/{n}"), 10) for n in range(3)]
    load_at_start(harness.engine, refs, 2, 60)
    assert [harness.engine.adapter_state(ref.digest).is_loaded for ref, _ in refs] == [True, True, False]
    assert all(harness.engine.knows_adapter(ref.digest) for ref, _ in refs)


def test_one_of_the_start_that_is_broken_stops_it() -> None:
    harness = _harness()
    ref = AdapterRef("01" * 32, "/adapters/1")
    harness.executor.broken_adapters.add(ref.digest)
    with pytest.raises(CheckpointError, match="rank 1: it is broken"):
        load_at_start(harness.engine, [(ref, 10)], 2, 60)
