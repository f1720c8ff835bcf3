"""From a `models:` entry of the configuration to what gateways and replica groups are made of."""

from dataclasses import dataclass

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.config import CacheConfig, ParallelConfig, SchedulerConfig
from model_parallel.errors import ConfigError
from serving.config import ChatConfig, ModelEntry
from serving.fetch import KNOWN_MODELS, resolve_source
from serving.gateway.backend import Licence, ModelCard


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """What one replica group of a model is started from. Plain data: it travels to the group's leader."""

    card: ModelCard
    parallel: ParallelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    cpus_per_rank: float


def resolve_model(entry: ModelEntry) -> GroupSpec:
    """Find the model's files (fetching a known model that is not here yet), read its configuration, check the entry against it.

    Raises ConfigError, CheckpointError, FetchError.
    """
    info = describe(resolve_source(entry.source))
    parallel = ParallelConfig(
        tp_size=entry.tensor_parallel_size,
        device=entry.device,
        dtype=entry.dtype,
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
        max_model_len=max_model_len,
        max_waiting_requests=entry.max_waiting_requests,
    )
    return GroupSpec(
        card=_card(entry, info, max_model_len),
        parallel=parallel,
        cache=cache,
        scheduler=scheduler,
        cpus_per_rank=entry.cpus_per_rank,
    )


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
        # The reference kernels keep rows independent of the batch on CPU; GPU libraries do not promise it.
        deterministic=entry.device == "cpu",
        kernels="reference",
        licence=Licence(name=info.licence or "not stated"),
    )
