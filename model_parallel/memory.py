"""What a replica group needs of its ranks' memory and bandwidth: arithmetic alone, before anything is loaded.

Ranks hold unequal parts where a size does not divide, so that everything is counted for each rank and the fullest one decides.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from model_parallel.config import DTYPE_BYTES, GroupConfig, ModelConfig
from model_parallel.engine.model_drafter import MAX_TOKENS_AT_A_TIME
from model_parallel.engine.speculation import MAX_DRAFTS
from model_parallel.errors import ConfigError
from model_parallel.model.partition import (
    EMBEDDING,
    LM_HEAD,
    HeadPartition,
    Shard,
    even_range,
    kept_formats,
    partition_heads,
    shard_table,
)
from model_parallel.weight_format import GroupFormat

GIB = 1 << 30
_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Memory and bandwidth of what one rank computes on."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    capability: tuple[int, int] | None = None
    """Compute capability of a known GPU."""


# Memory as the driver reports it, bandwidth from the makers' data sheets (SXM versions).
DEVICES = {
    device.name: device
    for device in (
        Device(name="a100-40g", memory_bytes=40960 << 20, bandwidth_bytes_per_s=1.555e12, capability=(8, 0)),
        Device(name="a100-80g", memory_bytes=81920 << 20, bandwidth_bytes_per_s=2.039e12, capability=(8, 0)),
        Device(name="h100", memory_bytes=81559 << 20, bandwidth_bytes_per_s=3.35e12, capability=(9, 0)),
        Device(name="h200", memory_bytes=143771 << 20, bandwidth_bytes_per_s=4.8e12, capability=(9, 0)),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What a group is to be able to do; see config.SchedulerConfig."""

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """One rank's part. Its budget is what is left of the device after the reserve for the system and its libraries."""

    rank: int
    heads: HeadPartition
    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    budget_bytes: int
    decode_bytes: int
    """Read from memory in every decode step besides the cache: all weights but the embedding, of which only rows are."""

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that fit beside weights and activations; 0 when these alone do not."""
        return max(0, self.budget_bytes - self.weight_bytes - self.activation_bytes) // self.kv_bytes_per_token

    def decode_floor_s(self, device: Device, cached_tokens: int) -> float:
        """No decode step over so many cached tokens can be faster: the bytes that it reads over the bandwidth."""
        return (self.decode_bytes + cached_tokens * self.kv_bytes_per_token) / device.bandwidth_bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMemory:
    """A whole replica group."""

    ranks: tuple[RankMemory, ...]
    device: Device
    workload: Workload

    @property
    def kv_tokens(self) -> int:
        """Tokens that the group's cache can hold: every token is on all ranks, so the fullest decides."""
        return min(rank.kv_tokens for rank in self.ranks)

    @property
    def fits(self) -> bool:
        """Whether one sequence of max_model_len can be served."""
        return self.kv_tokens >= self.workload.max_model_len

    @property
    def largest_batch(self) -> int:
        """Sequences of max_model_len whose cache fits at the same time."""
        return self.kv_tokens // self.workload.max_model_len

    def decode_floor_s(self, num_seqs: int) -> float:
        """Shortest time of a decode step of `num_seqs` sequences that are as long as they may get."""
        cached = num_seqs * self.workload.max_model_len
        return max(rank.decode_floor_s(self.device, cached) for rank in self.ranks)


def kv_bytes_per_token(model: ModelConfig, num_kv_heads: int, dtype: str) -> int:
    """Keys and values of one token in every layer, for so many heads. `dtype`: or "fp8"."""
    return 2 * model.num_layers * num_kv_heads * model.head_dim * (1 if dtype == "fp8" else DTYPE_BYTES[dtype])


def activation_bytes(model: ModelConfig, tp_size: int, rank: int, *, dtype: str, workload: Workload) -> int:
    """Bound on what one step holds besides weights and cache.

    Of each token: the residual stream, its sum, the norm's result and the all-reduced sum (float32, hidden_size each), with
    the layer's widest intermediate results (query, key and value rows and attention's result; or gate, up and their product).
    Of each row that is sampled: logits, their sorted copy and probabilities (float32). Kernels that gather a sequence's whole
    cache, as the reference backend's do, need that beside it.
    """
    heads = partition_heads(model.num_query_heads, model.num_kv_heads, tp_size, rank)
    attention = (2 * len(heads.query_heads) + 2 * len(heads.kv_heads)) * model.head_dim
    feed_forward = 3 * len(even_range(model.intermediate_size, tp_size, rank))
    a_token = 4 * model.hidden_size * _FLOAT32_BYTES + max(attention, feed_forward) * DTYPE_BYTES[dtype]
    a_row = 3 * len(even_range(model.vocab_size, tp_size, rank)) * _FLOAT32_BYTES
    return workload.max_num_batched_tokens * a_token + workload.max_num_seqs * a_row


def weight_bytes(
    table: Mapping[str, Shard],
    *,
    dtype: str,
    quantization: str,
    formats: Mapping[str, GroupFormat] | None = None,
    fp8_weights: Collection[str] = (),
) -> dict[str, int]:
    """Bytes of each parameter that a rank holds. In int8 a tied embedding is held twice: for look-ups, and as LM head. In fp8
    embedding and LM head are of `dtype`.

    `formats`: ModelConfig.weight_formats, which count where quantization is "packed"; `fp8_weights`: ModelConfig's, which where
    there are any are all that is in fp8.
    """
    sizes = {name: math.prod(shard.shape) * DTYPE_BYTES[dtype] for name, shard in table.items()}
    if quantization in ("int8", "fp8"):
        matrices: dict[str, tuple[int, ...]]
        matrices = {name: shard.shape for name, shard in table.items() if len(shard.shape) == 2 and name != EMBEDDING}
        if quantization == "int8":
            matrices.setdefault(LM_HEAD, table[EMBEDDING].shape)
        else:
            matrices.pop(LM_HEAD, None)
            matrices = {name: shape for name, shape in matrices.items() if not fp8_weights or name in fp8_weights}
        sizes |= {name: math.prod(shape) + shape[0] * _FLOAT32_BYTES for name, shape in matrices.items()}
    if quantization == "packed":
        sizes |= {name: _packed_bytes(table[name], kept) for name, kept in kept_formats(table, formats or {}).items()}
    return sizes


def _weight_bytes(model: ModelConfig, tp_size: int, rank: int, *, dtype: str, quantization: str) -> dict[str, int]:
    table = shard_table(model, tp_size, rank)
    return weight_bytes(
        table, dtype=dtype, quantization=quantization, formats=model.weight_formats, fp8_weights=model.fp8_weights
    )


def _packed_bytes(shard: Shard, kept: GroupFormat) -> int:
    start, stop = (shard.start, shard.stop) if shard.axis == 1 else (0, shard.full_shape[1])
    return kept.matrix_bytes(shard.shape[0], start, stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftMemory:
    """What a draft model takes on rank 0, which holds all of it, with keys and values of as many tokens as the group's cache."""

    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    pass_bytes: int
    """Read from memory in each pass, as RankMemory.decode_bytes."""


def draft_memory(model: ModelConfig, *, dtype: str, quantization: str = "", max_num_seqs: int) -> DraftMemory:
    """For a group of so many sequences."""
    sizes = _weight_bytes(model, 1, 0, dtype=dtype, quantization=quantization)
    workload = Workload(
        max_model_len=model.max_position,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_TOKENS_AT_A_TIME + max_num_seqs * (MAX_DRAFTS + 1),
    )
    return DraftMemory(
        weight_bytes=sum(sizes.values()),
        activation_bytes=activation_bytes(model, 1, 0, dtype=dtype, workload=workload),
        kv_bytes_per_token=kv_bytes_per_token(model, model.num_kv_heads, dtype),
        pass_bytes=sum(sizes.values()) - (sizes[EMBEDDING] if LM_HEAD in sizes else 0),
    )


def plan_group(
    model: ModelConfig,
    tp_size: int,
    *,
    dtype: str,
    quantization: str = "",
    kv_cache_dtype: str = "",
    device: Device,
    workload: Workload,
    utilisation: float = 0.9,
    draft: DraftMemory | None = None,
) -> GroupMemory:
    """`utilisation` is the part of the device that may be planned with; `draft` is that of the group's draft model;
    `kv_cache_dtype` as in ParallelConfig.

    Raises ConfigError when a rank would have no head.
    """

    def plan_rank(rank: int) -> RankMemory:
        heads = partition_heads(model.num_query_heads, model.num_kv_heads, tp_size, rank)
        sizes = _weight_bytes(model, tp_size, rank, dtype=dtype, quantization=quantization)
        weights = sum(sizes.values())
        embedding = sizes[EMBEDDING] if LM_HEAD in sizes else 0
        activations = activation_bytes(model, tp_size, rank, dtype=dtype, workload=workload)
        extra = draft if rank == 0 else None
        return RankMemory(
            rank=rank,
            heads=heads,
            weight_bytes=weights + (extra.weight_bytes if extra else 0),
            activation_bytes=max(activations, extra.activation_bytes if extra else 0),
            kv_bytes_per_token=kv_bytes_per_token(model, len(heads.kv_heads), kv_cache_dtype or dtype)
            + (extra.kv_bytes_per_token if extra else 0),
            budget_bytes=int(device.memory_bytes * utilisation),
            decode_bytes=weights - embedding,
        )

    return GroupMemory(ranks=tuple(map(plan_rank, range(tp_size))), device=device, workload=workload)


def smallest_tp_size(
    model: ModelConfig,
    *,
    dtype: str,
    quantization: str = "",
    kv_cache_dtype: str = "",
    device: Device,
    workload: Workload,
    utilisation: float = 0.9,
    draft: DraftMemory | None = None,
) -> int | None:
    """The fewest ranks on such devices that can serve one sequence of max_model_len; None when no number can."""
    for tp_size in range(1, model.num_query_heads + 1):
        group = plan_group(
            model,
            tp_size,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            workload=workload,
            utilisation=utilisation,
            draft=draft,
        )
        if group.fits:
            return tp_size
    return None


def kv_cache_tokens(group: GroupMemory, wanted: int | None) -> int:
    """Size of a group's cache: what was asked for, else all that fits.

    Raises ConfigError, with the numbers of the fullest rank, when that does not fit.
    """
    fullest = min(group.ranks, key=lambda rank: rank.kv_tokens)
    needed = group.workload.max_model_len if wanted is None else wanted
    if needed <= fullest.kv_tokens:
        return fullest.kv_tokens if wanted is None else wanted
    raise ConfigError(
        f"rank {fullest.rank} of {len(group.ranks)} needs {fullest.weight_bytes / GIB:.2f} GiB for weights, "
        f"{fullest.activation_bytes / GIB:.2f} GiB for activations and {fullest.kv_bytes_per_token * needed / GIB:.2f} GiB "
        f"for {needed} tokens of KV cache, and may use {fullest.budget_bytes / GIB:.2f} GiB; {fullest.kv_tokens} tokens fit"
    )


DEVICE_RESERVE_BYTES = 512 << 20
"""Of a GPU's memory, for cuBLAS, compiled kernels and what the allocator cannot use."""


def check_cache_fits(config: GroupConfig, model: ModelConfig, rank: int, *, free_bytes: int) -> None:
    """Whether a rank's cache and one step fit into what a GPU has free with the weights loaded. Raises ConfigError."""
    parallel, scheduler, cache = config.parallel, config.scheduler, config.cache
    heads = partition_heads(model.num_query_heads, model.num_kv_heads, parallel.tp_size, rank)
    # Steps that are captured as graphs have memory of their own, for as many tokens as there are sequences.
    activations = sum(
        activation_bytes(
            model,
            parallel.tp_size,
            rank,
            dtype=parallel.dtype,
            workload=Workload(
                max_model_len=scheduler.max_model_len,
                max_num_seqs=scheduler.max_num_seqs,
                max_num_batched_tokens=num_tokens,
            ),
        )
        for num_tokens in (scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
    )
    block_bytes = (
        kv_bytes_per_token(model, len(heads.kv_heads), parallel.kv_cache_dtype or parallel.dtype) * cache.block_size
    )
    needed = (cache.num_blocks + 1) * block_bytes  # and the scratch block
    adapters = 0 if config.adapters is None else config.adapters.max_bytes
    room = max(0, free_bytes - DEVICE_RESERVE_BYTES - activations - adapters)
    if needed > room:
        raise ConfigError(
            f"cache.num_blocks is {cache.num_blocks}: rank {rank} needs {needed / GIB:.2f} GiB for them, and has room for "
            f"{room / GIB:.2f} GiB, which is {max(0, room // block_bytes - 1)} blocks: {free_bytes / GIB:.2f} GiB are free "
            f"with the weights loaded, less {activations / GIB:.2f} GiB for a step, {adapters / GIB:.2f} GiB for adapters and "
            f"{DEVICE_RESERVE_BYTES / GIB:.2f} GiB of reserve"
        )
