"""A rank without a model: it adds numbers over the real collectives, and misbehaves when told to."""

import os
import time
from collections.abc import Callable

import torch

from model_parallel.collectives.interface import Collectives
from model_parallel.config import CacheConfig, GroupConfig, ParallelConfig
from model_parallel.engine.messages import Row, RowResult, StepPlan, StepResult
from model_parallel.errors import CheckpointError
from tests.support.waiting import PATIENCE_S

FAKE_RANK = "tests.support.fake_rank:FakeRank"
RAISE, HANG, EXIT, CRAWL, BURN = -1, -2, -3, -4, -5
"""As a row's seq_id: what the rank in its `start` does."""
NUM_CRAWLS, CRAWL_S = 40, 0.1
"""A rank that crawls gets a little further so many times, after so long each time."""
BURN_CPU_S = 0.2
"""A rank that burns needs so much of a processor before it gets any further."""


class FakeRank:
    """`checkpoint_path` may be "broken:R" or "dies:R" (rank R does so while it loads); anything else loads."""

    kernels_name = "fake"
    deterministic = True
    num_done = 0
    is_compiling = False

    def __init__(
        self,
        config: GroupConfig,
        rank: int,
        collectives: Collectives,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.collectives = collectives
        self.rank = rank
        self.closed = False
        if config.checkpoint_path == f"broken:{rank}":
            raise CheckpointError(f"{config.checkpoint_path}: no such file")
        if config.checkpoint_path == f"dies:{rank}":
            os._exit(3)
        if progress is not None:
            progress(1, 2)
            progress(2, 2)

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.epoch, plan.step_id, tuple(self._run(row) for row in plan.rows))

    def _run(self, row: Row) -> RowResult:
        """The sum over ranks of (rank + 1) * start."""
        if row.start == self.rank and row.seq_id == RAISE:
            raise ValueError("told to raise")
        if row.start == self.rank and row.seq_id == HANG:
            time.sleep(60)
        if row.start == self.rank and row.seq_id == CRAWL:
            for _ in range(NUM_CRAWLS):
                time.sleep(CRAWL_S)
                self.num_done += 1
        if row.start == self.rank and row.seq_id == BURN:
            until_s = time.thread_time() + BURN_CPU_S
            while time.thread_time() < until_s:
                pass
        if row.start == self.rank and row.seq_id == EXIT:
            os._exit(4)
        x = torch.full((8,), float((self.rank + 1) * row.start))
        return RowResult(row.seq_id, int(self.collectives.all_reduce(x)[0]))

    def close(self) -> None:
        self.closed = True


def group_config(
    tp_size: int, *, checkpoint_path: str = "", start_timeout_s: float = 60.0, step_timeout_s: float = PATIENCE_S
) -> GroupConfig:
    return GroupConfig(
        checkpoint_path=checkpoint_path,
        parallel=ParallelConfig(tp_size=tp_size, start_timeout_s=start_timeout_s, step_timeout_s=step_timeout_s),
        cache=CacheConfig(num_blocks=4),
        epoch=7,
    )


def plan(step_id: int, *rows: tuple[int, int]) -> StepPlan:
    """Rows of (seq_id, start)."""
    return StepPlan(7, step_id, rows=tuple(Row(seq_id, start, 1, True) for seq_id, start in rows))


def tokens(result: StepResult) -> list[int | None]:
    return [row.token_id for row in result.rows]
