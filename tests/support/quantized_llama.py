"""Checkpoints of Llama with quantised linear layers, written from the published layouts, and the weights that they stand for.

Layouts: AutoAWQ `WQLinear_GEMM.from_linear`; AutoGPTQ and GPTQModel `QuantLinear.pack`; compressed-tensors `pack_to_int32`.

Shape suffixes: O outputs · I inputs · G groups
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [N, ⌈M / per word⌉] of [N, M]: number `order[i]` of every word at its bits i · `bits`."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % per_word)).unflatten(1, (-1, per_word))
    places = order or tuple(range(per_word))
    words = sum(padded[:, :, place].long() << i * bits for i, place in enumerate(places))
    assert isinstance(words, Tensor)
    return torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32).copy())


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """One matrix in groups of its inputs: scale · (number − zero)."""

    numbers_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor
    group_of_I: Tensor

    @property
    def weight_OI(self) -> Tensor:
        """float64."""
        scales, zeros = self.scales_OG.double()[:, self.group_of_I], self.zeros_OG.double()[:, self.group_of_I]
        return scales * (self.numbers_OI.double() - zeros)


def quantize(weight_OI: Tensor, *, bits: int, group_size: int, symmetric: bool, reordered: bool = False) -> Quantized:
    """By each group's largest and smallest weight. `reordered`: inputs belong to groups by a random order (desc_act)."""
    num_inputs = weight_OI.shape[1]
    size = num_inputs if group_size == -1 else group_size
    group_of_I = torch.arange(num_inputs) // size
    if reordered:
        group_of_I = group_of_I[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(num_inputs))]
    num_groups = int(group_of_I.max()) + 1
    largest, middle = (1 << bits) - 1, 1 << bits - 1
    scales, zeros = [], []
    for group in range(num_groups):
        part = weight_OI[:, group_of_I == group].double()
        low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
        scale = torch.maximum(-low, high) / (middle - 0.5) if symmetric else (high - low) / largest
        scale = scale.half()
        scales.append(scale)
        # Version 1 of GPTQ stores one less, which must not be negative.
        zeros.append(torch.full_like(low, middle) if symmetric else (-low / scale.double()).round().clamp(1, largest))
    scales_OG, zeros_OG = torch.stack(scales, 1), torch.stack(zeros, 1).to(torch.int64)
    numbers = weight_OI.double() / scales_OG.double()[:, group_of_I] + zeros_OG[:, group_of_I]
    return Quantized(
        numbers_OI=numbers.round().clamp(0, largest).to(torch.int64),
        scales_OG=scales_OG,
        zeros_OG=zeros_OG,
        group_of_I=group_of_I,
    )


def awq_tensors(q: Quantized) -> dict[str, Tensor]:
    return {
        "qweight": _words(q.numbers_OI.t(), 4, _AWQ_ORDER),
        "qzeros": _words(q.zeros_OG.t(), 4, _AWQ_ORDER),
        "scales": q.scales_OG.t().contiguous(),
    }


def gptq_tensors(q: Quantized, *, bits: int, less_one: bool) -> dict[str, Tensor]:
    return {
        "qweight": _words(q.numbers_OI, bits).t().contiguous(),
        "qzeros": _words(q.zeros_OG.t() - int(less_one), bits),
        "scales": q.scales_OG.t().contiguous(),
        "g_idx": q.group_of_I.int(),
    }


def compressed_tensors(q: Quantized, *, bits: int, symmetric: bool, scale_type: torch.dtype) -> dict[str, Tensor]:
    shape = q.numbers_OI.shape
    tensors = {
        "weight_packed": _words(q.numbers_OI, bits),
        "weight_scale": q.scales_OG.to(scale_type),
        "weight_shape": torch.tensor(shape),
    }
    return tensors if symmetric else tensors | {"weight_zero_point": _words(q.zeros_OG.t(), bits).t().contiguous()}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a checkpoint is quantised, and what it says of that."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    reordered: bool = False
    pack: Callable[[Quantized], dict[str, Tensor]]
    settings: dict[str, Any]
    unconverted: tuple[str, ...] = ()
    """Parts of names of layers that stay as they are."""


def awq(group_size: int = 32, **settings: Any) -> Scheme:
    own = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return Scheme(group_size=group_size, symmetric=False, pack=awq_tensors, settings=own | settings)


def gptq(
    group_size: int = 32,
    *,
    bits: int = 4,
    symmetric: bool = True,
    reordered: bool = False,
    version: int = 1,
    **settings: Any,
) -> Scheme:
    own = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": reordered,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Scheme(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        reordered=reordered,
        pack=lambda q: gptq_tensors(q, bits=bits, less_one=version == 1),
        settings=own | settings,
    )


def compressed(
    group_size: int = 32,
    *,
    bits: int = 4,
    symmetric: bool = True,
    scale_type: torch.dtype = torch.float16,
    ignore: tuple[str, ...] = ("lm_head",),
    **settings: Any,
) -> Scheme:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    if group_size != -1:
        weights |= {"strategy": "group", "group_size": group_size}
    own = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }
    return Scheme(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        pack=lambda q: compressed_tensors(q, bits=bits, symmetric=symmetric, scale_type=scale_type),
        settings=own | settings,
        unconverted=ignore,
    )


def quantize_checkpoint(path: Path, scheme: Scheme) -> dict[str, Tensor]:
    """Rewrite what save_random_llama has written. Returns what the weights then stand for, float64, by name."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if "_proj." not in name or any(part in name for part in scheme.unconverted):
            stored[name], meant[name] = weight, weight.double()
            continue
        quantized = quantize(
            weight,
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            reordered=scheme.reordered,
        )
        tensors = scheme.pack(quantized)
        scales = tensors.get("weight_scale", tensors.get("scales"))
        assert scales is not None
        as_stored = scales.t() if "scales" in tensors else scales
        kept = Quantized(
            numbers_OI=quantized.numbers_OI,
            scales_OG=as_stored,
            zeros_OG=quantized.zeros_OG,
            group_of_I=quantized.group_of_I,
        )
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in tensors.items()}
        meant[name] = kept.weight_OI
    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.settings}))
    return meant


def in_fp8(strategy: str, inputs: str, *, ignore: tuple[str, ...] = ("lm_head",), **settings: Any) -> dict[str, Any]:
    """quantization_config of compressed-tensors' float-quantized. `strategy`: channel or tensor; `inputs`: token or tensor."""
    own = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": own | {"strategy": strategy, "dynamic": False},
        "input_activations": own | {"strategy": inputs, "dynamic": inputs == "token"},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": scheme},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    } | settings


def quantize_checkpoint_to_fp8(path: Path, settings: dict[str, Any], scale_type: torch.dtype) -> dict[str, Tensor]:
    """Rewrite what save_random_llama has written, as llm-compressor would. Returns what the weights then stand for, float64."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    scheme = settings["config_groups"]["group_0"]
    for name, weight in load_file(path / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.ndim == 1 or "embed" in name or any(f".{module}".endswith(f".{own}") for own in settings["ignore"]):
            stored[name], meant[name] = weight, weight.double()
            continue
        largest = (
            weight.abs().amax(1, keepdim=True) if scheme["weights"]["strategy"] == "channel" else weight.abs().amax()
        )
        scale = (largest / 448).to(scale_type).reshape(-1, *([1] * largest.ndim)[1:])
        values = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored |= {name: values, f"{module}.weight_scale": scale}
        if scheme["input_activations"]["strategy"] == "tensor":
            stored[f"{module}.input_scale"] = torch.tensor([0.25], dtype=scale_type)
        meant[name] = values.double() * scale.double()
    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return meant
