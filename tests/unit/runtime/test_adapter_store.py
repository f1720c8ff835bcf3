"""Adapters on real ranks: loaded by all or by none, kept within bounds, and gone without a trace when they are dropped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bench.support.random_adapter import save_random_adapter
from model_parallel.checkpoint.adapter_files import adapter_bytes, describe_adapter
from model_parallel.checkpoint.adapter_weights import load_adapter
from model_parallel.checkpoint.detect import describe
from model_parallel.config import AdapterConfig, ModelConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import AdapterRef, EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import CheckpointError
from model_parallel.kernels.interface import LowRankPart, LowRankUpdate
from model_parallel.runtime.adapter_store import HostCache
from tests.support.effort import by_day
from tests.support.local_engine import LocalGroup
from tests.support.ranks import save_random_llama

NUM_CYCLES = by_day(20, by_night=400)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_random_llama(path)
    return path


class Running:
    """A group of two ranks and an engine for it."""

    def __init__(self, checkpoint: Path, host_cache_bytes: int = 0) -> None:
        config = AdapterConfig(max_loaded=2, host_cache_bytes=host_cache_bytes)
        self.group = LocalGroup(checkpoint, 2, adapters=config)
        self.model: ModelConfig = describe(checkpoint).config
        scheduler = Scheduler(SchedulerConfig(max_model_len=64), self.group.config.cache, epoch=1, adapters=config)
        self.engine = Engine(self.group.executor, scheduler)

    def know(self, path: Path) -> AdapterRef:
        info = describe_adapter(path, self.model)
        ref = AdapterRef(info.digest, str(path))
        self.engine.know_adapter(ref, adapter_bytes(info, self.model, 2, dtype="float32"))
        return ref

    def run(self) -> list[Any]:
        outputs = []
        while self.engine.has_work:
            outputs += self.engine.step()
        self.engine.check_integrity()
        return outputs

    def load(self, ref: AdapterRef) -> str:
        """Returns why that could not be."""
        self.engine.load_adapter(ref.digest)
        self.run()
        return self.engine.adapter_state(ref.digest).error

    @property
    def num_loaded(self) -> list[int]:
        """By rank."""
        return [worker.adapters.num_loaded for worker in self.group.executor._workers]  # type: ignore[attr-defined]


@pytest.fixture
def running(checkpoint: Path) -> Iterator[Running]:
    made = Running(checkpoint)
    yield made
    made.group.close()


@pytest.fixture
def directory(running: Running, tmp_path: Path) -> Path:
    save_random_adapter(tmp_path, running.model, rank=4)
    return tmp_path


def test_all_ranks_load_it_or_none(running: Running, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = running.know(directory)

    def fails_on_rank_1(path: Path, digest: str, model: ModelConfig, size: int, rank: int, dtype: torch.dtype) -> Any:
        if rank == 1:
            raise CheckpointError(f"{path}: the disk is broken")
        return load_adapter(path, digest, model, size, rank, dtype)

    monkeypatch.setattr("model_parallel.runtime.adapter_store.load_adapter", fails_on_rank_1)
    assert running.load(ref) == f"rank 1: {directory}: the disk is broken"
    assert running.num_loaded == [0, 0]
    monkeypatch.undo()
    assert running.load(ref) == ""
    assert running.num_loaded == [1, 1]


def test_a_request_whose_adapter_has_gone_ends_and_the_group_lives(running: Running, directory: Path) -> None:
    ref = running.know(directory)
    (directory / "adapter_model.safetensors").unlink()
    for name, adapter in (("lost", ref), ("plain", None)):
        sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        running.engine.add(
            EngineRequest(request_id=name, prompt_token_ids=(5, 6, 7), sampling=sampling, adapter=adapter)
        )
    outputs = running.run()
    last = {output.request_id: output for output in outputs if output.finish_reason}
    assert last["lost"].error_kind == "adapter_failed"
    assert str(directory) not in last["lost"].error
    assert last["plain"].finish_reason == "length"
    assert "adapter_model.safetensors" in running.engine.adapter_state(ref.digest).error


def test_loading_and_dropping_for_long_takes_no_memory(running: Running, directory: Path) -> None:
    """Each round loads what takes a megabyte on the two ranks."""
    save_random_adapter(directory, running.model, rank=128)
    process, used = psutil.Process(), []
    num_bytes = 2 * adapter_bytes(describe_adapter(directory, running.model), running.model, 2, dtype="float32")
    for _ in range(NUM_CYCLES):
        ref = running.know(directory)
        assert running.load(ref) == ""
        assert running.engine.drop_adapter(ref.digest)
        running.run()
        used.append(process.memory_full_info().uss)
    assert running.num_loaded == [0, 0]
    grown = max(used[-10:]) - max(used[: NUM_CYCLES // 4])
    assert grown < NUM_CYCLES * num_bytes / 4, f"{grown} bytes more, {num_bytes} are loaded each time"


def test_the_host_cache_gives_back_what_was_dropped(checkpoint: Path, tmp_path: Path) -> None:
    running = Running(checkpoint, host_cache_bytes=1 << 24)
    save_random_adapter(tmp_path, running.model, rank=4)
    ref = running.know(tmp_path)
    assert running.load(ref) == ""
    assert running.engine.drop_adapter(ref.digest)
    running.run()
    running.know(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert running.load(ref) == "", "without the file"
    running.group.close()


def test_a_host_cache_is_bounded() -> None:
    def update() -> dict[str, LowRankUpdate]:
        part = LowRankPart(first_output=0, down_RI=torch.zeros(2, 10), up_OR=torch.zeros(5, 2))
        return {"matrix": LowRankUpdate(num_outputs=5, parts=(part,))}  # 120 bytes

    cache = HostCache(300)
    for digest in ("a", "b"):
        cache.keep(digest, update())
    assert cache.find("a") is not None
    cache.keep("c", update())
    assert [cache.find(digest) is not None for digest in "abc"] == [True, False, True]
    assert cache.num_bytes == 240
    HostCache(100).keep("a", update())
    none = HostCache(0)
    none.keep("a", update())
    assert none.find("a") is None
