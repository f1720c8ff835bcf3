"""From a `models:` entry of the configuration to what gateways and replica groups are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig
from model_parallel.errors import ConfigError
from model_parallel.memory import Device, Workload, kv_cache_tokens, plan_group
from serving.config import ChatConfig, ModelEntry
from serving.contracts.models import ModelCard
from serving.models.fetch import KNOWN_MODELS, resolve_source
from serving.models.licence import licence_of


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """What one replica group of a model is started from. Plain data: it travels to the group's leader."""

    card: ModelCard
    model: ModelConfig
    parallel: ParallelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    cpus_per_rank: float
    progress_directory: str = ""
    """Where the leader tells how far its ranks have loaded; "" when nobody on its host looks."""


def resolve_model(entry: ModelEntry) -> GroupSpec:
    """Find the model's files (fetching a known model that is not here yet), read its configuration, check the entry against it.

    Raises ConfigError, CheckpointError, FetchError.
    """
    info = describe(resolve_source(entry.source))
    parallel = ParallelConfig(
        tp_size=entry.tensor_parallel_size,
        device=entry.device,
        dtype=entry.dtype,
        quantization=entry.quantization or "",
        num_threads=entry.threads_per_rank,
        start_timeout_s=entry.start_timeout_s,
        step_timeout_s=entry.step_timeout_s,
    )
    parallel.check_fits(info.config)
    cache = CacheConfig(
        num_blocks=-(-entry.kv_cache_tokens // entry.block_size),
        block_size=entry.block_size,
        enable_prefix_caching=entry.prefix_caching,
    )
    max_model_len = _max_model_len(entry, info.config.max_position, cache.num_tokens)
    scheduler = SchedulerConfig(
        max_num_seqs=entry.max_num_seqs,
        max_num_batched_tokens=entry.max_num_batched_tokens,
        max_prefill_tokens=entry.max_prefill_tokens,
        max_model_len=max_model_len,
        max_waiting_requests=entry.max_waiting_requests,
        max_waiting_tokens=entry.max_waiting_tokens,
    )
    return GroupSpec(
        card=_card(entry, info, max_model_len),
        model=info.config,
        parallel=parallel,
        cache=cache,
        scheduler=scheduler,
        cpus_per_rank=entry.cpus_per_rank,
    )


def check_memory(specs: Sequence[GroupSpec], available_bytes: int) -> None:
    """Refuse what one host of so much free memory cannot hold, every group's every rank counted.

    Raises ConfigError with the numbers of the fullest rank.
    """
    num_ranks = sum(spec.card.num_groups * spec.parallel.tp_size for spec in specs)
    share = Device(name="host", memory_bytes=available_bytes // num_ranks, bandwidth_bytes_per_s=math.inf)
    for spec in specs:
        scheduler = spec.scheduler
        workload = Workload(
            max_model_len=scheduler.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
        )
        parallel = spec.parallel
        group = plan_group(
            spec.model,
            parallel.tp_size,
            dtype=parallel.dtype,
            quantization=parallel.quantization,
            device=share,
            workload=workload,
        )
        try:
            kv_cache_tokens(group, spec.cache.num_tokens)
        except ConfigError as error:
            raise ConfigError(f"models.{spec.card.name} does not fit this host's free memory: {error}") from error


def free_memory_bytes() -> int:
    """What this host can give without swapping (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _max_model_len(entry: ModelEntry, max_position: int, cache_tokens: int) -> int:
    if entry.max_model_len is None:
        return min(max_position, cache_tokens)
    for what, limit in (("the model's own length is", max_position), ("kv_cache_tokens gives room for", cache_tokens)):
        if entry.max_model_len > limit:
            raise ConfigError(f"models.{entry.name}.max_model_len is {entry.max_model_len}, but {what} {limit} tokens")
    return entry.max_model_len


def _chat(entry: ModelEntry, info: CheckpointInfo) -> ChatConfig | None:
    if entry.chat is not None:
        return entry.chat
    if known := KNOWN_MODELS.get(entry.source):
        return ChatConfig.model_validate({"format": known.chat_format, "default_system": known.chat_default_system})
    return ChatConfig.model_validate({"format": info.chat_format}) if info.chat_format else None


def _card(entry: ModelEntry, info: CheckpointInfo, max_model_len: int) -> ModelCard:
    chat = _chat(entry, info)
    return ModelCard(
        name=entry.name,
        source=str(info.path),
        architecture="llama",
        num_parameters=info.config.num_parameters,
        vocab_size=info.config.vocab_size,
        max_model_len=max_model_len,
        bos_token_id=info.config.bos_token_id,
        eos_token_ids=info.config.eos_token_ids,
        chat_format=chat.format if chat else "",
        chat_default_system=chat.default_system if chat else "",
        dtype=entry.dtype,
        device=entry.device,
        tensor_parallel_size=entry.tensor_parallel_size,
        num_groups=entry.num_groups,
        deterministic=False,
        kernels="",
        licence=licence_of(info),
    )
