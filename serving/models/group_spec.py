"""From a `models:` entry of the configuration to what gateways and replica groups are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model_parallel.checkpoint.adapter_files import adapter_bytes, describe_adapter
from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.checkpoint.fingerprint import fingerprint, weights_fingerprint
from model_parallel.config import (
    AdapterConfig,
    CacheConfig,
    DraftConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    TokenTable,
)
from model_parallel.engine.request import AdapterRef
from model_parallel.errors import ConfigError
from model_parallel.machine import Machine
from model_parallel.memory import GIB, Device, Workload, kv_cache_tokens, plan_group
from serving.config import AdapterEntry, ChatConfig, ModelEntry
from serving.contracts.models import AdapterCard, ModelCard
from serving.models.chat import ModelText, resolve_text
from serving.models.fetch import KNOWN_MODELS, resolve_source
from serving.models.generation_defaults import default_sampling
from serving.models.licence import licence_of
from serving.models.sizes import (
    LEADER_BYTES,
    RANK_BYTES,
    UTILISATION,
    Host,
    adapter_config_of,
    adapter_reserve,
    choose_sizes,
    draft_memory_of,
    draft_quantization,
    plan_entry,
    process_bytes,
    this_host,
)
from serving.text.token_table import token_table
from serving.text.tokenizer import make_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """What one replica group of a model is started from. Plain data: it travels to the group's leader."""

    card: ModelCard
    entry: ModelEntry
    """With everything chosen that was left to us."""
    model: ModelConfig
    parallel: ParallelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    cpus_per_rank: float
    tokens: TokenTable | None = None
    """For structured output; None where there is none."""
    adapter_config: AdapterConfig | None = None
    """None: its groups take no adapters."""
    draft: DraftConfig | None = None
    """None: its groups have no draft model."""
    adapters: tuple[AdapterCard, ...] = ()
    """Known from the start."""
    warnings: tuple[str, ...] = ()
    """What was ignored in the checkpoint, or is different from what its files say, as sentences."""
    progress_directory: str = ""
    """Where the leader tells how far its ranks have loaded; "" when nobody on its host looks."""


def resolve_models(entries: Sequence[ModelEntry], host: Host) -> list[GroupSpec]:
    """Find each model's files (fetching a known model that is not here yet), read its configuration, choose for `host` what is
    left to us, check the entry against all of it.

    Raises ConfigError, CheckpointError, FetchError.
    """
    infos = [describe(resolve_source(entry.source, f"models.{entry.name}.source")) for entry in entries]
    for entry, info in zip(entries, infos, strict=True):
        try:
            ParallelConfig(tp_size=entry.tensor_parallel_size).check_fits(info.config)
        except ConfigError as error:
            raise ConfigError(f"models.{entry.name}.{error}") from error
    chosen = choose_sizes(entries, infos, host)
    return [_group_spec(entry, info) for entry, info in zip(chosen, infos, strict=True)]


def resolve_model(entry: ModelEntry) -> GroupSpec:
    """The same for one model on this machine."""
    return resolve_models([entry], this_host())[0]


def _group_spec(entry: ModelEntry, info: CheckpointInfo) -> GroupSpec:
    assert entry.kv_cache_tokens is not None and entry.threads_per_rank is not None, "choose_sizes comes first"
    assert entry.max_num_seqs is not None and entry.max_num_batched_tokens is not None, "choose_sizes comes first"
    parallel = ParallelConfig(
        tp_size=entry.tensor_parallel_size,
        device=entry.device,
        dtype=entry.dtype,
        quantization=entry.kept_quantization,
        deterministic=entry.deterministic,
        kv_cache_dtype=entry.kept_kv_cache_dtype,
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
        speculation=entry.speculation,
        max_model_len=max_model_len,
        max_waiting_requests=entry.max_waiting_requests,
        max_waiting_tokens=entry.max_waiting_tokens,
        max_grammars=entry.max_grammars,
    )
    text = resolve_text(info, _chat(entry))
    adapter_config = adapter_config_of(entry)
    return GroupSpec(
        card=_card(entry, info, text, max_model_len),
        warnings=(*info.warnings, *text.warnings),
        entry=entry,
        model=info.config,
        parallel=parallel,
        cache=cache,
        scheduler=scheduler,
        cpus_per_rank=entry.cpus_per_rank,
        tokens=token_table(text.tokenizer, info.config.vocab_size, text.eos_token_ids)
        if entry.structured_output
        else None,
        adapter_config=adapter_config,
        draft=_draft_config(entry, info, text),
        adapters=tuple(
            describe_card(adapter, entry.name, info.config, parallel, adapter_config, is_configured=True)
            for adapter in (entry.lora.adapters if entry.lora is not None else ())
        ),
    )


def _draft_config(entry: ModelEntry, info: CheckpointInfo, text: ModelText) -> DraftConfig | None:
    """Raises ConfigError where the draft model could not guess the model's tokens."""
    if entry.draft_model is None:
        return None
    where = f"models.{entry.name}.draft_model"
    if entry.device != "cpu":
        raise ConfigError(
            f"{where} is {entry.draft_model!r}, and device is {entry.device}; draft models work on cpu alone"
        )
    draft = describe(resolve_source(entry.draft_model, where))
    size = info.config.vocab_size
    if draft.config.vocab_size != size:
        raise ConfigError(
            f"{where}: {draft.path} has {draft.config.vocab_size} tokens, and {info.path} has {size}; they must be the same"
        )
    theirs = make_tokenizer(draft)  # nobody chats with it, so its chat template does not matter
    for token_id in range(size):
        ours, other = text.tokenizer.token_bytes(token_id), theirs.token_bytes(token_id)
        if ours != other:
            raise ConfigError(
                f"{where}: token {token_id} is {other!r} in {draft.path}, and {ours!r} in {info.path}; the vocabularies must be "
                "the same"
            )
    memory = draft_memory_of(entry)
    assert memory is not None
    step_bytes = max(rank.decode_bytes for rank in plan_entry(entry, info.config, 0).ranks)
    return DraftConfig(
        checkpoint_path=str(draft.path),
        quantization=draft_quantization(draft),
        share=memory.pass_bytes / step_bytes,
    )


def describe_card(
    adapter: AdapterEntry,
    parent: str,
    model: ModelConfig,
    parallel: ParallelConfig,
    config: AdapterConfig | None,
    *,
    is_configured: bool,
) -> AdapterCard:
    """An adapter from its directory, checked against the model `parent`. Raises CheckpointError, and ConfigError when the ranks
    have no room for it."""
    if config is None:
        raise ConfigError(f"model {parent!r} takes no adapters: its lora section is not set")
    info = describe_adapter(adapter.source.absolute(), model)
    num_bytes = adapter_bytes(info, model, parallel.tp_size, dtype=parallel.dtype)
    if num_bytes > config.max_bytes:
        raise ConfigError(
            f"adapter {adapter.name!r} takes {num_bytes} bytes on a rank, and models.{parent}.lora.max_bytes is "
            f"{config.max_bytes}"
        )
    return AdapterCard(
        name=adapter.name,
        parent=parent,
        ref=AdapterRef(info.digest, str(info.path)),
        num_bytes=num_bytes,
        rank=info.rank,
        tenants=adapter.tenants,
        is_configured=is_configured,
    )


def held_bytes(spec: GroupSpec, num_groups: int) -> int:
    """Of a host's memory that so many groups of a model on CPUs hold, processes included."""
    scheduler = spec.scheduler
    workload = Workload(
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
    )
    group = plan_group(
        spec.model,
        spec.parallel.tp_size,
        dtype=spec.parallel.dtype,
        quantization=spec.parallel.quantization,
        kv_cache_dtype=spec.parallel.kv_cache_dtype,
        device=Device(name="host", memory_bytes=0, bandwidth_bytes_per_s=math.inf),
        workload=workload,
        draft=draft_memory_of(spec.entry),
    )
    ranks = sum(
        rank.weight_bytes + rank.activation_bytes + rank.kv_bytes_per_token * spec.cache.num_tokens + RANK_BYTES
        for rank in group.ranks
    )
    adapters = adapter_reserve(spec.entry) // max(1, spec.entry.most_groups)
    return num_groups * (ranks + LEADER_BYTES + adapters)


def check_memory(specs: Sequence[GroupSpec], machine: Machine) -> None:
    """Refuse what one host of so much free memory cannot hold, every process of every group counted.

    Raises ConfigError with the numbers of the fullest rank.
    """
    entries = [spec.entry for spec in specs]
    num_ranks = sum(entry.most_groups * entry.tensor_parallel_size for entry in entries)
    processes = process_bytes(entries)
    limit = f" (limited by {machine.memory_limit})" if machine.memory_limit else ""
    adapters = sum(map(adapter_reserve, entries))
    room = int(machine.available_memory_bytes * UTILISATION) - processes - adapters
    if room <= 0:
        raise ConfigError(
            f"memory: the processes of Ray, gateway, {len(specs)} models and {num_ranks} ranks take {processes / GIB:.2f} GiB "
            f"before any weight, adapters {adapters / GIB:.2f} GiB, and {machine.available_memory_bytes / GIB:.2f} GiB are "
            f"free{limit}, of which {1 - UTILISATION:.0%} are kept back; give it more memory"
        )
    share = Device(name="host", memory_bytes=room // num_ranks, bandwidth_bytes_per_s=math.inf)
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
            kv_cache_dtype=parallel.kv_cache_dtype,
            device=share,
            workload=workload,
            utilisation=1.0,
            draft=draft_memory_of(spec.entry),
        )
        try:
            kv_cache_tokens(group, spec.cache.num_tokens)
        except ConfigError as error:
            raise ConfigError(
                f"models.{spec.card.name} does not fit this host's free memory, {machine.available_memory_bytes / GIB:.2f} "
                f"GiB{limit}, of which {1 - UTILISATION:.0%} are kept back and processes take {processes / GIB:.2f}: {error}"
            ) from error


def _max_model_len(entry: ModelEntry, max_position: int, cache_tokens: int) -> int:
    if entry.max_model_len is None:
        return min(max_position, cache_tokens)
    for what, limit in (("the model's own length is", max_position), ("kv_cache_tokens gives room for", cache_tokens)):
        if entry.max_model_len > limit:
            raise ConfigError(f"models.{entry.name}.max_model_len is {entry.max_model_len}, but {what} {limit} tokens")
    return entry.max_model_len


def _chat(entry: ModelEntry) -> ChatConfig | None:
    """What the configuration says, or what is known of a model that can be fetched by name."""
    if entry.chat is None and (known := KNOWN_MODELS.get(entry.source)):
        return ChatConfig.model_validate({"format": known.chat_format, "default_system": known.chat_default_system})
    return entry.chat


def _card(entry: ModelEntry, info: CheckpointInfo, text: ModelText, max_model_len: int) -> ModelCard:
    chat = text.chat_format
    return ModelCard(
        name=entry.name,
        source=str(info.path),
        checkpoint=fingerprint(info),
        weights=weights_fingerprint(info),
        architecture="llama",
        num_parameters=info.config.num_parameters,
        vocab_size=info.config.vocab_size,
        max_model_len=max_model_len,
        bos_token_id=text.tokenizer.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        chat_format=chat.name if chat else "",
        chat_default_system=(chat.default_system or chat.shown_system) if chat else "",
        chat=chat,
        generation_config=entry.generation_config,
        default_sampling=default_sampling(info, entry.generation_config),
        dtype=entry.dtype,
        device=entry.device,
        tensor_parallel_size=entry.tensor_parallel_size,
        num_groups=entry.num_groups,
        deterministic=False,
        kernels="",
        licence=licence_of(info),
        allow_parse_special=entry.allow_parse_special,
        structured_output=entry.structured_output,
    )
