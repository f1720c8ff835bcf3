"""From a configuration's entry to a group's specification."""

from pathlib import Path

import pytest

from model_parallel.errors import ConfigError
from model_parallel.machine import Machine
from serving.config import ModelEntry
from serving.models.group_spec import check_memory, resolve_model


def _entry(path: Path, **overrides: object) -> ModelEntry:
    return ModelEntry.model_validate({"name": "small", "source": str(path), **overrides})


def test_the_cache_bounds_the_length(smollm2_path: Path) -> None:
    assert resolve_model(_entry(smollm2_path)).card.max_model_len == 8192
    spec = resolve_model(_entry(smollm2_path, kv_cache_tokens=1000, block_size=16))
    assert (spec.cache.num_blocks, spec.card.max_model_len) == (63, 1008)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"max_model_len": 10_000}, ["10000", "8192"]),
        ({"max_model_len": 4096, "kv_cache_tokens": 1024}, ["4096", "1024"]),
        ({"tensor_parallel_size": 10}, ["10", "9 query heads"]),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 16}, ["8", "16"]),
    ],
)
def test_what_cannot_work_is_refused_with_both_numbers(
    overrides: dict[str, object], parts: list[str], smollm2_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(_entry(smollm2_path, **overrides))
    assert all(part in str(caught.value) for part in parts), caught.value


def machine(available_bytes: int) -> Machine:
    return Machine(
        num_cpus=4, num_host_cpus=4, total_memory_bytes=available_bytes, available_memory_bytes=available_bytes
    )


def test_what_does_not_fit_the_host_is_refused(smollm2_path: Path) -> None:
    spec = resolve_model(_entry(smollm2_path, tensor_parallel_size=2, num_groups=2, kv_cache_tokens=100_000))
    check_memory([spec], machine(64 << 30))
    with pytest.raises(ConfigError, match=r"models\.small .* 100000 tokens of KV cache.* tokens fit"):
        check_memory([spec], machine(6 << 30))
