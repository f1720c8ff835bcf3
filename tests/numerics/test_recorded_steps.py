"""Decode as one native call: bit for bit what the model's operations give one by one."""

from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.engine.messages import NewSequence, Row
from model_parallel.engine.request import SamplingParams
from model_parallel.model.batch import SequenceState, build_batch, lay_out
from model_parallel.runtime.leader import store_file
from model_parallel.runtime.rank import Rank
from model_parallel.runtime.recorded_steps import RecordedSteps
from tests.support.effort import rest_by_night
from tests.support.ranks import group_config, on_threads, save_random_llama

BLOCK_SIZE, BLOCKS_A_SEQUENCE = 16, 6
# Numbers of sequences as they come and go, every second one with drafts; the first is met again, with more blocks than when it
# was recorded.
NUM_SEQUENCES = (1, 4, 3, 4, 2, 1, 3)
STEPS_EACH = 7


CASES = list(product((1, 2, 3), ("float32", "bfloat16"), ("", "int8")))
DAILY = [case for case in CASES if not case[2] or case in ((1, "float32", "int8"), (3, "bfloat16", "int8"))]


@pytest.mark.parametrize(("tp_size", "dtype", "quantization"), rest_by_night(CASES, by_day=DAILY, has_names=True))
def test_recorded_steps_have_the_bits_of_single_calls(
    tp_size: int, dtype: str, quantization: str, tmp_path: Path
) -> None:
    save_random_llama(tmp_path, num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144)
    config = group_config(tmp_path, tp_size, dtype=dtype, quantization=quantization)
    with store_file() as path:

        def run(threads: Collectives) -> None:
            shared = SharedMemoryCollectives(path, threads.rank, tp_size, timeout_s=60) if tp_size > 1 else None
            rank = Rank(config, threads.rank, shared or SoloCollectives())
            assert isinstance(rank.graphs, RecordedSteps)
            _check(rank, rank.graphs)

        on_threads(tp_size, run)


@torch.inference_mode()
def _check(rank: Rank, steps: RecordedSteps) -> None:
    prompt = tuple(range(5, 25))
    states = {}
    for seq_id in range(max(NUM_SEQUENCES)):
        states[seq_id] = SequenceState.begin(NewSequence(seq_id, prompt, len(prompt), 0, SamplingParams()))
        first = seq_id * BLOCKS_A_SEQUENCE
        states[seq_id].block_ids = list(range(first, first + 2))
    _forward(rank, tuple(Row(seq_id, 0, len(prompt) - 1, False) for seq_id in states), states)
    for num_sequences in NUM_SEQUENCES:
        for _ in range(STEPS_EACH):
            rows = []
            for seq_id in range(num_sequences):
                state = states[seq_id]
                drafts = prompt[: 3 * (seq_id % 2)]
                if len(state.token_ids) + len(drafts) > len(state.block_ids) * BLOCK_SIZE:
                    state.block_ids.append(seq_id * BLOCKS_A_SEQUENCE + len(state.block_ids))
                start = len(state.token_ids) - 1
                rows.append(Row(seq_id, start, 1 + len(drafts), True, draft_token_ids=drafts))
            recorded = steps.forward(lay_out(tuple(rows), states, block_size=BLOCK_SIZE)).clone()
            single = _forward(rank, tuple(rows), states)
            assert torch.equal(recorded, single) and recorded.isfinite().all()
            in_runs_of_one = lay_out(tuple(rows), states, block_size=BLOCK_SIZE, in_runs_of_one=True)
            assert torch.equal(steps.forward(in_runs_of_one), single)
            lasts = tuple(Row(row.seq_id, row.start, 1, True) for row in rows)
            without_drafts = steps.forward(lay_out(lasts, states, block_size=BLOCK_SIZE)).clone()
            first_rows = list(accumulate((row.num_tokens for row in rows), initial=0))[:-1]
            assert torch.equal(without_drafts, single[first_rows])
            for row, hidden_E in zip(rows, without_drafts, strict=True):
                states[row.seq_id].append(int(hidden_E.argmax()))  # any token that depends on the result


def _forward(rank: Rank, rows: tuple[Row, ...], states: dict[int, SequenceState]) -> Tensor:
    batch = build_batch(
        rows,
        states,
        block_size=BLOCK_SIZE,
        num_blocks=rank.config.cache.num_blocks,
        row_multiple=rank.kernels.row_multiple,
        frequencies=rank.frequencies,
    )
    return rank.model.forward(batch.token_ids_T, batch.attention, rank.caches)
