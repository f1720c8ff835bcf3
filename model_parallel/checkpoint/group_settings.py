"""What a Hugging Face checkpoint says of its quantised weights: AWQ, GPTQ, compressed-tensors. No torch.

Layouts: AutoAWQ's WQLinear_GEMM; GPTQModel's TorchQuantLinear, which also reads the older version 1; compressed-tensors'
pack-quantized.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_parallel.checkpoint.patterns import PatternError, matching
from model_parallel.checkpoint.settings import Settings, read_optional_json
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import LM_HEAD, shard_table
from model_parallel.weight_format import GroupFormat

LARGEST_GROUP = 256
"""Larger groups, and whole channels, are kept as groups of REGROUPED_SIZE with the same scale: kernels work in pieces of them."""
REGROUPED_SIZE = 128
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
_PATTERN = "re:"
"""Before a regular expression, in a list of names."""
_ADVICE = (
    "which cannot be read; AWQ, GPTQ and compressed-tensors of 4 or 8 bits can, and GGUF files, or serve the model's "
    "unquantised checkpoint (with quantization: int8 to save memory)"
)
_NAMES = {"awq": "AWQ", "gptq": "GPTQ", "compressed-tensors": "compressed-tensors"}


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """How linear layers are quantised."""

    method: Literal["awq", "gptq", "compressed-tensors"]
    bits: Literal[4, 8]
    group_size: int
    """Inputs; −1: all of a channel."""
    symmetric: bool
    """The zero is the middle of the range."""
    zeros_less_one: bool = False
    """Zeros are stored as one less (GPTQ version 1)."""
    unconverted: tuple[str, ...] = ()
    """Modules that are not quantised: names or parts of names, or expressions after "re:"."""
    head_converted: bool = False

    @property
    def kept_group_size(self) -> int:
        return self.group_size if 0 < self.group_size <= LARGEST_GROUP else REGROUPED_SIZE

    def group_format(self, scale_type: Literal["float16", "bfloat16", "float32"] = "float16") -> GroupFormat:
        """As it is kept. A number of eight bits is stored less 128."""
        middle = 1 << self.bits - 1
        shift = 0 if self.bits == 4 else -128
        return GroupFormat(
            name=f"{_NAMES[self.method]} {self.bits} bits",
            bits=self.bits,
            kind="fixed_zero" if self.symmetric else "zeros",
            scale_type=scale_type,
            zero=(middle if self.symmetric else int(self.zeros_less_one)) + shift,
            group_size=self.kept_group_size,
        )

    def converted(self, names: Iterable[str]) -> list[str]:
        """Those of the parameters that should be quantised. Raises PatternError."""
        linear = [name for name in names if _LINEAR.fullmatch(name) or (self.head_converted and name == LM_HEAD)]
        left_out = self._left_out([name.removesuffix(".weight") for name in linear])
        return [name for name in linear if name.removesuffix(".weight") not in left_out]

    def _left_out(self, modules: list[str]) -> frozenset[str]:
        patterns = [entry.removeprefix(_PATTERN) for entry in self.unconverted if entry.startswith(_PATTERN)]
        names = [entry for entry in self.unconverted if not entry.startswith(_PATTERN)]
        if self.method == "compressed-tensors":
            ends = tuple(f".{name}" for name in names)
            named = frozenset(module for module in modules if f".{module}".endswith(ends))
        else:
            named = frozenset(module for module in modules if any(name in module for name in names))
        return named | matching(patterns, modules, whole=False)


def read_group_settings(directory: Path, settings: Settings) -> GroupSettings | None:
    """None where the weights are not quantised. Raises CheckpointError naming a method or a setting that cannot be read."""
    given = settings.values.get("quantization_config") or settings.values.get("compression_config")
    if not given and isinstance(own := settings.values.get("quantization"), dict):  # MLX's
        given = own
    if not given:
        for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            if values := read_optional_json(directory / name):
                return _read(Settings(directory / name, values | {"quant_method": values.get("quant_method", method)}))
        return None
    if not isinstance(given, dict):
        raise CheckpointError(f"{settings.path}: quantization_config is {given!r:.80}; an object is needed")
    return _read(Settings(settings.path, given))


def _read(given: Settings) -> GroupSettings:
    method = given.text("quant_method").lower()
    readers = {"awq": _read_awq, "gptq": _read_gptq, "compressed-tensors": _read_compressed_tensors}
    if not method:
        raise CheckpointError(
            f"{given.path}: quantization_config has no quant_method ({given.values!r:.80}), as those of MLX and of older "
            f"bitsandbytes, {_ADVICE}"
        )
    if method not in readers:
        raise CheckpointError(
            f"{given.path}: quantization_config says that the weights are quantised ({given.values.get('quant_method')!s:.40}), "
            f"{_ADVICE}"
        )
    return readers[method](given)


def _bits(given: Settings, bits: int, allowed: tuple[int, ...]) -> Literal[4, 8]:
    if bits not in allowed:
        shown = " or ".join(map(str, allowed))
        raise CheckpointError(f"{given.path}: the weights are quantised to {bits} bits; {shown} can be read")
    return 4 if bits == 4 else 8


def _group_size(given: Settings, size: int) -> int:
    is_kept = size <= LARGEST_GROUP and size % 8 == 0
    if size != -1 and not (size > 0 and (is_kept or size % REGROUPED_SIZE == 0)):
        raise CheckpointError(
            f"{given.path}: group_size is {size}; −1, multiples of 8 up to {LARGEST_GROUP} and larger multiples of "
            f"{REGROUPED_SIZE} can be read"
        )
    return size


def _read_awq(given: Settings) -> GroupSettings:
    version = (given.text("version") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(f"{given.path}: AWQ's version is {version!r:.40}; gemm can be read")
    bits = given.whole("bits") if "bits" in given.values else given.whole("w_bit")
    size = given.whole("group_size") if "group_size" in given.values else given.whole("q_group_size")
    return GroupSettings(
        method="awq",
        bits=_bits(given, bits, (4,)),
        group_size=_group_size(given, size),
        symmetric=False,  # without zero_point, too, the files have zeros
        unconverted=_modules(given, "modules_to_not_convert"),
    )


def _read_gptq(given: Settings) -> GroupSettings:
    layout = (given.text("checkpoint_format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{given.path}: checkpoint_format is {layout!r:.40}; gptq or gptq_v2 can be read")
    if given.values.get("dynamic"):
        raise CheckpointError(f"{given.path}: dynamic gives layers settings of their own, which cannot be read")
    return GroupSettings(
        method="gptq",
        bits=_bits(given, given.whole("bits"), (4, 8)),
        group_size=_group_size(given, given.whole("group_size", -1)),
        symmetric=given.flag("sym") is not False,
        zeros_less_one=layout == "gptq",
        unconverted=_modules(given, "modules_to_not_convert"),
        head_converted=given.flag("lm_head") or False,
    )


def _read_compressed_tensors(given: Settings) -> GroupSettings:
    layout = given.text("format") or "pack-quantized"
    groups = given.values.get("config_groups")
    if layout != "pack-quantized" or not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(
            f"{given.path}: compressed-tensors' format is {layout!r:.40} with {len(groups) if isinstance(groups, dict) else 0} "
            "config_groups; pack-quantized with one can be read (whole numbers of 4 or 8 bits)"
        )
    (scheme,) = groups.values()
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{given.path}: config_groups has no weights")
    refused: dict[str, Any] = {
        "input_activations": scheme.get("input_activations"),
        "output_activations": scheme.get("output_activations"),
        "kv_cache_scheme": given.values.get("kv_cache_scheme"),
    }
    for key, value in refused.items():
        if value:
            raise CheckpointError(f"{given.path}: {key} is {value!r:.60}; only weights that are quantised can be read")
    if transforms := given.values.get("transform_config"):
        raise CheckpointError(
            f"{given.path}: transform_config is {transforms!r:.60}; weights that belong to rotated activations cannot be read"
        )
    sparsity = given.values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{given.path}: sparsity_config is {sparsity!r:.60}; dense weights can be read")
    own = Settings(given.path, weights)
    strategy, kind = own.text("strategy"), own.text("type") or "int"
    if strategy not in ("group", "channel") or kind != "int":
        raise CheckpointError(
            f"{given.path}: strategy is {strategy!r:.40} and type {kind!r:.40}; group or channel, and int, can be read"
        )
    targets = scheme.get("targets") or ["Linear"]
    if targets != ["Linear"]:
        raise CheckpointError(
            f"{given.path}: targets is {targets!r:.60}; Linear can be read, with exceptions in ignore"
        )
    return GroupSettings(
        method="compressed-tensors",
        bits=_bits(given, own.whole("num_bits"), (4, 8)),
        group_size=-1 if strategy == "channel" else _group_size(given, own.whole("group_size")),
        symmetric=own.flag("symmetric") is not False,
        unconverted=_modules(given, "ignore"),
        head_converted=True,
    )


def _modules(given: Settings, key: str) -> tuple[str, ...]:
    value = given.values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{given.path}: {key} is {value!r:.80}; a list of names is needed")
    return tuple(value)


def formats_of(settings: GroupSettings | None, config: ModelConfig, path: Path) -> Mapping[str, GroupFormat]:
    """By parameter, as its settings (in the file `path`) say; the files may hold scales of another type, or leave out more.

    Raises CheckpointError for an expression that cannot be used.
    """
    if settings is None:
        return {}
    kept = settings.group_format()
    try:
        return dict.fromkeys(settings.converted(shard_table(config, 1, 0)), kept)
    except PatternError as error:
        key, entry = (
            "ignore" if settings.method == "compressed-tensors" else "modules_to_not_convert",
            _PATTERN + error.pattern,
        )
        raise CheckpointError(f"{path}: {key} has {entry!r:.80}, which {error}") from error
