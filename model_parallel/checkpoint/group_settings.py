"""What a Hugging Face checkpoint says of its quantised weights: AWQ, GPTQ, compressed-tensors. No torch.

Layouts: AutoAWQ's WQLinear_GEMM; GPTQModel's TorchQuantLinear, which also reads the older version 1; compressed-tensors'
pack-quantized and float-quantized.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_parallel.checkpoint.patterns import PatternError, matching
from model_parallel.checkpoint.settings import Settings, read_optional_json
from model_parallel.config import ModelConfig
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import GATE, LM_HEAD, UP, shard_table
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
class ConvertedLayers:
    """Which linear layers are quantised."""

    method: Literal["awq", "gptq", "compressed-tensors"]
    unconverted: tuple[str, ...] = ()
    """Modules that are not quantised: names or parts of names, or expressions after "re:"."""
    head_converted: bool = False

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Settings(ConvertedLayers):
    """Linear layers in e4m3 (compressed-tensors' float-quantized), which only products in e4m3 compute."""

    per_channel: bool
    """A scale for each output; else one for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings(ConvertedLayers):
    """How linear layers are quantised."""

    bits: Literal[4, 8]
    group_size: int
    """Inputs; −1: all of a channel."""
    symmetric: bool
    """The zero is the middle of the range."""
    reordered: bool = False
    """Inputs may belong to groups in any order (desc_act, actorder), which then stands in a tensor of its own."""
    zeros_less_one: bool = False
    """Zeros are stored as one less (GPTQ version 1)."""

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


def read_group_settings(directory: Path, settings: Settings) -> GroupSettings | Fp8Settings | None:
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


def _read(given: Settings) -> GroupSettings | Fp8Settings:
    method = given.text("quant_method").lower()
    readers: dict[str, Callable[[Settings], GroupSettings | Fp8Settings]]
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


def _read_compressed_tensors(given: Settings) -> GroupSettings | Fp8Settings:
    layout = given.text("format") or "pack-quantized"
    groups = given.values.get("config_groups")
    if layout not in ("pack-quantized", "float-quantized") or not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(
            f"{given.path}: compressed-tensors' format is {layout!r:.40} with {len(groups) if isinstance(groups, dict) else 0} "
            "config_groups; pack-quantized (whole numbers of 4 or 8 bits) and float-quantized (e4m3) with one can be read"
        )
    (scheme,) = groups.values()
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{given.path}: config_groups has no weights")
    refused: dict[str, Any] = {
        "input_activations": None if layout == "float-quantized" else scheme.get("input_activations"),
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
    targets = scheme.get("targets") or ["Linear"]
    if targets != ["Linear"]:
        raise CheckpointError(
            f"{given.path}: targets is {targets!r:.60}; Linear can be read, with exceptions in ignore"
        )
    own = Settings(given.path, weights)
    if layout == "float-quantized":
        return _read_fp8(given, own, scheme.get("input_activations"))
    strategy, kind = own.text("strategy"), own.text("type") or "int"
    if strategy not in ("group", "channel") or kind != "int":
        raise CheckpointError(
            f"{given.path}: strategy is {strategy!r:.40} and type {kind!r:.40}; group or channel, and int, can be read"
        )
    return GroupSettings(
        method="compressed-tensors",
        bits=_bits(given, own.whole("num_bits"), (4, 8)),
        group_size=-1 if strategy == "channel" else _group_size(given, own.whole("group_size")),
        symmetric=own.flag("symmetric") is not False,
        unconverted=_modules(given, "ignore"),
        head_converted=True,
    )


def _read_fp8(given: Settings, weights: Settings, activations: object) -> Fp8Settings:
    """`weights` and `activations`: the scheme's."""
    strategy = weights.text("strategy")
    if strategy not in ("tensor", "channel"):
        raise CheckpointError(
            f"{given.path}: strategy of weights in e4m3 is {strategy!r:.40}; tensor or channel can be read"
        )
    if not isinstance(activations, dict):
        raise CheckpointError(
            f"{given.path}: input_activations is {activations!r:.60}; weights in e4m3 are multiplied with activations in e4m3"
        )
    inputs = Settings(given.path, activations)
    if inputs.text("strategy") not in ("tensor", "token"):
        raise CheckpointError(
            f"{given.path}: strategy of input_activations is {inputs.text('strategy')!r:.40}; tensor or token can be read"
        )
    for name, own in (("weights", weights), ("input_activations", inputs)):
        if own.text("type") != "float" or own.whole("num_bits") != 8 or own.flag("symmetric") is False:
            raise CheckpointError(
                f"{given.path}: {name} are of type {own.text('type')!r:.40}, num_bits {own.whole('num_bits')}, symmetric "
                f"{own.flag('symmetric')}; float, 8 and true can be read"
            )
    return Fp8Settings(
        method="compressed-tensors",
        per_channel=strategy == "channel",
        unconverted=_modules(given, "ignore"),
        head_converted=True,
    )


def _modules(given: Settings, key: str) -> tuple[str, ...]:
    value = given.values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{given.path}: {key} is {value!r:.80}; a list of names is needed")
    return tuple(value)


def formats_of(
    settings: GroupSettings | Fp8Settings | None, config: ModelConfig, path: Path
) -> Mapping[str, GroupFormat]:
    """By parameter, as its settings (in the file `path`) say; the files may hold scales of another type, or leave out more.

    Raises CheckpointError as converted_names.
    """
    if not isinstance(settings, GroupSettings):
        return {}
    return dict.fromkeys(converted_names(settings, config, path), settings.group_format())


def fp8_weights_of(settings: GroupSettings | Fp8Settings | None, config: ModelConfig, path: Path) -> frozenset[str]:
    """Matrices that can be kept in e4m3; see ModelConfig.fp8_weights. Raises CheckpointError as converted_names."""
    if not isinstance(settings, Fp8Settings):
        return frozenset()
    names = set(converted_names(settings, config, path)) - {LM_HEAD}
    pairs = [(f"model.layers.{i}.{GATE}", f"model.layers.{i}.{UP}") for i in range(config.num_layers)]
    return frozenset(names - {name for pair in pairs if not names.issuperset(pair) for name in pair})


def converted_names(settings: ConvertedLayers, config: ModelConfig, path: Path) -> list[str]:
    """Parameters that settings in the file `path` say are quantised.

    Raises CheckpointError for an expression that cannot be used.
    """
    try:
        return settings.converted(shard_table(config, 1, 0))
    except PatternError as error:
        key, entry = (
            "ignore" if settings.method == "compressed-tensors" else "modules_to_not_convert",
            _PATTERN + error.pattern,
        )
        raise CheckpointError(f"{path}: {key} has {entry!r:.80}, which {error}") from error
