"""A group that is to be deterministic starts only where its ranks can be."""

from pathlib import Path

import pytest

from model_parallel.collectives.interface import SoloCollectives
from model_parallel.errors import ConfigError
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.runtime.rank import Rank
from tests.support.kernels import use_backend
from tests.support.ranks import group_config, save_random_llama


def test_it_starts_where_nothing_depends_on_the_step(tmp_path: Path) -> None:
    save_random_llama(tmp_path)
    rank = Rank(group_config(tmp_path, 1, deterministic=True), 0, SoloCollectives())
    assert rank.deterministic
    rank.close()


def test_kernels_that_are_not_batch_invariant_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_llama(tmp_path)
    use_backend(monkeypatch, "reference")
    begin = ReferenceKernels.__init__

    def on_a_gpu(self: ReferenceKernels, *, num_threads: int, device: str) -> None:
        begin(self, num_threads=num_threads, device=device)
        self.batch_invariant = False

    monkeypatch.setattr(ReferenceKernels, "__init__", on_a_gpu)
    Rank(group_config(tmp_path, 1), 0, SoloCollectives()).close()
    with pytest.raises(
        ConfigError, match="deterministic is true, and with the reference kernels a row's last bits dep"
    ):
        Rank(group_config(tmp_path, 1, deterministic=True), 0, SoloCollectives())


def test_sums_that_are_not_in_rank_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_llama(tmp_path)
    monkeypatch.setattr(SoloCollectives, "in_rank_order", False)
    with pytest.raises(
        ConfigError, match=r"deterministic is true, and the ranks' sums go over NCCL.*; set it to false"
    ):
        Rank(group_config(tmp_path, 1, deterministic=True), 0, SoloCollectives())
