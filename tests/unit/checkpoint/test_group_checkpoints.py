"""AWQ, GPTQ and compressed-tensors checkpoints: every way of cutting them gives the weights that they stand for, exactly."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_parallel.checkpoint import huggingface, patterns
from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.loader import load_shard, open_checkpoint
from model_parallel.errors import CheckpointError
from model_parallel.kernels.interface import GroupMatrix
from model_parallel.memory import weight_bytes
from model_parallel.model.partition import Shard, shard_table
from tests.support.quantized_llama import Scheme, awq, compressed, gptq, quantize_checkpoint
from tests.support.ranks import save_random_llama
from tests.support.shards import load_parts

SHAPE: dict[str, object] = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 1, "vocab_size": 40}

SCHEMES = {
    "awq-32": awq(),
    "awq-8": awq(8),
    "awq-all": awq(-1),
    "awq-old-names": awq(bits=None, group_size=None, w_bit=4, q_group_size=32),
    "gptq-v1-symmetric": gptq(),
    "gptq-v1": gptq(24, symmetric=False),
    "gptq-v2": gptq(symmetric=False, version=2),
    "gptq-v2-symmetric": gptq(version=2),
    "gptq-all": gptq(-1),
    "gptq-8-bits-v1": gptq(bits=8, symmetric=False),
    "gptq-8-bits-v2": gptq(bits=8, symmetric=False, version=2),
    "compressed": compressed(),
    "compressed-bfloat16": compressed(scale_type=torch.bfloat16),
    "compressed-asymmetric": compressed(symmetric=False),
    "compressed-channel": compressed(-1),
    "compressed-8-bits": compressed(bits=8),
    "compressed-ignore": compressed(ignore=("lm_head", "re:.*v_proj", "mlp.down_proj")),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small operations: threads that wait for each other on busy cores take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _write(path: Path, scheme: Scheme, **shape: object) -> dict[str, Tensor]:
    save_random_llama(path, **SHAPE | shape)
    return quantize_checkpoint(path, scheme)


def _without_none(scheme: Scheme) -> Scheme:
    kept = {key: value for key, value in scheme.settings.items() if value is not None}
    return Scheme(bits=4, group_size=32, symmetric=False, pack=scheme.pack, settings=kept)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_cut_gives_the_weights_meant(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    if name == "awq-old-names":
        scheme = _without_none(scheme)
    if name == "compressed-ignore":  # of names that the packer knows
        scheme = Scheme(pack=scheme.pack, settings=scheme.settings, unconverted=("lm_head", "v_proj", "down_proj"))
    meant = _write(tmp_path, scheme)
    info = describe(tmp_path)
    checkpoint = open_checkpoint(info)
    for tp_size in (1, 3):
        for rank in range(tp_size):
            for parameter, shard in shard_table(info.config, tp_size, rank).items():
                expected = meant[parameter][shard.index]
                if checkpoint.group_format(parameter) is not None:
                    assert torch.equal(checkpoint.read_groups(parameter, shard).dequantized(torch.float64), expected), (
                        parameter
                    )
                assert torch.equal(checkpoint.read(parameter, shard, torch.float32), expected.float()), parameter
    kept = {parameter for parameter in meant if checkpoint.group_format(parameter) is not None}
    assert len(kept) == (5 if name == "compressed-ignore" else 7)
    if name != "compressed-bfloat16":  # whose scales' type the settings do not tell
        formats = {parameter: checkpoint.group_format(parameter) for parameter in kept}
        planned = {p: f for p, f in info.config.weight_formats.items() if p != "lm_head.weight"}
        assert {p: f.span_bytes for p, f in planned.items()} == {p: f.span_bytes for p, f in formats.items() if f}


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["awq-32", "gptq-v1-symmetric", "compressed-channel"])
def test_a_rank_holds_the_bytes_that_are_planned(name: str, tp_size: int, tmp_path: Path) -> None:
    _write(tmp_path, SCHEMES[name])
    info = describe(tmp_path)
    for rank in range(tp_size):
        table = shard_table(info.config, tp_size, rank)
        weights = load_shard(info, table, dtype=torch.float32, device=torch.device("cpu"), keep_groups=True)
        planned = weight_bytes(table, dtype="float32", quantization="packed", formats=info.config.weight_formats)
        assert sum(weight.nbytes for weight in weights.values()) == sum(planned.values())
        assert isinstance(weights["model.layers.0.self_attn.qkv_proj.weight"], GroupMatrix), "one matrix of three"


def test_fused_parts_of_different_formats_stay_apart(tmp_path: Path) -> None:
    scheme = SCHEMES["compressed-ignore"]
    meant = _write(tmp_path, Scheme(pack=scheme.pack, settings=scheme.settings, unconverted=("v_proj", "gate_proj")))
    info = describe(tmp_path)
    table = shard_table(info.config, 1, 0)
    weights = load_shard(info, table, dtype=torch.float32, device=torch.device("cpu"), keep_groups=True)
    queries_and_keys, values = weights["model.layers.0.self_attn.qkv_proj.weight"]
    assert queries_and_keys.num_outputs == 192 and isinstance(values, Tensor)
    gate_up = weights["model.layers.0.mlp.gate_up_proj.weight"]
    assert isinstance(gate_up, Tensor), "the kernels need both in one form"
    assert torch.equal(gate_up[200:], meant["model.layers.0.mlp.up_proj.weight"].float())


def test_without_keeping_groups_it_is_the_dequantised_model(tmp_path: Path) -> None:
    meant = _write(tmp_path, awq())
    parts = load_parts(describe(tmp_path), 2, 1)
    table = shard_table(describe(tmp_path).config, 2, 1)
    assert all(torch.equal(parts[name], meant[name][shard.index].float()) for name, shard in table.items())


def test_symmetric_files_that_tell_the_wrong_version(tmp_path: Path) -> None:
    """Both conventions are in use under either name; sym says what the zero is."""
    for version, told in ((1, "gptq_v2"), (2, "gptq")):
        path = tmp_path / told
        meant = _write(path, gptq(version=version, checkpoint_format=told))
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(
            open_checkpoint(describe(path)).read(name, Shard((200, 96)), torch.float32), meant[name].float()
        )


def test_reordered_inputs(tmp_path: Path) -> None:
    meant = _write(tmp_path, gptq(reordered=True), intermediate_size=192)
    info = describe(tmp_path)
    checkpoint = open_checkpoint(info)
    for parameter, shard in shard_table(info.config, 1, 0).items():
        if checkpoint.group_format(parameter) is not None:
            matrix = checkpoint.read_groups(parameter, shard)
            assert matrix.order_P is not None
            assert torch.equal(matrix.dequantized(torch.float64), meant[parameter])
    table = shard_table(info.config, 2, 0)
    checkpoint.read_groups("model.layers.0.mlp.up_proj.weight", table["model.layers.0.mlp.up_proj.weight"])
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(
        CheckpointError,
        match=r"down_proj.weight has .*groups of 32 .*\(desc_act\).*quantization to none or tensor_parallel_size",
    ):
        checkpoint.read_groups(name, table[name])


@pytest.mark.parametrize("chunk", [500, 1 << 22], ids=["a few rows at a time", "at once"])
def test_reordered_inputs_are_cut_when_they_are_dequantised(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "_CHUNK_ELEMENTS", chunk)
    meant = _write(tmp_path, gptq(reordered=True), intermediate_size=192)
    info = describe(tmp_path)
    for tp_size in (1, 2, 3):
        for rank in range(tp_size):
            parts, table = load_parts(info, tp_size, rank), shard_table(info.config, tp_size, rank)
            assert all(torch.equal(parts[name], meant[name][shard.index].float()) for name, shard in table.items())


def test_a_bias_of_zeros_is_none_and_any_other_is_told(tmp_path: Path) -> None:
    _write(tmp_path, gptq())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.zeros(96)}, tmp_path / "model.safetensors")
    info = describe(tmp_path)
    assert name not in open_checkpoint(info).names()
    save_file(tensors | {name: torch.ones(96)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds tensors that the model does not have: .*q_proj\.bias"):
        load_parts(info)


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    meant = _write(tmp_path, gptq())
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_parts(describe(tmp_path))[name], meant[name].float())


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
def test_settings_that_a_dequantised_checkpoint_has_kept_are_refused(place: str, tmp_path: Path) -> None:
    """Plans of memory go by them: it would take four times what was planned."""
    save_random_llama(tmp_path, **SHAPE)
    path = tmp_path / place
    given = {"quantization_config": gptq().settings} if place == "config.json" else gptq().settings
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | given))
    with pytest.raises(CheckpointError, match=r"quantised \(GPTQ 4 bits\), and its files hold none that are; take"):
        open_checkpoint(describe(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quantised \(bitsandbytes\), which cannot be read; AWQ, GPTQ"),
        (awq(version="gemv").settings, "AWQ's version is 'gemv'; gemm can be read"),
        (gptq(bits=3).settings, "quantised to 3 bits; 4 or 8 can be read"),
        (gptq(20).settings, "group_size is 20; −1, multiples of 8"),
        (gptq(checkpoint_format="marlin").settings, "checkpoint_format is 'marlin'; gptq or gptq_v2"),
        (gptq(dynamic={"a": {}}).settings, "dynamic gives layers settings of their own"),
        (compressed(format="nvfp4-pack-quantized").settings, "format is 'nvfp4-pack-quantized'"),
        (compressed(kv_cache_scheme={"num_bits": 8}).settings, "kv_cache_scheme is .*only weights"),
        (
            compressed(transform_config={"config_groups": {"R3": {"type": "hadamard"}}}).settings,
            "transform_config is .*rotated activations",
        ),
        (compressed(ignore=("re:(",)).settings, r"ignore has 're:\(', which is no pattern"),
        (compressed(ignore=("lm_head", "re:(.*.*)*(.*.*)*(.*.*)*Z")).settings, r"ignore has .*, which takes more than 1 s"),
        ("awq", "quantization_config is 'awq'; an object is needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    settings: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "MAX_CPU_S", 1)
    save_random_llama(tmp_path, **SHAPE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.scales"), "mlp.up_proj lacks scales, which gptq needs"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.ones(5, 200)}),
            r"up_proj.scales has shape \[5, 200\]; group_size 32 and 4 bits need \[3, 200\]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(200, 96)}),
            "up_proj.weight both quantised and not",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.g_idx": torch.zeros(96, dtype=torch.int32)}),
            "g_idx does not give each group 32 inputs",
        ),
    ],
)
def test_broken_files_are_named(change: Any, message: str, tmp_path: Path) -> None:
    _write(tmp_path, gptq())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_parts(describe(tmp_path))


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_as_the_library_of_compressed_tensors_unpacks_them(bits: int, tmp_path: Path) -> None:
    # Importing it takes seconds, so only the test that compares with it does.
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # noqa: PLC0415

    _write(tmp_path, compressed(bits=bits, symmetric=False))
    tensors = load_file(tmp_path / "model.safetensors")
    stem = "model.layers.0.mlp.down_proj"
    numbers = unpack_from_int32(tensors[f"{stem}.weight_packed"], bits, torch.Size((96, 200)))
    scales = tensors[f"{stem}.weight_scale"].double()
    zeros = unpack_from_int32(tensors[f"{stem}.weight_zero_point"], bits, torch.Size(scales.shape), packed_dim=0)
    group = torch.arange(200) // 32
    expected = (numbers.double() - zeros.double()[:, group]) * scales[:, group]
    matrix = open_checkpoint(describe(tmp_path)).read_groups(f"{stem}.weight", Shard((96, 200)))
    assert torch.equal(matrix.dequantized(torch.float64), expected)
