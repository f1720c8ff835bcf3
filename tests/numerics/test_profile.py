"""The profile of real ranks names every operation, and changes no answer."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.engine.messages import NewSequence, Row, StepPlan
from model_parallel.engine.request import SamplingParams
from model_parallel.runtime.leader import store_file
from model_parallel.runtime.profile import ProfiledRank, StepProfile
from model_parallel.runtime.rank import Rank
from tests.support.ranks import group_config, on_threads, save_random_llama

NUM_LAYERS, PROMPT, NUM_STEPS = 3, tuple(range(4, 24)), 6


def _decode(rank: Rank) -> list[int | None]:
    new = NewSequence(0, PROMPT, len(PROMPT), 0, SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    plans = [StepPlan(1, 1, (), (new,), (Row(0, 0, len(PROMPT), True, (0, 1)),))]
    plans += [StepPlan(1, i + 2, (), (), (Row(0, len(PROMPT) + i, 1, True),)) for i in range(NUM_STEPS)]
    return [rank.execute(plan).rows[0].token_id for plan in plans]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_operation_is_counted(tp_size: int, tmp_path: Path) -> None:
    save_random_llama(tmp_path, num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144)
    config = group_config(tmp_path, tp_size, dtype="bfloat16")
    with store_file() as path, store_file() as other_path:

        def run(threads: Collectives) -> tuple[Sequence[int | None], Sequence[int | None], StepProfile]:
            def collectives(path: str) -> Collectives:
                solo = tp_size == 1
                return SoloCollectives() if solo else SharedMemoryCollectives(path, threads.rank, tp_size, timeout_s=60)

            plain = _decode(Rank(config, threads.rank, collectives(path)))
            rank = ProfiledRank(config, threads.rank, collectives(other_path))
            return plain, _decode(rank), rank.profile

        plain, profiled, profile = on_threads(tp_size, run)[0]
    assert profiled == plain
    assert profile.num_steps == NUM_STEPS - 1  # the first decode step was recorded
    calls = {row.operation.split()[0]: 0.0 for row in profile.rows(bandwidth=1, rate=1)}
    for row in profile.rows(bandwidth=1e9, rate=1e9):
        calls[row.operation.split()[0]] += row.num_calls
        assert row.seconds >= 0
    assert calls["linear"] == calls["gated"] == calls["attention"] == NUM_LAYERS
    assert calls["partial_sum"] == 2 * NUM_LAYERS
    assert calls["norm"] == 2 * NUM_LAYERS + 1
    assert calls["embed"] == calls["logits"] == calls["softmax"] == 1
    assert calls.get("all-reduce", 0) == (2 * NUM_LAYERS + 1 if tp_size > 1 else 0)
    assert profile.totals["attention"].num_bytes > 0
