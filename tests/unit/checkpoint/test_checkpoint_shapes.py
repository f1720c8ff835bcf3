"""Shapes of checkpoints as they lie on disks: what says the same is the same, and what lies beside it does no harm.

Each test is a row of docs/models.md.
"""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.loader import check_complete, check_tied_head, open_checkpoint
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import EMBEDDING, LM_HEAD, shard_table
from tests.support.shards import load_parts

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SETTINGS: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
BARE = {"model_type": "llama", **SETTINGS}
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, and the same weights in several with an index."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS))
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="30KB")
    (root / "sharded" / "generation_config.json").unlink()
    (root / "single" / "generation_config.json").unlink()
    return root


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


def load(directory: Path) -> dict[str, torch.Tensor]:
    return load_parts(describe(directory), 1, 0)


def warnings_of(directory: Path) -> list[str]:
    info = describe(directory)
    checkpoint = open_checkpoint(info)
    check_complete(info, checkpoint, shard_table(info.config, 1, 0))
    return [*info.warnings, *checkpoint.warnings]


def write_config(directory: Path, **changes: object) -> None:
    """`changes` to None take a field away; to ... set it to null."""
    values = {k: v for k, v in (BARE | changes).items() if v is not None}
    values = {k: None if v is ... else v for k, v in values.items()}
    (directory / "config.json").write_text(json.dumps(values))


# ---- configurations that say the same ----


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": ["MistralForCausalLM"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": []},
        {"architectures": ...},
        {"model_type": "mistral", "sliding_window": ...},
        {"model_type": "mistral", "sliding_window": 128},
        {"model_type": "LLaMA"},
        {"model_type": None, "architectures": ["LlamaForCausalLM"]},
        {"hidden_act": "silu"},
        {"hidden_act": "swish"},
        {"hidden_act": "SiLU"},
        {"hidden_act": ...},
        {"attention_bias": False, "mlp_bias": ...},
        {"quantization_config": ...},
        {"quantization_config": {}},
        {"sliding_window": 4096},
        {"sliding_window": 16, "use_sliding_window": False},
        {"sliding_window": 0},
        {"head_dim": ...},
        {"head_dim": 8},
        {"hidden_size": 48.0},
        {"rope_theta": 10000},
        {"rope_theta": ..., "rope_scaling": ...},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 1}},
        {"rope_scaling": {"type": "yarn", "factor": 1.0}},
        {"rope_scaling": LLAMA_3_SCALING | {"factor": 1.0}},
        {"rope_scaling": {"type": ..., "rope_type": "default"}},
        {"rope_scaling": {"rope_type": ..., "factor": ...}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}, "rope_theta": 10000.0},
        {"partial_rotary_factor": 1.0},
        {"tie_word_embeddings": ...},
        {"torch_dtype": "float16", "pretraining_tp": 2, "auto_map": {"AutoModel": "x.Y"}, "_name_or_path": ""},
        {"dtype": "bfloat16"},
        {"rms_norm_eps": ...},
    ],
    ids=lambda changes: json.dumps(changes, default=lambda _: None)[:60],
)
def test_what_says_the_same_is_the_same(single: Path, changes: dict[str, Any]) -> None:
    write_config(single)
    plain = describe(single).config

    def nulls(value: Any) -> Any:
        return {k: None if v is ... else v for k, v in value.items()} if isinstance(value, dict) else value

    write_config(single, **{k: nulls(v) for k, v in changes.items()})
    assert describe(single).config == plain


def test_heads_that_are_null_are_as_many_as_the_query_heads(single: Path) -> None:
    for changes in ({"num_key_value_heads": ...}, {"num_key_value_heads": None}, {"num_key_value_heads": 6}):
        write_config(single, **changes)
        assert describe(single).config.num_kv_heads == 6
    write_config(single, num_key_value_heads=None, model_type="mistral", num_attention_heads=8)
    assert describe(single).config.num_kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, (4.0,) * 4),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, (4.0,) * 4),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, (4.0,) * 4),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"type": "linear", "factor": 4},
            },
            (4.0,) * 4,
        ),
    ],
)
def test_linear_scaling_in_every_spelling(single: Path, changes: dict[str, Any], expected: tuple[float, ...]) -> None:
    write_config(single, **changes)
    info = describe(single)
    assert (info.config.rope_divisors, info.rope_scaling) == (expected, "linear, factor 4")


def test_llama_3_scaling_in_every_spelling(single: Path) -> None:
    spellings: list[dict[str, Any]] = [
        {"rope_scaling": LLAMA_3_SCALING, "rope_theta": 5e5},
        {"rope_parameters": LLAMA_3_SCALING | {"rope_theta": 5e5}},
        {"rope_parameters": LLAMA_3_SCALING, "rope_scaling": LLAMA_3_SCALING, "rope_theta": 5e5},
        {"rope_scaling": LLAMA_3_SCALING, "original_max_position_embeddings": 64, "rope_theta": 5e5},
        {"rope_scaling": {k: v for k, v in LLAMA_3_SCALING.items() if k != "original_max_position_embeddings"},
         "original_max_position_embeddings": 64, "rope_theta": 5e5},
    ]  # fmt: skip
    configs = []
    for spelling in spellings:
        write_config(single, **spelling)
        configs.append(describe(single).config)
    assert all(config == configs[0] for config in configs)
    assert configs[0].rope_divisors[0] == 1
    assert configs[0].rope_divisors[-1] == 8


def test_dynamic_scaling_never_begins_within_the_context(single: Path) -> None:
    write_config(single, rope_scaling={"type": "dynamic", "factor": 2.0})
    info = describe(single)
    assert info.config.rope_divisors == ()
    assert "begins after 128 tokens" in info.warnings[0]


def test_a_sliding_window_bounds_the_context(single: Path) -> None:
    """Mistral 7B v0.1: within the window the model is the same as without."""
    write_config(single, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=96)
    info = describe(single)
    assert info.config.max_position == 96
    assert "sliding_window is 96" in info.warnings[0]


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 4096), ({"sliding_window": ...}, 32768), ({"sliding_window": 8192}, 8192), ({"sliding_window": 65536}, 32768),
        ({"max_position_embeddings": 2048}, 2048), ({"model_type": "llama"}, 32768),
        ({"sliding_window": 8192, "use_sliding_window": False}, 8192), ({"use_sliding_window": False}, 4096),
    ],
)  # fmt: skip
def test_the_window_of_a_mistral_file(single: Path, changes: dict[str, Any], context: int) -> None:
    """One that does not name it has the window that transformers' configuration has by default; null is none."""
    write_config(single, **({"model_type": "mistral", "max_position_embeddings": 32768} | changes))
    info = describe(single)
    assert info.config.max_position == context
    theirs = transformers.AutoConfig.from_pretrained(single)
    window = getattr(theirs, "sliding_window", None) or theirs.max_position_embeddings
    assert context == min(window, theirs.max_position_embeddings)
    assert len(info.warnings) == (context < theirs.max_position_embeddings)


def test_mistral_as_transformers_writes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SETTINGS, sliding_window=None, head_dim=16))
    model.save_pretrained(tmp_path)
    weights = load(tmp_path)
    assert describe(tmp_path).config.num_parameters == model.num_parameters()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


# ---- weights ----


def same_weights(directory: Path, saved: Path) -> bool:
    ours, theirs = load(directory), load_file(saved / "single" / SINGLE)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def add_to_shard(number: int, **tensors: torch.Tensor) -> Edit:
    def edit(directory: Path) -> None:
        path = describe(directory).weight_files[number]
        save_file(load_file(path) | tensors, path)

    return edit


def stale_single(directory: Path) -> None:
    save_file({EMBEDDING: torch.ones(3, 3)}, directory / SINGLE)


def edit_index(change: Callable[[dict[str, str]], object]) -> Edit:
    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("edit", "warning"),
    [
        (add_to_shard(1, **{EMBEDDING: torch.ones(2)}), f"does not name model-00002-of-00007.safetensors: {EMBEDDING}"),
        (add_to_shard(0, value_head=torch.ones(2)), "does not name model-00001-of-00007.safetensors: value_head"),
        (stale_single, f"does not name {SINGLE}: not read"),
        (lambda d: (d / SINGLE).write_bytes(b"") and None, f"does not name {SINGLE}: not read"),
        (lambda d: (d / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n"), f"does not name {SINGLE}"),
        (lambda d: stale_single(d) or (d / SINGLE).rename(d / "model-00001-of-00009.safetensors"), "00009"),
        (lambda d: (d / "pytorch_model.bin").write_bytes(b"stale") and None, ""),
        (edit_index(lambda m: m.update({"model.layers.0.self_attn.rotary_emb.inv_freq": m[LM_HEAD]})), ""),
        (edit_index(lambda m: m.update({"model.rotary_emb.cos_cached": m[LM_HEAD]})), ""),
        (add_to_shard(2, **{"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}), ""),
    ],
)
def test_the_index_decides(sharded: Path, saved: Path, edit: Edit, warning: str) -> None:
    edit(sharded)
    assert same_weights(sharded, saved)
    found = warnings_of(sharded)
    assert len(found) == bool(warning)
    assert warning in "".join(found)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_an_index(sharded: Path, saved: Path, suffix: str) -> None:
    for path in describe(sharded).weight_files:
        if suffix == ".bin":
            torch.save(load_file(path), sharded / f"pytorch_{path.stem}.bin")
            path.unlink()
    (sharded / INDEX).unlink()
    assert same_weights(sharded, saved)
    gone = sorted(sharded.glob(f"*{suffix}"))[2]
    gone.rename(sharded / "kept")
    with pytest.raises(CheckpointError, match=r"lacks part 3 of 7 of its .* files"):
        describe(sharded)
    (sharded / "kept").rename(gone)
    (sharded / gone.name.replace("00007", "00008")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"files of 7 and of 8 parts.*delete the stale ones"):
        describe(sharded)


def test_a_tensor_twice_without_an_index(sharded: Path) -> None:
    add_to_shard(1, **{EMBEDDING: torch.ones(2)})(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"stands both in .*, and no index says which is right"):
        load(sharded)


def test_a_single_file_beside_shards_without_an_index(sharded: Path, saved: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(saved / "single" / SINGLE, sharded)
    assert same_weights(sharded, saved)
    assert "which have no index" in warnings_of(sharded)[0]


def test_missing_shards_are_all_named(sharded: Path) -> None:
    for number in (2, 5):
        (sharded / f"model-{number:05}-of-00007.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names model-00002-of-00007.safetensors, model-00005.*, which are missing"
    ):
        describe(sharded)
    torch.save({}, sharded / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"to load pytorch_model.bin instead, delete {INDEX}"):
        describe(sharded)


def test_a_tied_index_may_promise_the_head(sharded: Path) -> None:
    """transformers writes the name into the index, and leaves the tensor out."""
    write_config(sharded, tie_word_embeddings=True)
    path = sharded / json.loads((sharded / INDEX).read_text())["weight_map"][LM_HEAD]
    save_file({n: t for n, t in load_file(path).items() if n != LM_HEAD}, path)
    assert LM_HEAD not in load(sharded)
    write_config(sharded)
    with pytest.raises(CheckpointError, match=f"says that {LM_HEAD} is in {path.name}, and it is not there"):
        load(sharded)


@pytest.mark.parametrize("kept", [EMBEDDING, LM_HEAD])
@pytest.mark.parametrize("form", ["single", "sharded", "sharded, and the index names both"])
def test_a_tied_checkpoint_may_store_its_table_under_either_name(
    saved: Path, tmp_path: Path, kept: str, form: str
) -> None:
    """safetensors' save_model keeps one of two names that share a tensor, by their order. Untied, that is refused."""
    directory = Path(shutil.copytree(saved / form.split(",", maxsplit=1)[0], tmp_path / "tied"))
    table = load(directory)[EMBEDDING]
    for path in describe(directory).weight_files:
        weights = {n: t for n, t in load_file(path).items() if n not in (EMBEDDING, LM_HEAD)}
        if path == describe(directory).weight_files[0]:
            weights[kept] = table
        save_file(weights, path)
    if form != "single":
        names = [kept] if form == "sharded" else [EMBEDDING, LM_HEAD]
        first = describe(directory).weight_files[0].name
        edit_index(lambda m: [m.pop(EMBEDDING), m.pop(LM_HEAD), m.update(dict.fromkeys(names, first))])(directory)
    write_config(directory, tie_word_embeddings=True)
    found = load(directory)
    assert torch.equal(found[EMBEDDING], table) and LM_HEAD not in found
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory).state_dict()
    assert torch.equal(theirs[EMBEDDING], table)
    write_config(directory, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"holds no|lacks|it is not there"):
        load(directory)


def test_a_tied_index_without_a_table_is_refused(sharded: Path) -> None:
    write_config(sharded, tie_word_embeddings=True)
    for path in describe(sharded).weight_files:
        save_file({n: t for n, t in load_file(path).items() if n not in (EMBEDDING, LM_HEAD)}, path)
    with pytest.raises(CheckpointError, match=f"says that ({LM_HEAD}|{EMBEDDING}) is in .*, and it is not there"):
        load(sharded)


def test_a_tied_configuration_with_another_head(single: Path) -> None:
    write_config(single, tie_word_embeddings=True)
    info = describe(single)
    with pytest.raises(CheckpointError) as error:
        check_tied_head(open_checkpoint(info), shard_table(info.config, 1, 0))
    assert "set tie_word_embeddings to false in" in str(error.value)
    assert f"delete {LM_HEAD} from the file" in str(error.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (LFS, "is a Git LFS pointer to a file of 4,976,698,672 bytes, not the file itself; run `git lfs pull`"),
        (HTML, "is an HTML page"),
        (b"\xef\xbb\xbf\n <html>", "is an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an HTML page"),
        (b"Entry not found", "is a text, 'Entry not found', not a file of weights"),
        (b'{"error": "Access to model x is restricted"}', "is a text"),
        (b"", "is empty"),
    ],
)
def test_files_that_are_something_else(sharded: Path, content: bytes, found: str) -> None:
    """All of them in one message, whatever is wrong with each; also a shard that is cut off."""
    first, second, third = describe(sharded).weight_files[:3]
    first.write_bytes(content)
    second.write_bytes(content)
    third.write_bytes(third.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(describe(sharded))
    for path in (first, second):
        assert f"{path} {found}" in str(error.value)
    assert f"{third} is cut off: it has " in str(error.value)


def link_to_nowhere(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/ffff")


@pytest.mark.parametrize(
    ("put", "found"),
    [
        (lambda path: path.write_bytes(LFS), "is a Git LFS pointer"),
        (link_to_nowhere, "is a link to ../../blobs/ffff, which does not exist; download it again"),
        (lambda path: (path.unlink(missing_ok=True), path.mkdir()), "is a directory, not a file"),
    ],
    ids=["pointer", "link", "directory"],
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "chat_template.json", "quantize_config.json", "quant_config.json", INDEX,
    ],
)  # fmt: skip
def test_a_settings_file_that_is_something_else(sharded: Path, name: str, put: Edit, found: str) -> None:
    """It would be missing without a word, and with it the chat format or the end tokens."""
    put(sharded / name)
    with pytest.raises(CheckpointError, match=rf"{name} {found}"):
        describe(sharded)


def test_pointers_in_the_tokenizer_and_the_weights_are_told_together(single: Path) -> None:
    (single / SINGLE).write_bytes(LFS)
    (single / "tokenizer.model").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"model.safetensors is a Git LFS pointer.*tokenizer.model is a Git LFS"):
        describe(single)


def test_a_link_that_leads_nowhere(single: Path) -> None:
    """A hub's cache whose blob is gone."""
    (single / SINGLE).unlink()
    (single / SINGLE).symlink_to("../../blobs/abc")
    with pytest.raises(CheckpointError, match=f"{SINGLE} is a link to ../../blobs/abc, which does not exist"):
        describe(single)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("pytorch_model.bin", b"PK\x03\x04" + b"\0" * 4000, "is cut off: the end of its archive is missing"),
        ("pytorch_model.bin", LFS, "is a Git LFS pointer"),
        ("model.safetensors", b"\0" * 7, "is cut off: it has 7 of 8 bytes"),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0{}x", "is 1 bytes longer than its header says"),
    ],
)
def test_cut_files(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {found}"):
        open_checkpoint(describe(tmp_path))


SAFETENSORS, OLD_TORCH = b"\2\0\0\0\0\0\0\0{}", io.BytesIO()
torch.save({}, OLD_TORCH, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("pytorch_model.bin", SAFETENSORS, "is a safetensors file; give it the name model.safetensors"),
        ("pytorch_model.bin", b"GGUF" + b"\0" * 64, "is a GGUF file; give it a name that ends in .gguf"),
        ("pytorch_model.bin", b"\x1f\x8b\x08" + b"\0" * 64, "is compressed with gzip; unpack it"),
        (
            "pytorch_model.bin",
            OLD_TORCH.getvalue(),
            "is of the form that torch wrote before 1.6, which .* write it anew",
        ),
        (
            "model.safetensors",
            b"PK\x03\x04" + b"\0" * 64,
            "is a zip archive, as torch writes; give it the name pytorch_model",
        ),
        ("model.safetensors", b"GGUF" + b"\0" * 64, "is a GGUF file"),
        ("model.safetensors", OLD_TORCH.getvalue(), "is of the form that torch wrote before 1.6"),
        ("model.safetensors", b"\x1f\x8b\x08" + b"\0" * 64, "is compressed with gzip"),
    ],
)
def test_weights_of_another_format_than_their_name_says(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {found}"):
        open_checkpoint(describe(tmp_path))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.nn.Linear(2, 2), r"holds objects \(torch.nn.modules.linear.Linear\), .*: torch.save\(model.state_dict"),
        (
            {"a": torch.ones(4, 6).t()},
            r"a is not stored as one plain array \(cpu, torch.strided\), or not in its order; save",
        ),
        ([torch.ones(2)], "holds a list; tensors by name are needed"),
        ({"state_dict": {}, "epoch": 3}, "holds dict 'state_dict'; only tensors by name can be read"),
    ],
)
def test_torch_files_that_hold_something_else(tmp_path: Path, content: object, found: str) -> None:
    write_config(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=found) as error:
        open_checkpoint(describe(tmp_path))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("content", [b"root:secret", b"", b"\x7fELF"])
def test_what_is_no_gguf_file_is_not_shown(tmp_path: Path, content: bytes) -> None:
    """Whoever may deploy a model may not read every file of the host."""
    (tmp_path / "shadow").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        describe(tmp_path / "shadow")
    instead = "" if content else ": it is empty; download it again"
    assert str(error.value) == f"{tmp_path / 'shadow'} is not a GGUF file{instead}"


def test_a_pointer_instead_of_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"x.gguf is not a GGUF file: it is a Git LFS pointer"):
        describe(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["adapter_config.json"], "holds an adapter .LoRA."),
        (["x.Q4_K_M.gguf"], "to serve a GGUF file in it, name the file: x.Q4_K_M.gguf"),
        (["llama-2-7b/params.json"], "did you mean a directory in it: llama-2-7b"),
        (["snapshots/abc/config.json"], "did you mean .*snapshots/abc"),
        ([], "it is empty"),
    ],
)
def test_a_directory_around_a_checkpoint(tmp_path: Path, files: list[str], hint: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=hint):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adapter_config.json", "holds an adapter .LoRA."),
        ("consolidated.safetensors", "Mistral's own format"),
        ("tf_model.h5", "TensorFlow's weights cannot be read"),
        ("weights.safetensors", "it holds weights.safetensors, which is no name that is looked for"),
    ],
)
def test_weights_in_another_format(tmp_path: Path, name: str, hint: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=hint):
        describe(tmp_path)


def test_a_file_of_a_checkpoint_instead_of_its_directory(single: Path) -> None:
    with pytest.raises(CheckpointError, match=f"to serve the checkpoint around it, give its directory, {single}"):
        describe(single / SINGLE)


# ---- what the files beside the weights say ----


def test_end_tokens_beyond_the_vocabulary(single: Path) -> None:
    write_config(single, eos_token_id=[2, 101])
    info = describe(single)
    assert info.config.eos_token_ids == (2,)
    assert "special token 101 is not below the vocabulary's 101; answers end at 2" in info.warnings[0]
    write_config(single, eos_token_id=101)
    with pytest.raises(CheckpointError, match=r"special token 101 .* no answer would ever end"):
        describe(single)


@pytest.mark.parametrize(
    ("own", "generation", "blamed", "not_blamed"),
    [
        ([2], [2, 101], "generation_config.json", "/config.json"),
        ([2, 101], [2], "/config.json", "generation_config.json"),
        ([2, 101], [101], "/config.json", "generation_config.json"),
        ([], [101], "generation_config.json", "/config.json"),
    ],
)
def test_the_file_that_names_an_end_token_beyond_the_vocabulary(
    single: Path, own: list[int], generation: list[int], blamed: str, not_blamed: str
) -> None:
    write_config(single, eos_token_id=own)
    (single / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    try:
        (problem,) = describe(single).warnings
    except CheckpointError as error:
        problem = str(error)
    assert blamed in problem and not_blamed not in problem


def test_generation_settings(single: Path) -> None:
    values = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
        "max_length": 4096,
        "eos_token_id": [2, 3],
    }
    (single / "generation_config.json").write_text(json.dumps(values | {"min_p": None}))
    info = describe(single)
    found = info.generation
    assert (found.do_sample, found.temperature, found.top_p, found.top_k, found.min_p) == (True, 0.6, 0.9, 50, None)
    assert info.config.eos_token_ids == (2, 3)
    (single / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature is 'hot'"):
        describe(single)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "T"),
        ("chat_template.json", '{"chat_template": "T"}'),
        ("tokenizer_config.json", '{"chat_template": "T"}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "T"}, {"name": "tool_use"}]}'),
        ("tokenizer_config.json", '{"chat_template": {"default": "T"}}'),
    ],
)
def test_chat_template_wherever_it_stands(single: Path, name: str, content: str) -> None:
    (single / name).write_text(content)
    assert describe(single).chat_template == "T"


@pytest.mark.parametrize(
    "template",
    [
        [{"name": "rag", "template": "T"}], [{"template": "T"}], ["T"], [{"name": ["default"], "template": "T"}],
        [{"name": {}, "template": "T"}], [{"name": "default"}], {"rag": "T"}, {"default": 5}, 5, True, False,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_that_is_none_is_told(single: Path, name: str, template: object) -> None:
    (single / name).write_text(json.dumps({"chat_template": template}))
    info = describe(single)
    assert info.chat_template == ""
    (warning,) = info.warnings
    assert f"{name}: chat_template is {template!r:.60}; a text" in warning


def test_a_device_is_no_checkpoint() -> None:
    with pytest.raises(CheckpointError, match=r"^/dev/null is neither a file nor a directory; a directory in"):
        describe(Path("/dev/null"))


@pytest.mark.parametrize("template", [None, "", [], {}])
def test_no_chat_template_is_no_reason_to_warn(single: Path, template: object) -> None:
    (single / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert (describe(single).chat_template, describe(single).warnings) == ("", ())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"suppress_tokens": [5, 7]}, "suppress_tokens ([5, 7])"),
        ({"stop_strings": ["x"], "num_beams": 4}, "stop_strings (['x']), num_beams (4)"),
        ({"typical_p": 0.9, "no_repeat_ngram_size": 3}, "no_repeat_ngram_size (3), typical_p (0.9)"),
        ({"bad_words_ids": [[1]], "min_new_tokens": 2}, "bad_words_ids ([[1]]), min_new_tokens (2)"),
        ({"presence_penalty": 0.5, "frequency_penalty": -0.5}, "frequency_penalty (-0.5), presence_penalty (0.5)"),
        ({"begin_suppress_tokens": [3]}, "begin_suppress_tokens ([3])"),
        ({"dola_layers": "high", "num_return_sequences": 2}, "dola_layers ('high'), num_return_sequences (2)"),
        ({"max_length": 100}, "max_length (100)"),
    ],
)
def test_fields_of_generation_that_nothing_uses_are_told(single: Path, values: dict[str, Any], told: str) -> None:
    (single / "generation_config.json").write_text(json.dumps(values))
    (warning,) = describe(single).warnings
    assert warning == (
        f"{single}/generation_config.json: not used here, though answers of transformers depend on it: {told}"
    )


def test_a_generation_file_as_transformers_writes_it_is_no_reason_to_warn(single: Path) -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    (single / "generation_config.json").write_text(json.dumps(defaults | {"min_new_tokens": None, "stop_strings": []}))
    assert describe(single).warnings == ()


def test_tokenizer_settings(single: Path) -> None:
    (single / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": None, "bos_token": {"content": "<s>"},
        "eos_token": "<|im_end|>", "pad_token": None,
        "added_tokens_decoder": {"101": {"content": "<|im_end|>", "special": True, "rstrip": True}, "0": {"content": "<unk>"}},
    }))  # fmt: skip
    (single / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<|x|>", {"content": "<|y|>"}]})
    )
    (single / "added_tokens.json").write_text('{"<|im_end|>": 101, "<pad>": 102}')
    found = describe(single).tokenizer
    assert (found.class_name, found.legacy, found.add_bos, found.bos_text) == ("LlamaTokenizer", False, None, "<s>")
    assert found.eos_texts == ("<|im_end|>", "</s>")
    assert {"<|x|>", "<|y|>", "<s>", "</s>", "<|im_end|>"} == found.special_texts
    assert [(t.id, t.text, t.special, t.rstrip) for t in found.added] == [
        (0, "<unk>", None, False), (101, "<|im_end|>", True, True), (102, "<pad>", None, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", '{"<pad>": "x"}', "the token '<pad>' has the id 'x'"),
        ("added_tokens.json", '{"<pad>": -1}', "the token '<pad>' has the id -1"),
        (
            "added_tokens.json",
            '{"<pad>": 2097152}',
            "the token '<pad>' has the id 2097152; a whole number below 2097152",
        ),
        ("added_tokens.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', ""),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "<pad>"}}', "has the id 'x'"),
        ("tokenizer_config.json", '{"legacy": "yes"}', "legacy is 'yes'; true or false"),
    ],
)
def test_broken_tokenizer_settings(single: Path, name: str, content: str, message: str) -> None:
    (single / name).write_text(content)
    if not message:
        assert describe(single).tokenizer.added == ()
        return
    with pytest.raises(CheckpointError, match=message):
        describe(single)
