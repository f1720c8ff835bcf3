"""Whether a GPU has room for the cache that it is asked for."""

import re

import pytest

from model_parallel.config import CacheConfig, GroupConfig, ParallelConfig, SchedulerConfig
from model_parallel.errors import ConfigError
from model_parallel.memory import DEVICE_RESERVE_BYTES, GIB, check_cache_fits
from serving.models.known_llama import LLAMA_2

BLOCK_BYTES = 16 * 524_288
"""16 tokens of Llama 2 7B in bfloat16."""


def _group(num_blocks: int) -> GroupConfig:
    return GroupConfig(
        checkpoint_path="",
        parallel=ParallelConfig(device="cuda", dtype="bfloat16"),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=128),
        epoch=1,
    )


def test_the_refusal_names_what_is_asked_and_what_fits() -> None:
    with pytest.raises(ConfigError, match=r"cache\.num_blocks is 1000: rank 0 needs 7\.82 GiB") as refusal:
        check_cache_fits(_group(1000), LLAMA_2["7b"], 0, free_bytes=2 * GIB)
    fitting = re.search(r"which is (\d+) blocks: 2\.00 GiB are free", str(refusal.value))
    assert fitting is not None
    check_cache_fits(_group(int(fitting[1])), LLAMA_2["7b"], 0, free_bytes=2 * GIB)
    with pytest.raises(ConfigError):
        check_cache_fits(_group(int(fitting[1]) + 1), LLAMA_2["7b"], 0, free_bytes=2 * GIB)


def test_nothing_fits_where_a_step_does_not() -> None:
    with pytest.raises(ConfigError, match=r"room for 0\.00 GiB, which is 0 blocks"):
        check_cache_fits(_group(1), LLAMA_2["7b"], 0, free_bytes=DEVICE_RESERVE_BYTES + BLOCK_BYTES)
