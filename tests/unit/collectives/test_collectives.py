"""Collectives of threads, and of several groups of processes' collectives inside this process."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model_parallel.collectives.gloo import TorchCollectives
from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.collectives.threads import Exchange, ThreadCollectives
from model_parallel.config import ParallelConfig
from model_parallel.errors import GroupFailedError
from model_parallel.runtime.leader import store_file
from tests.support.waiting import PATIENCE_S

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
KINDS = ["thread", "gloo", *(["memory"] if shutil.which("g++") else [])]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def make_group(kind: str, size: int, pool: ThreadPoolExecutor, timeout_s: float = PATIENCE_S) -> list[Collectives]:
    if kind == "thread":
        exchange = Exchange(size, timeout_s=timeout_s)
        return [ThreadCollectives(exchange, rank) for rank in range(size)]
    parallel = ParallelConfig(tp_size=size, step_timeout_s=timeout_s)
    with store_file() as path:
        if kind == "memory":
            return [SharedMemoryCollectives(path, rank, size, timeout_s=timeout_s) for rank in range(size)]
        where = Rendezvous(bind_host="127.0.0.1", store_path=path)
        return list(pool.map(lambda rank: TorchCollectives(parallel, rank, where), range(size)))


def on_all(pool: ThreadPoolExecutor, group: list[Collectives], call: Callable[[Collectives], Any]) -> list[Any]:
    return list(pool.map(call, group))


def close(group: list[Collectives]) -> None:
    for collectives in group:
        collectives.close()
        collectives.close()


def contribution(rank: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Values of very different sizes, whose sum depends on the order of addition."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (3 - 2 * rank)
    return x.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_reduce_adds_in_rank_order(kind: str, size: int, pool: ThreadPoolExecutor) -> None:
    group = make_group(kind, size, pool)
    for dtype in DTYPES:
        for shape in ((1,), (7,), (3, 576), (40_000,)):
            expected = contribution(0, dtype, *shape)
            for rank in range(1, size):
                expected = expected + contribution(rank, dtype, *shape)
            sums = on_all(pool, group, lambda c, d=dtype, s=shape: c.all_reduce(contribution(c.rank, d, *s)))
            for result in sums:
                assert result.dtype == dtype
                torch.testing.assert_close(result, expected, rtol=0, atol=0)
    close(group)


def test_the_order_of_addition_shows_in_these_numbers() -> None:
    """Otherwise the test above proves nothing."""
    a, b, c = (contribution(rank, torch.float32, 1000) for rank in range(3))
    assert not torch.equal(a + b + c, c + b + a)


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_sums_alike_in_a_small_and_in_a_large_tensor(kind: str, pool: ThreadPoolExecutor) -> None:
    group = make_group(kind, 3, pool)
    large = on_all(pool, group, lambda c: c.all_reduce(contribution(c.rank, torch.float32, 64, 576)))[0]
    small = on_all(pool, group, lambda c: c.all_reduce(contribution(c.rank, torch.float32, 64, 576)[17:18]))[0]
    assert torch.equal(large[17:18], small)
    close(group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.bool])
def test_all_gather_stacks_by_rank(kind: str, dtype: torch.dtype, pool: ThreadPoolExecutor) -> None:
    group = make_group(kind, 2, pool)
    for shape in ((), (5,), (2, 3), (0, 4)):
        expected = torch.stack([contribution(rank, dtype, *shape) for rank in range(2)])
        for result in on_all(pool, group, lambda c, s=shape: c.all_gather(contribution(c.rank, dtype, *s))):
            assert torch.equal(result, expected)
    transposed = on_all(pool, group, lambda c: c.all_gather(contribution(c.rank, dtype, 3, 2).T))[0]
    assert torch.equal(transposed[1], contribution(1, dtype, 3, 2).T)
    close(group)


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_change_when_a_rank_runs_ahead_and_overwrites_its_input(
    kind: str, pool: ThreadPoolExecutor
) -> None:
    group = make_group(kind, 3, pool)

    def run(collectives: Collectives) -> list[float]:
        x = torch.empty(100)
        results = []
        for turn in range(200):
            x.fill_(float(turn * (collectives.rank + 1)))
            results.append(float(collectives.all_reduce(x)[0]))
            x.fill_(-1.0)
        return results

    assert on_all(pool, group, run) == [[6.0 * turn for turn in range(200)]] * 3
    close(group)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_peer_is_noticed_by_the_deadline(kind: str, pool: ThreadPoolExecutor) -> None:
    group = make_group(kind, 3, pool, timeout_s=0.3)  # must expire
    calls = [pool.submit(c.all_reduce, torch.ones(4)) for c in group[:2]]
    for call in calls:
        with pytest.raises(GroupFailedError, match=r"rank [01]"):
            call.result(PATIENCE_S)
    close(group)


@pytest.mark.parametrize("kind", KINDS)
def test_peer_that_leaves_is_noticed_at_once(kind: str, pool: ThreadPoolExecutor) -> None:
    group = make_group(kind, 2, pool, timeout_s=60)
    on_all(pool, group, lambda c: c.barrier())
    call = pool.submit(group[0].all_gather, torch.ones(4))
    group[1].close()
    if kind == "gloo":
        del group[1]  # its connections close with the last reference, as they do with the process
    with pytest.raises(GroupFailedError):
        call.result(PATIENCE_S)
    close(group)


def test_several_groups_live_side_by_side(pool: ThreadPoolExecutor) -> None:
    groups = [make_group("gloo", 2, pool) for _ in range(2)]
    sums = [
        on_all(pool, g, partial(lambda i, c: c.all_reduce(torch.full((3,), i + 1.0)), i)) for i, g in enumerate(groups)
    ]
    assert [float(s[0][0]) for s in sums] == [2.0, 4.0]
    assert not torch.distributed.is_initialized()
    for group in groups:
        close(group)


def test_peers_that_never_come_fail_the_start() -> None:
    parallel = ParallelConfig(tp_size=2, step_timeout_s=0.5)
    with store_file() as path, pytest.raises(GroupFailedError, match="rank 1 could not meet its peers"):
        TorchCollectives(parallel, 1, Rendezvous(bind_host="127.0.0.1", store_path=path))


def test_store_file_leaves_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    with store_file() as path:
        assert os.path.exists(path)
    assert os.listdir("/proc/self/fd") == before


def test_solo() -> None:
    solo = SoloCollectives()
    x = torch.arange(3.0)
    assert torch.equal(solo.all_reduce(x), x)
    assert torch.equal(solo.all_gather(x), x[None])
    solo.barrier()
    solo.close()
