"""What a group needs, against the published figures and against the tensors that are really loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.support.synthetic_llama import twin
from model_parallel.checkpoint.detect import describe
from model_parallel.errors import ConfigError
from model_parallel.memory import (
    DEVICES,
    Device,
    Workload,
    draft_memory,
    kv_bytes_per_token,
    kv_cache_tokens,
    plan_group,
    smallest_tp_size,
)
from serving.models.known_llama import LLAMA_2
from tests.support.shards import load_parts

A100 = DEVICES["a100-80g"]
FULL = Workload(max_model_len=4096)


def test_published_parameters() -> None:
    assert {size: config.num_parameters for size, config in LLAMA_2.items()} == {
        "7b": 6_738_415_616,
        "13b": 13_015_864_320,
        "70b": 68_976_648_192,
    }


def test_70b_on_eight_ranks() -> None:
    """8 query heads and 1 key/value head a rank; 327,680 bytes of cache a token in all."""
    config = LLAMA_2["70b"]
    group = plan_group(config, 8, dtype="bfloat16", device=A100, workload=FULL)
    assert kv_bytes_per_token(config, config.num_kv_heads, "bfloat16") == 327_680
    assert sum(rank.kv_bytes_per_token for rank in group.ranks) == 327_680
    assert [(len(rank.heads.query_heads), rank.heads.kv_heads) for rank in group.ranks] == [
        (8, range(i, i + 1)) for i in range(8)
    ]
    norms = (2 * 80 + 1) * 8192
    assert sum(rank.weight_bytes for rank in group.ranks) == 2 * (config.num_parameters + 7 * norms)
    assert group.fits
    assert group.largest_batch == group.kv_tokens // 4096


@pytest.mark.parametrize(("size", "gpu", "tp_size"), [("7b", "a100-40g", 1), ("13b", "a100-40g", 1), ("70b", "a100-80g", 2),
                                                      ("70b", "h200", 2), ("70b", "a100-40g", 4)])  # fmt: skip
def test_smallest_group(size: str, gpu: str, tp_size: int) -> None:
    device = DEVICES[gpu]
    assert smallest_tp_size(LLAMA_2[size], dtype="bfloat16", device=device, workload=FULL) == tp_size
    if tp_size > 1:
        assert not plan_group(LLAMA_2[size], tp_size - 1, dtype="bfloat16", device=device, workload=FULL).fits


def test_nothing_fits_a_small_device() -> None:
    device = replace(A100, memory_bytes=1 << 20)
    assert smallest_tp_size(LLAMA_2["7b"], dtype="bfloat16", device=device, workload=FULL) is None


def test_decode_floor_is_bytes_over_bandwidth() -> None:
    config = LLAMA_2["7b"]
    rank = plan_group(config, 1, dtype="float16", device=A100, workload=FULL).ranks[0]
    read = 2 * (config.num_parameters - 32000 * 4096)
    assert rank.decode_floor_s(A100, 0) == pytest.approx(read / 2.039e12)
    assert rank.decode_floor_s(A100, 1000) == pytest.approx((read + 1000 * 524_288) / 2.039e12)


@pytest.mark.parametrize("tp_size", [1, 3, 5, 8])
def test_weights_are_those_that_a_rank_loads(tmp_path: Path, tp_size: int) -> None:
    info = describe(twin("70b").write(tmp_path / "model", "hf"))
    group = plan_group(info.config, tp_size, dtype="float32", device=A100, workload=Workload(max_model_len=64))
    for rank in group.ranks:
        assert rank.weight_bytes == sum(t.nbytes for t in load_parts(info, tp_size, rank.rank).values())


def test_the_cache_takes_what_is_left() -> None:
    group = plan_group(LLAMA_2["7b"], 5, dtype="bfloat16", device=A100, workload=FULL)
    tokens = kv_cache_tokens(group, None)
    for rank in group.ranks:
        assert rank.weight_bytes + rank.activation_bytes + tokens * rank.kv_bytes_per_token <= rank.budget_bytes
    fullest = group.ranks[0]
    assert (
        fullest.weight_bytes + fullest.activation_bytes + (tokens + 1) * fullest.kv_bytes_per_token
        > fullest.budget_bytes
    )
    assert kv_cache_tokens(group, 8192) == 8192
    with pytest.raises(ConfigError, match=rf"for {tokens + 1} tokens of KV cache, .*; {tokens} tokens fit"):
        kv_cache_tokens(group, tokens + 1)


def test_refused_when_one_sequence_does_not_fit() -> None:
    device = Device(name="small", memory_bytes=13 << 30, bandwidth_bytes_per_s=1e11)
    group = plan_group(LLAMA_2["7b"], 1, dtype="bfloat16", device=device, workload=FULL)
    with pytest.raises(
        ConfigError, match=r"rank 0 of 1 needs 12\.55 GiB for weights, .* may use 11\.70 GiB; 0 tokens fit"
    ):
        kv_cache_tokens(group, None)


def test_more_ranks_than_heads() -> None:
    with pytest.raises(ConfigError, match="33 and the model has 32 query heads"):
        plan_group(LLAMA_2["7b"], 33, dtype="bfloat16", device=A100, workload=FULL)


def test_a_draft_model_lies_on_the_first_rank_alone() -> None:
    sizes = {"dtype": "bfloat16", "device": A100, "workload": FULL}
    draft = draft_memory(LLAMA_2["7b"], dtype="bfloat16", max_num_seqs=64)
    without, with_it = (plan_group(LLAMA_2["13b"], 2, draft=each, **sizes) for each in (None, draft))
    assert with_it.ranks[1] == without.ranks[1]
    first, before = with_it.ranks[0], without.ranks[0]
    assert first.weight_bytes - before.weight_bytes == 2 * LLAMA_2["7b"].num_parameters
    assert first.kv_bytes_per_token - before.kv_bytes_per_token == 2 * 2 * 32 * 32 * 128
    assert first.activation_bytes >= before.activation_bytes
    assert first.decode_bytes == before.decode_bytes, "passes of the draft model are no steps"
    assert with_it.kv_tokens < without.kv_tokens
