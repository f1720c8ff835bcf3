"""Refusing what is broken, or not Llama 2, in Meta's format and in torch files; what is right is in tests/numerics."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from torch import Tensor

from bench.support.small_tokenizer import sentencepiece_model
from bench.support.synthetic_llama import SyntheticLlama, twin
from model_parallel.checkpoint.detect import describe, directory_name
from model_parallel.checkpoint.sentencepiece_file import read_pieces
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import EMBEDDING
from tests.support.shards import load_parts

WQ = "layers.0.attention.wq.weight"


def tiny() -> SyntheticLlama:
    return replace(twin("13b"), dim=64, n_heads=8, n_kv_heads=8, n_layers=1, ffn=176)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny().write(tmp_path / "model", "meta")


def params(**changes: object) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def tensors(index: int, change: Callable[[dict[Any, Any]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / f"consolidated.{index:02}.pth"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return spoil


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (params(use_scaled_rope=1), r"params\.json: use_scaled_rope is 1; true or false"),
        (params(use_scaled_rope=True, rope_scaling_factor=0.0), "llama3 RoPE scaling has factor 0"),
        (params(moe={"num_experts": 8}), "moe is not supported"),
        (params(n_heads=None), r"params\.json does not give n_heads"),
        (params(dim="64"), "dim is '64'"),
        (params(multiple_of=0), "multiple_of is 0"),
        (params(n_kv_heads=3), "num_kv_heads is 3"),
        (params(n_heads=0), "num_query_heads is 0"),
        (params(vocab_size=2), "special token 2"),
        (params(vocab_size=400), r"consolidated\.00\.pth: model\.embed_tokens\.weight has shape"),
        (params(multiple_of=64), r"consolidated\.00\.pth: .*gate_proj\.weight has shape \[176, 64\]"),
        (params(n_layers=2), r"lacks model\.layers\.1\.input_layernorm\.weight"),
        (params(n_kv_heads=4), r"k_proj\.weight has shape \[64, 64\]; the model needs \[32, 64\]"),
        (lambda d: (d / "tokenizer.model").unlink(), "vocab_size is -1, and there is no tokenizer.model"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"\xff\xff") and None, r"tokenizer\.model is not a sentencepiece"),
        (lambda d: (d / "consolidated.00.pth").unlink(), r"lacks consolidated\.00\.pth"),
        (lambda d: (d / "consolidated.01.pth").unlink(), r"consolidated\.00\.pth: .* has shape"),
        (
            lambda d: (d / "consolidated.01.pth").unlink(),
            r"has shape \[.*\], one of 2 parts; .* to consolidated\.01\.pth, and 1 are there",
        ),
        (
            lambda d: (d / "consolidated.02.pth").write_bytes((d / "consolidated.01.pth").read_bytes()) and None,
            r"one of 2 parts; .* to consolidated\.01\.pth, and 3 are there",
        ),
        (lambda d: (d / "consolidated.01.pth").rename(d / "consolidated.02.pth") and None, r"lacks consolidated\.01\.pth"),
        (tensors(1, lambda t: t.pop(WQ)), rf"consolidated\.01\.pth lacks {WQ}"),
        (tensors(0, lambda t: t.pop(WQ)), rf"consolidated\.00\.pth lacks {WQ}"),
        (tensors(1, lambda t: t.update({WQ: t[WQ][:-8]})), r"consolidated\.01\.pth: .*q_proj\.weight is bfloat16 \[24, 64\]"),
        (tensors(1, lambda t: t.update({WQ: t[WQ].float()})), r"consolidated\.01\.pth: .*q_proj\.weight is float32"),
        (tensors(1, lambda t: t["norm.weight"].add_(1)), r"consolidated\.01\.pth: model\.norm\.weight differs"),
        (tensors(1, lambda t: t.update({WQ: t[WQ].t()})), rf"consolidated\.01\.pth: {WQ} is not stored as one plain array"),
        (tensors(0, lambda t: t.update({WQ: "x"})), rf"consolidated\.00\.pth holds str '{WQ}'"),
        (tensors(0, lambda t: t.update({3: t[WQ]})), r"consolidated\.00\.pth holds Tensor 3"),
        (
            lambda d: torch.save({}, d / "consolidated.00.pth", _use_new_zipfile_serialization=False),
            r"consolidated\.00\.pth is of the form that torch wrote before 1\.6",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_file_and_tensor(
    directory: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(directory)
    with pytest.raises(CheckpointError, match=message):
        load_parts(describe(directory))


def test_left_over_tensors(directory: Path) -> None:
    for index in (0, 1):
        tensors(index, lambda t: t.update({"layers.0.attention.bias": torch.ones(2)}))(directory)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth holds tensors .*: layers\.0\.attention\.bias"):
        load_parts(describe(directory))


def test_a_pickle_with_code_runs_nothing(directory: Path, tmp_path: Path) -> None:
    tensors(0, lambda t: t.update({"x": Touch(tmp_path / "canary")}))(directory)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth cannot be read as weights alone"):
        load_parts(describe(directory))
    assert not (tmp_path / "canary").exists()


def test_nothing_is_read_before_everything_fits(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params(n_layers=2)(directory)
    monkeypatch.setattr("model_parallel.checkpoint.loader.empty_shard", None)
    with pytest.raises(CheckpointError, match="lacks"):
        load_parts(describe(directory))


def test_tokenizer_beside_the_directory(directory: Path) -> None:
    """Where Meta's download puts it."""
    (directory / "tokenizer.model").rename(directory.parent / "tokenizer.model")
    info = describe(directory)
    assert (info.tokenizer_path, info.config.vocab_size) == (directory.parent / "tokenizer.model", 500)


def test_embedding_cut_by_rows(directory: Path) -> None:
    """As Meta's code after Llama 2 cuts it."""
    before = load_parts(describe(directory))
    for index in (0, 1):
        rows = tiny().tensor("tok_embeddings.weight").chunk(2)[index].clone()
        tensors(index, lambda t, rows=rows: t.update({"tok_embeddings.weight": rows}))(directory)
    after = load_parts(describe(directory))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_configuration_files_of_the_three_sizes(tmp_path: Path) -> None:
    """params.json as published, a vocabulary of 32,000 pieces: the parameters that the model cards give."""
    pieces = b"".join(b"\x0a\x04\x0a\x02" + i.to_bytes(2, "little") for i in range(128))
    sizes = {
        6_738_415_616: {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1},
        13_015_864_320: {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-06, "vocab_size": -1},
        68_976_648_192: {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                         "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
    }  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(pieces[:6] * 32000)
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    for num_parameters, values in sizes.items():
        (tmp_path / "params.json").write_text(json.dumps(values))
        config = describe(tmp_path).config
        assert config.num_parameters == num_parameters
        assert config.rms_norm_eps == values["norm_eps"]


def test_pieces_are_those_that_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert read_pieces(path) == [library.id_to_piece(i) for i in range(library.get_piece_size())]


# ---- torch files in Hugging Face's format ----


def write_bin(directory: Path, *, num_files: int = 1) -> dict[str, Tensor]:
    """A random Llama as old versions of transformers wrote it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(directory)
    state: dict[str, Tensor] = model.state_dict()
    names = [
        f"pytorch_model-{i + 1:05}-of-{num_files:05}.bin" if num_files > 1 else "pytorch_model.bin"
        for i in range(num_files)
    ]
    weight_map = {name: names[i % num_files] for i, name in enumerate(state)}
    for file in names:
        torch.save({name: tensor for name, tensor in state.items() if weight_map[name] == file}, directory / file)
    if num_files > 1:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


@pytest.mark.parametrize("num_files", [1, 3])
def test_torch_files(tmp_path: Path, num_files: int) -> None:
    state = write_bin(tmp_path, num_files=num_files)
    info = describe(tmp_path)
    assert len(info.weight_files) == num_files
    parts = [load_parts(info, 2, rank) for rank in (0, 1)]
    for name, tensor in state.items():
        axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        whole = torch.cat([part[name] for part in parts], axis) if tensor.ndim > 1 else parts[0][name]
        assert torch.equal(whole, tensor), name


def test_safetensors_are_taken_before_torch_files(tmp_path: Path) -> None:
    write_bin(tmp_path)
    config = transformers.LlamaConfig.from_pretrained(tmp_path)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert [path.name for path in describe(tmp_path).weight_files] == ["model.safetensors"]


def test_index_of_torch_files_names_torch_files_only(tmp_path: Path) -> None:
    write_bin(tmp_path, num_files=2)
    index = tmp_path / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][EMBEDDING] = "model.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"not the name of a \.bin file"):
        describe(tmp_path)


@pytest.mark.parametrize(
    "place", ["Llama-2-7b-chat", "Llama-2-7b-chat/original", "models--x--Llama-2-7b-chat/snapshots/0a/original"]
)
def test_the_chat_format_by_the_name_of_the_directory(tmp_path: Path, place: str) -> None:
    """Meta's repositories have the files of its own format in a directory `original`."""
    assert directory_name(tmp_path / place).endswith("llama-2-7b-chat")
    assert describe(tiny().write(tmp_path / place, "meta")).chat_format == "llama-2"
