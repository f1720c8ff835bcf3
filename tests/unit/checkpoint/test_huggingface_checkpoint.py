"""Reading what `save_pretrained` of transformers writes, and refusing what is broken or not Llama."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.loader import load_shard
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import EMBEDDING, LM_HEAD, shard_table
from tests.support.shards import load_parts

CPU = torch.device("cpu")
SINGLE = "model.safetensors"
LLAMA_3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def save(directory: Path, *, shard_size: str = "1GB", **changes: Any) -> "transformers.LlamaForCausalLM":
    """A random Llama with six query heads over two key/value heads, written by transformers."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


def load(directory: Path, num_ranks: int = 1, rank: int = 0) -> dict[str, torch.Tensor]:
    info = describe(directory)
    return load_parts(info, num_ranks, rank)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_reads_its_part(tmp_path: Path, shard_size: str, tied: bool) -> None:
    model = save(tmp_path, shard_size=shard_size, tie_word_embeddings=tied)
    info = describe(tmp_path)
    assert (len(info.weight_files) > 1) == (shard_size == "30KB")
    whole = model.state_dict()
    for num_ranks in (1, 2, 3, 4, 6):
        for rank in range(num_ranks):
            table = shard_table(info.config, num_ranks, rank)
            part = load(tmp_path, num_ranks, rank)
            assert part.keys() == table.keys() == whole.keys() - ({LM_HEAD} if tied else set())
            for name, tensor in part.items():
                assert tensor.is_contiguous()
                assert torch.equal(tensor, whole[name][table[name].index]), (num_ranks, rank, name)


def test_configuration(tmp_path: Path) -> None:
    model = save(tmp_path, rms_norm_eps=1e-5, head_dim=16, eos_token_id=[2, 7], rope_parameters={
        "rope_type": "default", "rope_theta": 5e5,
    })  # fmt: skip
    transformers.GenerationConfig(eos_token_id=[7, 9], bos_token_id=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "chat_template": "{{ '[INST] <<SYS>>' }}",
    }))  # fmt: skip
    info = describe(tmp_path)
    assert info.config.num_parameters == model.num_parameters()
    assert (info.config.head_dim, info.config.rope_theta, info.config.rms_norm_eps) == (16, 5e5, 1e-5)
    assert (info.config.bos_token_id, info.config.eos_token_ids) == (1, (2, 7, 9))
    assert (info.chat_template, info.add_bos, info.tokenizer_kind) == (
        "{{ '[INST] <<SYS>>' }}",
        True,
        "tokenizer.model",
    )
    assert not info.config.tie_word_embeddings


def test_published_llama_2_configuration(tmp_path: Path) -> None:
    """As in the repository Llama-2-70b-chat-hf, which has older names and leaves some out."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 28672, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "use_cache": True, "vocab_size": 32000,
    }))  # fmt: skip
    (tmp_path / SINGLE).write_bytes(b"")
    config = describe(tmp_path).config
    assert config.num_parameters == 68_976_648_192
    assert (config.head_dim, config.rope_theta) == (128, 10000.0)


@pytest.mark.parametrize("theta", [3580165449.0, 45.2e9, 45200000000])
@pytest.mark.parametrize("where", ["rope_theta", "rope_parameters"])
def test_theta_of_a_long_context(tmp_path: Path, theta: float, where: str) -> None:
    """Llama 3 stretched to a million tokens and more has one above 2^31."""
    save(tmp_path)
    given = {"rope_theta": theta} if where == "rope_theta" else {where: {"rope_type": "default", "rope_theta": theta}}
    edit_config(tmp_path, **({"rope_parameters": None} | given))
    assert describe(tmp_path).config.rope_theta == theta


def test_known_buffers_are_skipped(tmp_path: Path) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / SINGLE)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in load(tmp_path)


def test_progress_counts_the_shard(tmp_path: Path) -> None:
    save(tmp_path)
    info = describe(tmp_path)
    seen: list[tuple[int, int]] = []
    part = load_shard(
        info, shard_table(info.config, 2, 1), dtype=torch.float16, device=CPU, progress=lambda d, t: seen.append((d, t))
    )
    total = sum(tensor.nbytes for tensor in part.values())
    assert seen[-1] == (total, total)
    assert len(seen) == len(shard_table(info.config, 2, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling does not give factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of linear RoPE scaling is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling: factor is '2'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling does not give low_freq_factor"),
        ({"rope_scaling": LLAMA_3_SCALING | {"low_freq_factor": 4.0}}, "low_freq_factor less than high_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "default, linear, llama3 and dynamic scaling are"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "made without longrope scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, "rope_scaling is {'type': 'dynamic'"),
        (
            {"rope_scaling": LLAMA_3_SCALING, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "different things",
        ),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "one rope_theta is needed"),
        (
            {"rope_scaling": LLAMA_3_SCALING, "original_max_position_embeddings": 32},
            "original_max_position_embeddings 32, and within rope_scaling 64; one is needed",
        ),
        (
            {"rope_parameters": LLAMA_3_SCALING, "original_max_position_embeddings": 128},
            "original_max_position_embeddings 128, and within rope_parameters 64; one is needed",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters is {'rope_type': 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, r"rope_parameters has \['full_attention'\]"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters is"),
        ({"rope_scaling": "default"}, "rope_scaling is 'default'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"vocab_size": 101.5}, "vocab_size is 101.5; a whole number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantised .fp8., which cannot be read; AWQ, GPTQ",
        ),
        (
            {"quantization_config": {"group_size": 64, "bits": 4}},
            "no quant_method .{'group_size': 64, 'bits': 4}., as those of MLX and .* cannot be read; AWQ, GPTQ",
        ),
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            "no quant_method .{'group_size': 64, 'bits': 4}., as those of MLX",
        ),
        (
            {"quantization_config": {"load_in_8bit": True}},
            "no quant_method .{'load_in_8bit': True}., as .* bitsandbytes",
        ),
        ({"num_hidden_layers": 1 << 30}, "num_layers is 1073741824; the most is 4096"),
        ({"vocab_size": 1 << 30}, "vocab_size is 1073741824; the most is 2097152"),
        ({"hidden_size": 1 << 30, "head_dim": 8}, "hidden_size is 1073741824; the most is"),
        ({"intermediate_size": 1 << 30}, "intermediate_size is 1073741824; the most is"),
        ({"num_attention_heads": 1 << 30, "head_dim": 8}, "num_query_heads is 1073741824; the most is"),
        ({"head_dim": 1 << 30}, "head_dim is 1073741824; the most is 16384"),
        (
            {"head_dim": 1 << 30, "rope_scaling": {"type": "linear", "factor": 2}},
            "head_dim is 1073741824; the most is 16384",
        ),
        ({"head_dim": 1 << 30, "rope_scaling": LLAMA_3_SCALING}, "head_dim is 1073741824; the most is 16384"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"hidden_size": None}, "does not give hidden_size"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_attention_heads": 0}, "num_query_heads is 0"),
        ({"num_key_value_heads": 4}, "num_kv_heads is 4"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; a finite number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*; a finite number"),
        ({"max_position_embeddings": 1 << 31}, "max_position_embeddings is 2147483648; a number below 2147483648"),
        ({"max_position_embeddings": 1e300}, "max_position_embeddings is 1e[+]300; a number below"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"bos_token_id": 101}, "special token 101"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_unsupported_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        describe(tmp_path)
    assert "config.json" in str(error.value)


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    save(tmp_path)
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert LM_HEAD in load(tmp_path)


def spoil_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / SINGLE)
        change(tensors)
        save_file(tensors, directory / SINGLE)

    return spoil


def overwrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes())) and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (overwrite(SINGLE, lambda data: data[:-1]), SINGLE),
        (overwrite(SINGLE, lambda data: data[:4]), SINGLE),
        (overwrite(SINGLE, lambda data: b""), SINGLE),
        (overwrite(SINGLE, lambda data: b"\xff" * 8 + data[8:]), SINGLE),
        (overwrite(SINGLE, lambda data: data[:8] + b"}" + data[9:]), SINGLE),
        (overwrite(SINGLE, lambda data: data.replace(b'"F32"', b'"F99"', 1)), SINGLE),
        (overwrite(SINGLE, lambda data: data.replace(b"[48]", b"[49]", 1)), SINGLE),
        (overwrite("config.json", lambda data: data[:-3]), "config.json"),
        (overwrite("config.json", lambda data: b"[" * 100_000), "config.json"),
        (overwrite("config.json", lambda data: b"[]"), "must hold a JSON object, not list"),
        (overwrite("generation_config.json", lambda data: b"\xff"), "generation_config.json"),
        (spoil_tensors(lambda t: t.pop(LM_HEAD)), "tie_word_embeddings"),
        (spoil_tensors(lambda t: t.pop("model.norm.weight")), "lacks model.norm.weight"),
        (
            spoil_tensors(lambda t: t.update({"x.norm.weight": t.pop("model.norm.weight")})),
            "lacks model.norm.weight; it holds x.norm.weight, which the model does not have",
        ),
        (spoil_tensors(lambda t: t.update(extra=torch.ones(2))), f"{SINGLE} holds tensors .*: extra"),
        (spoil_tensors(lambda t: t.update({EMBEDDING: torch.ones(100, 48)})), rf"{EMBEDDING} has shape \[100, 48\]"),
        (
            spoil_tensors(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)})),
            f"{SINGLE}: model.norm.weight is of type I32",
        ),
        (lambda directory: (directory / SINGLE).unlink(), "holds none of model.safetensors"),
        (lambda directory: (directory / SINGLE).rename(directory / "pytorch_model.bin"), "pytorch_model.bin is a safe"),
        (lambda directory: (directory / "config.json").unlink(), "holds neither config.json"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def weight_map(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (weight_map(lambda m: m.update({EMBEDDING: "../model.safetensors"})), "not the name of a .safetensors file"),
        (weight_map(lambda m: m.update({EMBEDDING: "gone.safetensors"})), "gone.safetensors, which is missing"),
        (weight_map(lambda m: m.update({EMBEDDING: 3})), "weight_map must give"),
        (weight_map(lambda m: m.update({EMBEDDING: m[LM_HEAD]})), f"says that {EMBEDDING} is in"),
        (weight_map(lambda m: m.update(ghost=m[LM_HEAD])), "says that ghost is in"),
        (lambda directory: next(directory.glob("model-00002-*")).write_bytes(b"\0"), "00002"),
    ],
)
def test_broken_index(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    save(tmp_path, shard_size="30KB")
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_tied_embedding_and_its_copy(tmp_path: Path) -> None:
    """A repeated embedding is harmless; another LM head beside a tied configuration is refused by its rank."""
    save(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / SINGLE)
    tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, tmp_path / SINGLE)
    assert LM_HEAD not in load(tmp_path)
    tensors[LM_HEAD][100, 3] += 1
    save_file(tensors, tmp_path / SINGLE)
    load(tmp_path, 2, 0)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load(tmp_path, 2, 1)


def test_nothing_is_read_before_everything_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    spoil_tensors(lambda t: t.pop("model.norm.weight"))(tmp_path)
    monkeypatch.setattr("model_parallel.checkpoint.huggingface.HuggingFaceCheckpoint.read_into", None)
    with pytest.raises(CheckpointError, match="lacks"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04"])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        describe(tmp_path / "x.gguf")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        describe(tmp_path / "nothing")
