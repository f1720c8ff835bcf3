"""Settings that are left to Packtrain: device, dtype, threads, batch and KV cache of each model, from what the machine has.

A setting that is given keeps its meaning; only what says auto, or nothing, is chosen here.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from model_parallel.checkpoint.detect import CheckpointInfo, describe, read_json
from model_parallel.config import DTYPE_BYTES, AdapterConfig, ModelConfig
from model_parallel.errors import ConfigError
from model_parallel.gpus import Gpu, check_multiplies_fp8, torch_has_cuda, visible_gpus
from model_parallel.machine import Machine, read_machine
from model_parallel.memory import (
    DEVICE_RESERVE_BYTES,
    GIB,
    Device,
    DraftMemory,
    GroupMemory,
    Workload,
    activation_bytes,
    draft_memory,
    kv_bytes_per_token,
    plan_group,
)
from serving.config import AUTO, ModelEntry
from serving.models.fetch import resolve_source

UTILISATION = 0.9
"""Part of a host's free memory that may be planned with; of a GPU's, models.memory_utilization says it."""
STACK_BYTES = 950 << 20
"""What Ray, Serve, a gateway and the command itself take. Measured as proportional set size."""
LEADER_BYTES = 150 << 20
RANK_BYTES = 350 << 20
"""Of a rank's process without weights, activations and cache: Python, torch, Ray's worker."""
CPU_CACHE_BYTES = 2 << 30
"""A CPU computes slowly, so that a larger cache would seldom be full."""
CPU_CACHE_SEQUENCES = 4
"""But at least so many sequences of the longest length, where half of the free memory has room for them."""
_LEAST_TOKENS = 512
_STEP_SIZES = {"cpu": (64, 512), "cuda": (256, 2048)}
"""(max_num_seqs, max_num_batched_tokens) by device. A GPU reads its weights in about the same time for a few rows and for some
hundred, and int8 prefill on an H200 goes through 1.7 times as many tokens a second in pieces of 2,048 as in pieces of 512."""
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
_GGUF_FILE_TYPES = {0: "float32", 1: "float16", 32: "bfloat16"}
"""`general.file_type` of files that are not quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What ranks run on. Of a cluster that is joined: one of its nodes, and the GPUs of all."""

    machine: Machine
    gpus: tuple[Gpu, ...] = ()
    num_gpus: int = 0


def this_host() -> Host:
    """GPUs count only where torch can use them."""
    gpus = visible_gpus() if torch_has_cuda() else ()
    return Host(machine=read_machine(), gpus=gpus, num_gpus=len(gpus))


def look_at_node() -> tuple[Machine, tuple[Gpu, ...]]:
    """Runs on a node of a cluster. Ray hides GPUs from what has not asked for one, so the driver's own list counts."""
    return read_machine(), visible_gpus({})


def choose_sizes(entries: Sequence[ModelEntry], infos: Sequence[CheckpointInfo], host: Host) -> list[ModelEntry]:
    """The entries with nothing left to choose. Raises ConfigError when a rank would have no head."""
    chosen = [
        entry.model_copy(update={"device": _device(entry, entries, host)}) if entry.device == AUTO else entry
        for entry in entries
    ]
    chosen = [
        entry.model_copy(update={"dtype": _dtype(stored_dtype(info), entry.device)}) if entry.dtype == AUTO else entry
        for entry, info in zip(chosen, infos, strict=True)
    ]
    chosen = [
        entry.model_copy(update={"quantization": _quantization(entry, info, host)})
        for entry, info in zip(chosen, infos, strict=True)
    ]
    num_cpu_ranks = sum(num_ranks(entry) for entry in chosen if entry.device == "cpu")
    threads = max(1, host.machine.num_cpus // max(1, num_cpu_ranks))
    chosen = [
        entry if entry.threads_per_rank is not None else entry.model_copy(update={"threads_per_rank": threads})
        for entry in map(with_step_sizes, chosen)
    ]
    configs = [info.config for info in infos]
    room = _room_for_caches(chosen, configs, host.machine)
    return [
        entry
        if entry.kv_cache_tokens is not None
        else entry.model_copy(update={"kv_cache_tokens": _cache_tokens(entry, config, host, room)})
        for entry, config in zip(chosen, configs, strict=True)
    ]


def with_step_sizes(entry: ModelEntry) -> ModelEntry:
    """An entry whose device is chosen, with the largest step chosen too."""
    sizes = step_sizes(entry.device, entry.max_num_seqs, entry.max_num_batched_tokens)
    return entry.model_copy(
        update={"max_num_seqs": sizes.max_num_seqs, "max_num_batched_tokens": sizes.max_num_batched_tokens}
    )


class StepSizes(NamedTuple):
    """The largest step of a group."""

    max_num_seqs: int
    max_num_batched_tokens: int

    def __str__(self) -> str:
        return f"steps of at most {_count(self.max_num_seqs, 'sequence')} and {self.max_num_batched_tokens:,} tokens"


def step_sizes(device: str, max_num_seqs: int | None, max_num_batched_tokens: int | None) -> StepSizes:
    """By kind of device ("cpu", "cuda"), where they are not given: what is given bounds what is not. Raises ConfigError for two
    that do not go together."""
    if max_num_seqs is not None and max_num_batched_tokens is not None and max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens is {max_num_batched_tokens} and max_num_seqs {max_num_seqs}; a step must have room for a "
            "token of each sequence that runs"
        )
    num_seqs, num_batched_tokens = _STEP_SIZES[device]
    if max_num_seqs is not None:
        num_batched_tokens = max(num_batched_tokens, max_num_seqs)
    if max_num_batched_tokens is not None:
        num_seqs = min(num_seqs, max_num_batched_tokens)
    return StepSizes(max_num_seqs or num_seqs, max_num_batched_tokens or num_batched_tokens)


def describe_sizes(entry: ModelEntry, config: ModelConfig) -> str:
    """One line that tells what a model runs with, all of which is chosen."""
    workload = workload_of(entry, config)
    per_token = kv_bytes_per_token(config, config.num_kv_heads, entry.kept_kv_cache_dtype or entry.dtype)
    tokens = entry.kv_cache_tokens or 0
    threads = f", {_count(entry.threads_per_rank or 1, 'thread')} a rank" if entry.device == "cpu" else ""
    weights = f"{entry.dtype} with {entry.kept_quantization} weights" if entry.kept_quantization else entry.dtype
    weight_bytes = sum(rank.weight_bytes for rank in plan_entry(entry, config, 0).ranks)
    groups = f"{entry.num_groups} groups of " if entry.num_groups > 1 else ""
    if entry.most_groups != entry.num_groups:
        groups = f"{entry.num_groups}, and at most {entry.most_groups}, groups of "
    draft = "" if entry.draft_model is None else f", drafts by {entry.draft_model}"
    return (
        f"{entry.name}: {groups}{_count(entry.tensor_parallel_size, 'rank')} on {entry.device}, {weights} "
        f"({weight_bytes / GIB:.2f} GiB){draft}{threads}, KV cache of {tokens:,} tokens ({tokens * per_token / GIB:.2f} GiB), "
        f"{StepSizes(workload.max_num_seqs, workload.max_num_batched_tokens)}"
    )


def num_ranks(entry: ModelEntry) -> int:
    """Of all groups that there can be."""
    return entry.most_groups * entry.tensor_parallel_size


def adapter_config_of(entry: ModelEntry) -> AdapterConfig | None:
    """None for a model that takes no adapters."""
    if entry.lora is None:
        return None
    return AdapterConfig(
        max_loaded=entry.lora.max_loaded,
        max_bytes=entry.lora.max_bytes,
        host_cache_bytes=entry.lora.host_cache_bytes,
    )


def adapter_reserve(entry: ModelEntry) -> int:
    """Bytes of the host that the adapters of all groups may take."""
    if entry.lora is None:
        return 0
    on_host = entry.lora.host_cache_bytes + (entry.lora.max_bytes if entry.device == "cpu" else 0)
    return num_ranks(entry) * on_host


def process_bytes(entries: Sequence[ModelEntry]) -> int:
    """What the processes take before any weight."""
    return STACK_BYTES + sum(e.most_groups * LEADER_BYTES + num_ranks(e) * RANK_BYTES for e in entries)


def stored_dtype(info: CheckpointInfo) -> str:
    """What a checkpoint's weights are stored in; bfloat16 for quantised ones, and where it does not say."""
    match info.format:
        case "gguf":
            from model_parallel.checkpoint.gguf_file import GgufFile  # noqa: PLC0415 - needs NumPy, a quarter of what a command loads

            return _GGUF_FILE_TYPES.get(GgufFile(info.path).get("general.file_type"), "bfloat16")
        case "meta":
            return "bfloat16"  # as published
        case "huggingface":
            settings = read_json(info.path / "config.json")
            stated = settings.get("dtype") or settings.get("torch_dtype")
            if isinstance(stated, str) and stated.removeprefix("torch.") in DTYPE_BYTES:
                return stated.removeprefix("torch.")
            return _safetensors_dtype(info)


def _safetensors_dtype(info: CheckpointInfo) -> str:
    """Of the largest tensor of the first file. A file that cannot be read is told by those who read its weights."""
    path = info.weight_files[0]
    if path.suffix != ".safetensors":
        return "bfloat16"
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, 100 << 20)))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        largest = max(tensors, key=lambda tensor: tensor["data_offsets"][1] - tensor["data_offsets"][0])
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return "bfloat16"
    return _TYPES.get(largest["dtype"], "bfloat16")


def _device(entry: ModelEntry, entries: Sequence[ModelEntry], host: Host) -> str:
    needed = sum(o.num_groups * o.tensor_parallel_size for o in entries if o.device in (AUTO, "cuda"))
    return "cuda" if host.num_gpus and host.num_gpus >= needed else "cpu"


def _dtype(stored: str, device: str) -> str:
    """No CPU kernels compute in float16."""
    return "bfloat16" if stored == "float16" and device == "cpu" else stored


def _quantization(entry: ModelEntry, info: CheckpointInfo, host: Host) -> Literal["int8", "fp8", "packed", "none"]:
    """GPUs' kernels for weights in groups have not run on a device yet, so that there it has to be asked for."""
    gpus = [(gpu.name, gpu.capability) for gpu in host.gpus] if entry.device == "cuda" else [(entry.device, None)]
    for name, capability in gpus:
        if entry.quantization == "fp8":
            check_multiplies_fp8(f"models.{entry.name}.quantization", name, capability)
        if entry.kv_cache_dtype == "fp8":
            check_multiplies_fp8(f"models.{entry.name}.kv_cache_dtype", name, capability, instead=AUTO)
    if entry.quantization == "packed" and not info.config.weight_formats:
        raise ConfigError(
            f"models.{entry.name}.quantization is packed, and {info.path} holds no weights that are quantised in "
            "groups; allowed: int8, fp8, none"
        )
    info.config.check_fp8(f"models.{entry.name}.quantization", entry.quantization or AUTO)
    if entry.quantization is not None:
        return entry.quantization
    return "packed" if entry.device == "cpu" and info.config.weight_formats else "none"


def draft_quantization(draft: CheckpointInfo) -> Literal["packed", ""]:
    """What a draft model's weights are kept in: as they are stored."""
    return "packed" if draft.config.weight_formats else ""


def draft_memory_of(entry: ModelEntry) -> DraftMemory | None:
    """None for a model without a draft model. Raises ConfigError, CheckpointError."""
    if entry.draft_model is None:
        return None
    assert entry.max_num_seqs is not None, "with_step_sizes comes first"
    draft = describe(resolve_source(entry.draft_model, f"models.{entry.name}.draft_model"))
    return draft_memory(
        draft.config, dtype=entry.dtype, quantization=draft_quantization(draft), max_num_seqs=entry.max_num_seqs
    )


def workload_of(entry: ModelEntry, config: ModelConfig, num_batched_tokens: int | None = None) -> Workload:
    """For plan_group, of an entry whose step sizes are chosen; the longest length is the model's own where none is given."""
    assert entry.max_num_seqs is not None and entry.max_num_batched_tokens is not None, "with_step_sizes comes first"
    return Workload(
        max_model_len=entry.max_model_len or config.max_position,
        max_num_seqs=entry.max_num_seqs,
        max_num_batched_tokens=num_batched_tokens or entry.max_num_batched_tokens,
    )


def plan_entry(entry: ModelEntry, config: ModelConfig, memory_bytes: int) -> GroupMemory:
    """What an entry's groups need of ranks with so much memory."""
    return plan_group(
        config,
        entry.tensor_parallel_size,
        dtype=entry.dtype,
        quantization=entry.kept_quantization,
        kv_cache_dtype=entry.kept_kv_cache_dtype,
        device=Device(name="host", memory_bytes=memory_bytes, bandwidth_bytes_per_s=1.0),
        workload=workload_of(entry, config),
        utilisation=entry.memory_utilization if entry.device == "cuda" else UTILISATION,
        draft=draft_memory_of(entry),
    )


def _room_for_caches(entries: Sequence[ModelEntry], configs: Sequence[ModelConfig], machine: Machine) -> int:
    """Bytes of the host for the cache of each rank on a CPU whose size is left to us."""
    rest = int(machine.available_memory_bytes * UTILISATION) - process_bytes(entries)
    rest -= sum(map(adapter_reserve, entries))
    num_open = 0
    for entry, config in zip(entries, configs, strict=True):
        if entry.device != "cpu":
            continue
        for rank in plan_entry(entry, config, 0).ranks:
            rest -= entry.most_groups * (rank.weight_bytes + rank.activation_bytes)
            rest -= entry.most_groups * rank.kv_bytes_per_token * (entry.kv_cache_tokens or 0)
        num_open += num_ranks(entry) * (entry.kv_cache_tokens is None)
    return max(0, rest) // 2 // max(1, num_open)


def _cache_tokens(entry: ModelEntry, config: ModelConfig, host: Host, room_bytes: int) -> int:
    longest = entry.max_model_len or config.max_position
    if entry.device == "cuda":
        tokens = _gpu_cache_tokens(entry, config, host)
    else:
        draft = draft_memory_of(entry)
        per_token = kv_bytes_per_token(config, config.num_kv_heads, entry.dtype)
        per_token += draft.kv_bytes_per_token if draft else 0
        fullest = max(rank.kv_bytes_per_token for rank in plan_entry(entry, config, 0).ranks)
        tokens = min(room_bytes // fullest, max(CPU_CACHE_BYTES // per_token, CPU_CACHE_SEQUENCES * longest))
        tokens = min(tokens, workload_of(entry, config).max_num_seqs * longest)
    # When not even this fits, the check of memory says so with all numbers.
    tokens = max(tokens, min(longest, _LEAST_TOKENS))
    return max(tokens // entry.block_size, 1) * entry.block_size


def _gpu_cache_tokens(entry: ModelEntry, config: ModelConfig, host: Host) -> int:
    """What the GPU with the least free memory has room for beside its rank; see model_parallel.memory.check_cache_fits."""
    if not host.gpus:
        raise ConfigError(
            f"models.{entry.name}.kv_cache_tokens is auto and device is cuda, but no GPU can be asked for its memory "
            "(nvidia-smi); give kv_cache_tokens"
        )
    free = min(gpu.free_bytes for gpu in host.gpus)
    tokens = []
    for rank in plan_entry(entry, config, free).ranks:
        captured = activation_bytes(
            config,
            entry.tensor_parallel_size,
            rank.rank,
            dtype=entry.dtype,
            workload=workload_of(entry, config, entry.max_num_seqs),
        )
        room = rank.budget_bytes - DEVICE_RESERVE_BYTES - rank.weight_bytes - rank.activation_bytes - captured
        room -= 0 if entry.lora is None else entry.lora.max_bytes
        tokens.append(max(0, room) // rank.kv_bytes_per_token)
    return min(tokens)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
