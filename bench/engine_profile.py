"""Where a decode step's time goes; see model_parallel/runtime/profile.py."""

import json
import os
import tempfile
from pathlib import Path

from rich.table import Table

from bench.timing import Workload
from model_parallel.config import CacheConfig, GroupConfig, ParallelConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import GroupFailedError
from model_parallel.runtime.executors import SpawnedExecutor
from model_parallel.runtime.profile import FILE_VARIABLE, Row, StepProfile

RANK_CLASS = "model_parallel.runtime.profile:ProfiledRank"
_BLOCK_SIZE = 16


def profile_decode(path: Path, parallel: ParallelConfig, workload: Workload, *, vocab_size: int) -> StepProfile:
    """Rank 0's profile of the steps that decode all of the workload's sequences together. Raises GroupFailedError."""
    longest = workload.num_prompt_tokens + workload.num_new_tokens
    cache = CacheConfig(num_blocks=workload.batch * -(-longest // _BLOCK_SIZE), enable_prefix_caching=False)
    limits = SchedulerConfig(max_model_len=longest, max_num_seqs=workload.batch)
    config = GroupConfig(checkpoint_path=str(path), parallel=parallel, cache=cache, epoch=1, scheduler=limits)
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "profile.json"
        os.environ[FILE_VARIABLE] = str(result)  # the ranks inherit it
        try:
            executor = SpawnedExecutor(config, rank_class=RANK_CLASS)
        finally:
            del os.environ[FILE_VARIABLE]
        try:
            engine = Engine(executor, Scheduler(limits, cache, epoch=config.epoch))
            sampling = SamplingParams(temperature=0.0, max_tokens=workload.num_new_tokens, ignore_eos=True)
            for index, prompt in enumerate(workload.prompts(vocab_size, 0)):
                engine.add(EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
            while engine.has_work:
                engine.step()
        finally:
            executor.shutdown()
        if engine.failure is not None:
            raise GroupFailedError(engine.failure)
        return StepProfile.from_data(json.loads(result.read_text()))


def as_table(rows: list[Row], title: str) -> Table:
    """The last row is the step."""
    table = Table("operation", title=title)
    for name in ("calls", "µs", "share", "floor, µs", "× floor"):
        table.add_column(name, justify="right")
    for row in rows:
        floor = (f"{row.floor_s * 1e6:.1f}", f"{row.ratio:.2f}") if row.floor_s else ("", "")
        table.add_row(row.operation, f"{row.num_calls:g}", f"{row.seconds * 1e6:.1f}", f"{row.share:.1%}", *floor)
    return table
