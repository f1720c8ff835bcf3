"""Checkpoints in e4m3 of compressed-tensors: every matrix as it is stored, on any number of ranks, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.loader import load_shard
from model_parallel.collectives.interface import SoloCollectives
from model_parallel.errors import CheckpointError, ConfigError
from model_parallel.kernels.interface import Fp8Matrix
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.memory import weight_bytes
from model_parallel.model.partition import LM_HEAD, fused_name, shard_table
from model_parallel.runtime.rank import Rank
from tests.support.quantized_llama import in_fp8, quantize_checkpoint_to_fp8
from tests.support.ranks import group_config, prompt_logits, save_random_llama

SHAPE = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 144}
WHOLE = "model.layers.0.self_attn.q_proj"


def _dense(weight: Tensor | Fp8Matrix | tuple[Any, ...]) -> Tensor:
    if isinstance(weight, tuple):
        return torch.cat([_dense(part) for part in weight])
    return weight.dequantized(torch.float64) if isinstance(weight, Fp8Matrix) else weight.double()


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("strategy", "inputs", "ignore"),
    [
        ("channel", "token", ("lm_head",)),
        ("tensor", "tensor", ("lm_head",)),
        ("tensor", "token", ("lm_head", "model.layers.1.self_attn.k_proj", "model.layers.2.mlp.up_proj")),
        ("channel", "tensor", ()),
    ],
)
def test_every_rank_holds_what_is_stored(
    strategy: str, inputs: str, ignore: tuple[str, ...], scale_type: torch.dtype, tmp_path: Path
) -> None:
    save_random_llama(tmp_path, **SHAPE)
    meant = quantize_checkpoint_to_fp8(tmp_path, in_fp8(strategy, inputs, ignore=ignore), scale_type)
    info = describe(tmp_path)
    assert len(info.config.fp8_weights) == {3: 18, 1: 21, 0: 21}[len(ignore)], "neither head nor half of gate and up"
    for tp_size in (1, 2, 3):
        for rank in range(tp_size):
            table = shard_table(info.config, tp_size, rank)
            weights = load_shard(info, table, dtype=torch.float32, device=torch.device("cpu"), keep_fp8=True)
            for fused in weights:
                names = [name for name in table if fused_name(name) == fused]
                expected = torch.cat([meant[name][table[name].index] for name in names])
                # What is dequantised is rounded to float32.
                torch.testing.assert_close(_dense(weights[fused]), expected, rtol=2.0**-23, atol=0)
                assert isinstance(weights[fused], Fp8Matrix) == all(name in info.config.fp8_weights for name in names)
            sizes = weight_bytes(table, dtype="float32", quantization="fp8", fp8_weights=info.config.fp8_weights)
            assert sum(sizes.values()) == sum(map(_num_bytes, weights.values()))


def _num_bytes(weight: Tensor | Fp8Matrix | tuple[Any, ...]) -> int:
    if isinstance(weight, tuple):
        return sum(map(_num_bytes, weight))
    return weight.nbytes if isinstance(weight, Tensor) else weight.values_OI.nbytes + weight.scales_O.nbytes


def test_a_stored_model_computes_as_one_that_is_converted_while_it_loads(tmp_path: Path) -> None:
    save_random_llama(tmp_path, **SHAPE)
    config = group_config(tmp_path, 1, quantization="fp8")
    prompt = [5 + i for i in range(20)]
    expected = prompt_logits(config, prompt, 20, lambda: ReferenceKernels(num_threads=1, device="cpu"))
    quantize_checkpoint_to_fp8(tmp_path, in_fp8("channel", "token"), torch.float32)
    assert torch.equal(
        prompt_logits(config, prompt, 20, lambda: ReferenceKernels(num_threads=1, device="cpu")), expected
    )


@pytest.mark.parametrize("quantization", ["", "int8"])
def test_nothing_else_computes_it(quantization: str, tmp_path: Path) -> None:
    save_random_llama(tmp_path, **SHAPE)
    quantize_checkpoint_to_fp8(tmp_path, in_fp8("channel", "token"), torch.float32)
    with pytest.raises(
        ConfigError, match=rf"quantization is {quantization or 'none'}, and the .* in fp8: set it to fp8, .*unquantised"
    ):
        Rank(group_config(tmp_path, 1, quantization=quantization), 0, SoloCollectives())


def _changed(**changes: Any) -> dict[str, Any]:
    """The scheme with other values."""
    settings = in_fp8("channel", "token")
    for part, values in changes.items():
        settings["config_groups"]["group_0"][part] = values and settings["config_groups"]["group_0"][part] | values
    return settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            _changed(weights={"strategy": "block"}),
            "strategy of weights in e4m3 is 'block'; tensor or channel can be read",
        ),
        (_changed(weights={"type": "int"}), "weights are of type 'int', num_bits 8"),
        (_changed(weights={"num_bits": 4}), "weights are of type 'float', num_bits 4"),
        (_changed(input_activations=None), "input_activations is None; weights in e4m3 are multiplied with"),
        (
            _changed(input_activations={"strategy": "group"}),
            "strategy of input_activations is 'group'; tensor or token",
        ),
        (_changed(input_activations={"type": "int"}), "input_activations are of type 'int'"),
        (in_fp8("channel", "token", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is"),
        (in_fp8("channel", "token", format="mixed-precision"), "format is 'mixed-precision' with 1 config_groups"),
    ],
)
def test_settings_that_cannot_be_read(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_random_llama(tmp_path, **SHAPE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{WHOLE}.weight_scale"), f"{WHOLE}.weight is in e4m3, and there is no {WHOLE}.weight_scale"),
        (
            lambda t: t.update({f"{WHOLE}.weight_scale": torch.ones(1)}),
            rf"{WHOLE}.weight_scale has shape \[1\]; \[144, 1\] is needed",
        ),
        (
            lambda t: t.update({f"{WHOLE}.weight": torch.ones(144, 144)}),
            f"{WHOLE}.weight is of type F32; F8_E4M3 is needed",
        ),
        (
            lambda t: t.update({f"{WHOLE}.weight_scale": torch.ones(144, 1, dtype=torch.int32)}),
            f"{WHOLE}.weight_scale is of type I32; F32, BF16 or F16 is needed",
        ),
        (lambda t: t.pop(f"{WHOLE}.weight"), f"lacks {WHOLE}.weight; it holds {WHOLE}.weight_scale"),
        (lambda t: t.update({LM_HEAD: t[LM_HEAD].to(torch.float8_e4m3fn)}), "lm_head.weight is of type F8_E4M3, which"),
    ],
)
def test_files_that_are_not_what_the_configuration_says(change: Any, message: str, tmp_path: Path) -> None:
    save_random_llama(tmp_path, **SHAPE)
    quantize_checkpoint_to_fp8(tmp_path, in_fp8("channel", "token"), torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    info = describe(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_shard(
            info,
            shard_table(info.config, 1, 0),
            dtype=torch.float32,
            device=torch.device("cpu"),
            keep_fp8=True,
        )
