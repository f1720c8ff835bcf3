"""What a directory with a LoRA adapter of PEFT's format holds (Hu et al. 2021), read without torch: settings and tensor headers.

An adapter adds scale · B · A to some of a layer's matrices; A is [rank, features in], B is [features out, rank]. What changes
anything else, or in any other way, is refused by name: what would be left out would change answers silently.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from model_parallel.checkpoint.patterns import PatternError, matching
from model_parallel.checkpoint.placeholders import is_present, what_it_is
from model_parallel.checkpoint.settings import Settings, join, read_json
from model_parallel.config import DTYPE_BYTES, ModelConfig
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import Shard, shard_table

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 128
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_MODULES = ("gate_proj", "up_proj", "down_proj")
COLUMN_PADDING = 16
"""Backends may round ranks, and rows of B, up to so many."""
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B")
_READABLE = ("F64", "F32", "F16", "BF16")
_CHUNK_BYTES = 1 << 20
# Ways to make the first A and B that leave the base model's weights as they are, so that the adapter is one of the model that is
# served. Every other way that PEFT knows changes these weights, and what PEFT does not know yet may.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_READ = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "bias", "init_lora_weights",
})  # fmt: skip
# About training, or about where the adapter comes from. They change nothing of what it computes.
_WITHOUT_EFFECT = frozenset({
    "inference_mode", "lora_dropout", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """An adapter that fits a model."""

    path: Path
    digest: str
    """SHA-256 of settings and weights (hexadecimal)."""
    rank: int
    scale: float
    """What B · A is multiplied by."""
    modules: tuple[str, ...]
    """Matrices that it changes, by the base model's names for their weights."""
    base_model: str
    """Name of the model that it was made for, as it says; "" when it does not."""

    def tensor_name(self, module: str, part: str) -> str:
        """Of `part` "lora_A" or "lora_B" in the file."""
        return _tensor_name(module, part)


def describe_adapter(path: Path, model: ModelConfig) -> AdapterInfo:
    """Read settings and the weights' header, check both against the model, and hash both files.

    Raises CheckpointError that names the file, and the setting or the tensor.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; an adapter is one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    settings = Settings(path / CONFIG_FILE, read_json(path / CONFIG_FILE))
    scale = _scale(settings)
    table = {name: shard for name, shard in shard_table(model, 1, 0).items() if len(shard.full_shape) == 2}
    modules = tuple(sorted(_targets(settings, model)))
    _check_tensors(path / WEIGHTS_FILE, settings.whole("r"), modules, table)
    return AdapterInfo(
        path=path,
        digest=digest_of(path),
        rank=settings.whole("r"),
        scale=scale,
        modules=modules,
        base_model=settings.text("base_model_name_or_path"),
    )


def digest_of(path: Path) -> str:
    """Of an adapter's two files. Raises CheckpointError naming the one that cannot be read."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with (path / name).open("rb") as file:
                digest.update((path / name).stat().st_size.to_bytes(8, "little"))
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
    return digest.hexdigest()


def adapter_bytes(info: AdapterInfo, model: ModelConfig, tp_size: int, *, dtype: str) -> int:
    """What the fullest rank of a group keeps of it, rounded up as any backend may."""

    def of_rank(rank: int) -> int:
        table = shard_table(model, tp_size, rank)
        padded = _round_up(info.rank)
        shapes = (table[f"{module}.weight"].shape for module in info.modules)
        return sum((_round_up(rows) + _round_up(columns)) * padded for rows, columns in shapes) * DTYPE_BYTES[dtype]

    return max(of_rank(rank) for rank in range(tp_size))


def adapter_shards(module: str, table: dict[str, Shard], rank: int) -> tuple[Shard, Shard]:
    """A rank's parts of A and B of a module, by its part of the matrix (`table`: partition.shard_table).

    Where rows of the matrix are cut, A is whole and B's rows are cut; where columns are, A's columns are cut and B is whole.
    The product is then the rank's part of the result, as that of the matrix is. `rank` is the adapter's.
    """
    matrix = table[f"{module}.weight"]
    num_rows, num_columns = matrix.full_shape
    down, up = Shard((rank, num_columns)), Shard((num_rows, rank))
    if matrix.axis == 0:
        return down, Shard(up.full_shape, 0, matrix.start, matrix.stop)
    return Shard(down.full_shape, 1, matrix.start, matrix.stop), up


def _round_up(number: int) -> int:
    return -(-number // COLUMN_PADDING) * COLUMN_PADDING


def _tensor_name(module: str, part: str) -> str:
    return f"{_PREFIX}{module}.{part}.weight"


def _scale(settings: Settings) -> float:
    """Of settings that are checked for everything else here. Raises CheckpointError."""
    if settings.text("peft_type") != "LORA":
        raise CheckpointError(
            f"{settings.path}: peft_type is {settings.values.get('peft_type')!r:.80}; only LORA can be served"
        )
    settings.require({"task_type": ("CAUSAL_LM", None), "bias": ("none", None)})
    for key, value in settings.values.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"{settings.path}: {key} is {value!r:.80}, which is not supported; it must not be set"
            )
    made = settings.values.get("init_lora_weights")
    if (made.lower() if isinstance(made, str) else made) not in _INITIALISATIONS:
        raise CheckpointError(
            f"{settings.path}: init_lora_weights is {made!r:.80}; allowed: true, false, gaussian, eva, orthogonal and mica. "
            "Others change the base model's weights when training begins: save such an adapter converted for the original model "
            "(PEFT's path_initial_model_for_weight_conversion)"
        )
    rank, alpha = settings.whole("r"), settings.real("lora_alpha")
    if not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{settings.path}: r is {rank}; allowed: from 1 to {MAX_RANK}")
    return alpha / (math.sqrt(rank) if settings.flag("use_rslora") else rank)


def _targets(settings: Settings, model: ModelConfig) -> frozenset[str]:
    """Modules that the settings name. Raises CheckpointError for those that cannot be adapted, and for none."""
    known = [f"model.layers.{layer}.{module}" for layer in range(model.num_layers) for module in _layer_modules()]
    others = ["model.embed_tokens", "lm_head"]
    targets = settings.values.get("target_modules")
    found = frozenset(known) if targets == "all-linear" else _named(settings, "target_modules", [*known, *others])
    if settings.values.get("exclude_modules"):
        found -= _named(settings, "exclude_modules", [*known, *others])
    if wrong := next((module for module in others if module in found), ""):
        raise CheckpointError(
            f"{settings.path}: target_modules names {wrong}, which cannot be adapted; "
            f"allowed: {', '.join((*ATTENTION_MODULES, *FEED_FORWARD_MODULES))}"
        )
    if not found:
        raise CheckpointError(
            f"{settings.path}: target_modules is {targets!r:.200}, which names no matrix of the model; "
            f"allowed: {', '.join((*ATTENTION_MODULES, *FEED_FORWARD_MODULES))}, a pattern for these, or all-linear"
        )
    return found


def _layer_modules() -> tuple[str, ...]:
    return (
        *(f"self_attn.{name}" for name in ATTENTION_MODULES),
        *(f"mlp.{name}" for name in FEED_FORWARD_MODULES),
    )


def _named(settings: Settings, key: str, modules: list[str]) -> frozenset[str]:
    """The modules that a setting names. As in PEFT, a text is a pattern for whole names, in a list are names or their ends."""
    value = settings.values.get(key)
    if isinstance(value, str):
        try:
            return matching([value], modules, whole=True)
        except PatternError as error:
            raise CheckpointError(f"{settings.path}: {key} is {value!r:.80}, which {error}") from error
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        ends = tuple(f".{name}" for name in value)
        return frozenset(module for module in modules if f".{module}".endswith(ends))
    raise CheckpointError(f"{settings.path}: {key} is {value!r:.80}; names, or one pattern, are needed")


def _check_tensors(path: Path, rank: int, modules: tuple[str, ...], table: dict[str, Shard]) -> None:
    """The file holds exactly A and B of each module, in shapes that fit. Raises CheckpointError."""
    stored = _headers(path)
    wanted: dict[str, list[int]] = {}
    for module in modules:
        num_rows, num_columns = table[f"{module}.weight"].full_shape
        wanted[_tensor_name(module, "lora_A")] = [rank, num_columns]
        wanted[_tensor_name(module, "lora_B")] = [num_rows, rank]
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"{path} lacks {join(missing)}, which {CONFIG_FILE} says is there")
    if left_over := sorted(stored.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path} holds tensors that cannot be served, or that {CONFIG_FILE} does not name: {join(left_over)}"
        )
    for name, shape in wanted.items():
        kind, found = stored[name]
        if found != shape:
            raise CheckpointError(f"{path}: {name} has shape {found}; the model and r = {rank} need {shape}")
        if kind not in _READABLE:
            raise CheckpointError(
                f"{path}: {name} is of type {kind}; floating-point weights of 16, 32 or 64 bits are needed"
            )


def _headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """(type, shape) by name. Raises CheckpointError: the library checks lengths, offsets, types and overlaps."""
    if not is_present(path):
        others = [p.name for p in path.parent.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {join(others)} cannot be read: save the adapter as safetensors" if others else ""
        raise CheckpointError(f"{path.parent} holds no {WEIGHTS_FILE}{hint}")
    try:
        with safe_open(path, framework="np") as library:
            slices = {name: library.get_slice(name) for name in library.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        if found := what_it_is(path):
            raise CheckpointError(f"{path} {found}") from error
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
