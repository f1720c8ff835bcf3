"""Which way ranks on GPUs choose. No GPU is there, so that only the choice is real."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model_parallel.collectives import cuda as cuda_collectives
from model_parallel.collectives.gloo import TorchCollectives
from model_parallel.collectives.interface import Collectives
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.config import ParallelConfig
from model_parallel.runtime.leader import store_file
from tests.support.waiting import PATIENCE_S


class _Nccl:
    def __init__(self, parallel: ParallelConfig, rank: int, rendezvous: Rendezvous, control: TorchCollectives) -> None:
        self.rank = rank


class _Symmetric:
    def __init__(self, nccl: _Nccl, workspace: torch.Tensor) -> None:
        self.rank = nccl.rank


Join = Callable[[list[bytes], list[bytes], list[torch.Tensor | str]], list[Collectives]]


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Join:
    """(hosts, GPUs, what each rank gets when it asks for shared memory) → what each rank joins."""

    def run(hosts: list[bytes], gpus: list[bytes], workspaces: list[torch.Tensor | str]) -> list[Collectives]:
        size = len(hosts)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuda_collectives, "_gather_identities", lambda control, device: (hosts, gpus))
        monkeypatch.setattr(cuda_collectives, "NcclCollectives", _Nccl)
        monkeypatch.setattr(cuda_collectives, "SymmetricCollectives", _Symmetric)
        left = iter(workspaces)
        monkeypatch.setattr(cuda_collectives, "_open_workspace", lambda device: next(left))
        parallel = ParallelConfig(tp_size=size, device="cuda", step_timeout_s=PATIENCE_S)
        with store_file() as path, ThreadPoolExecutor(size) as pool:
            where = Rendezvous(bind_host="127.0.0.1", store_path=path)
            return list(pool.map(lambda rank: cuda_collectives.join_gpus(parallel, rank, where), range(size)))

    return run


def test_shared_memory_where_all_ranks_have_it(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        group = join([b"a", b"a"], [b"1", b"2"], [torch.empty(0)] * 2)
    assert [type(member) for member in group] == [_Symmetric] * 2
    assert "symmetric memory" in caplog.text


def test_nccl_where_one_rank_has_no_shared_memory(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        group = join([b"a"] * 3, [b"1", b"2", b"3"], [torch.empty(0), torch.empty(0), "no peer access"])
    assert [type(member) for member in group] == [_Nccl] * 3
    assert "NCCL, because rank" in caplog.text and "no peer access" in caplog.text


def test_nccl_between_hosts(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        group = join([b"a", b"b"], [b"1", b"2"], [])
    assert [type(member) for member in group] == [_Nccl] * 2
    assert "several hosts" in caplog.text


def test_ranks_that_share_a_gpu_go_through_the_host(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    group = join([b"a", b"a"], [b"1", b"1"], [])
    assert [type(member) for member in group] == [TorchCollectives] * 2
    assert "share a GPU" in caplog.text
    for member in group:
        member.close()
