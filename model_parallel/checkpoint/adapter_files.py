"""What a directory with a LoRA adapter of PEFT's format holds (Hu et al. 2021), read without torch: settings and tensor headers.

An adapter adds scale · B · A to some of a layer's matrices; A is [rank, features in], B is [features out, rank]. What changes
anything else, or in any other way, is refused by name: what would be left out would change answers silently.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from model_parallel.checkpoint.patterns import PatternError, matching
from model_parallel.checkpoint.placeholders import MAX_SAFETENSORS_HEADER, is_present, what_it_is
from model_parallel.checkpoint.settings import Settings, join, read_json_and_bytes
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
READABLE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by the file's name for its type."""
_LENGTH_BYTES = 8
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTensor:
    """A or B of a module, as it is stored."""

    name: str
    module: str
    part: str
    """"lora_A" or "lora_B"."""
    type: str
    """One of READABLE."""
    shape: tuple[int, ...]
    content: bytearray


class _Stored(msgspec.Struct, frozen=True):
    """A tensor in a safetensors file's header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Of one whose type is READABLE."""
        return math.prod(self.shape) * READABLE[self.dtype]


class AdapterReader:
    """Reads each of an adapter's two files once, from its beginning to its end.

    What is checked, what is hashed and what is given out are so the same bytes, whatever happens to the files meanwhile; and no
    file is mapped, because a process that reads a mapped file while somebody shortens it is killed.
    """

    def __init__(self, path: Path, model: ModelConfig) -> None:
        """Read the settings and check them. Raises CheckpointError that names the file and the setting."""
        if not path.is_dir():
            raise CheckpointError(f"{path} is no directory; an adapter is one with {CONFIG_FILE} and {WEIGHTS_FILE}")
        values, content = read_json_and_bytes(path / CONFIG_FILE)
        settings = Settings(path / CONFIG_FILE, values)
        self.path = path
        self.scale = _scale(settings)
        self.rank = settings.whole("r")
        self.modules = tuple(sorted(_targets(settings, model)))
        self._base_model = settings.text("base_model_name_or_path")
        self._wanted = _wanted_tensors(self.modules, self.rank, model)
        self._digest = hashlib.sha256(len(content).to_bytes(_LENGTH_BYTES, "little") + content)

    def tensors(self) -> Iterator[AdapterTensor]:
        """Every A and B, in the file's order. Raises CheckpointError that names the file, and the tensor."""
        path = self.path / WEIGHTS_FILE
        _check_present(path)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._digest.update(size.to_bytes(_LENGTH_BYTES, "little"))
                for name, stored in self._header(path, file, size).items():
                    module, part, shape = self._wanted[name]
                    content = self._read(path, file, stored.num_bytes)
                    yield AdapterTensor(
                        name=name, module=module, part=part, type=stored.dtype, shape=shape, content=content
                    )
                if file.read(1):
                    raise CheckpointError(f"{path} grew while it was read; add the adapter when it is written")
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error

    def info(self) -> AdapterInfo:
        """Of all that was read; `tensors` must have come to its end."""
        return AdapterInfo(
            path=self.path,
            digest=self._digest.hexdigest(),
            rank=self.rank,
            scale=self.scale,
            modules=self.modules,
            base_model=self._base_model,
        )

    def _header(self, path: Path, file: BinaryIO, size: int) -> dict[str, _Stored]:
        """By name, in the order in which the tensors lie in the file, one directly after the other up to its end."""
        length = int.from_bytes(self._read(path, file, _LENGTH_BYTES), "little")
        if length > MAX_SAFETENSORS_HEADER:
            raise _invalid(path, f"its header would have {length} bytes; the most is {MAX_SAFETENSORS_HEADER}")
        try:
            header = msgspec.json.decode(self._read(path, file, length), type=dict[str, msgspec.Raw])
            msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
            stored = {name: msgspec.json.decode(raw, type=_Stored) for name, raw in header.items()}
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise _invalid(path, str(error)) from error
        _check_tensors(path, self.rank, self._wanted, stored)
        in_order = dict(sorted(stored.items(), key=lambda item: item[1].data_offsets))
        position = 0
        for name, tensor in in_order.items():
            if tensor.data_offsets != (position, position := position + tensor.num_bytes):
                raise _invalid(path, f"{name} does not lie where the tensor before it ends, or not in its length")
        if size != file.tell() + position:
            raise _invalid(path, f"it has {size} bytes where its header says {file.tell() + position}")
        return in_order

    def _read(self, path: Path, file: BinaryIO, num_bytes: int) -> bytearray:
        content = bytearray(num_bytes)
        if file.readinto(content) < num_bytes:  # type: ignore[attr-defined]
            raise _invalid(path, "it is cut off")
        self._digest.update(content)
        return content


def describe_adapter(path: Path, model: ModelConfig) -> AdapterInfo:
    """Read both files, check settings and tensors against the model, and hash them.

    Raises CheckpointError that names the file, and the setting or the tensor.
    """
    reader = AdapterReader(path, model)
    for _ in reader.tensors():
        pass
    return reader.info()


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


def _wanted_tensors(
    modules: Sequence[str], rank: int, model: ModelConfig
) -> dict[str, tuple[str, str, tuple[int, int]]]:
    """(module, part, shape) of A and B of each module, by their names in the file."""
    table = shard_table(model, 1, 0)
    wanted = {}
    for module in modules:
        num_rows, num_columns = table[f"{module}.weight"].full_shape
        for part, shape in zip(_PARTS, ((rank, num_columns), (num_rows, rank)), strict=True):
            wanted[f"{_PREFIX}{module}.{part}.weight"] = module, part, shape
    return wanted


def _check_tensors(
    path: Path, rank: int, wanted: Mapping[str, tuple[str, str, tuple[int, int]]], stored: Mapping[str, _Stored]
) -> None:
    """The file holds exactly the wanted tensors, in shapes that fit. Raises CheckpointError."""
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"{path} lacks {join(missing)}, which {CONFIG_FILE} says is there")
    if left_over := sorted(stored.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path} holds tensors that cannot be served, or that {CONFIG_FILE} does not name: {join(left_over)}"
        )
    for name, (_, _, shape) in wanted.items():
        found = stored[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found.shape)}; the model and r = {rank} need {list(shape)}"
            )
        if found.dtype not in READABLE:
            raise CheckpointError(
                f"{path}: {name} is of type {found.dtype}; floating-point weights of 16, 32 or 64 bits are needed"
            )


def _check_present(path: Path) -> None:
    if not is_present(path):
        others = [p.name for p in path.parent.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {join(others)} cannot be read: save the adapter as safetensors" if others else ""
        raise CheckpointError(f"{path.parent} holds no {WEIGHTS_FILE}{hint}")


def _invalid(path: Path, reason: str) -> CheckpointError:
    if found := what_it_is(path):
        return CheckpointError(f"{path} {found}")
    return CheckpointError(f"{path} is not a valid safetensors file: {reason}")
