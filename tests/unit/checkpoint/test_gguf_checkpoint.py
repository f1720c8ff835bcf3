"""Reading GGUF, compared with transformers' own reading, and with llama.cpp's `gguf` package."""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from model_parallel.checkpoint import gguf_file
from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.gguf_file import GgufFile
from model_parallel.checkpoint.loader import load_shard, open_checkpoint
from model_parallel.checkpoint.names import from_gguf
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import FINAL_NORM, Shard, shard_table
from serving.text.tokenizer import load_tokenizer
from tests.support.converted import converted
from tests.support.effort import by_day, rest_by_night
from tests.support.llama_tokenizers import write_gguf
from tests.support.shards import load_parts

CPU = torch.device("cpu")
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 40, 4, 2, 64


def load(path: Path, num_ranks: int, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    info = describe(path)
    return load_parts(info, num_ranks, rank, dtype=dtype)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small operations: threads that wait for each other on busy cores take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_same_configuration_as_transformers(smollm2_path: Path) -> None:
    theirs = transformers.AutoConfig.from_pretrained(converted(smollm2_path))
    info = describe(smollm2_path)
    ours = info.config
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (49152, 576, theirs.intermediate_size)
    assert (ours.num_layers, ours.num_query_heads, ours.num_kv_heads, ours.head_dim) == (30, 9, 3, theirs.head_dim)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.tie_word_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert ours.num_parameters == 134515008
    assert (info.format, info.licence, info.add_bos) == ("gguf", "apache-2.0", False)
    assert "<|im_start|>" in info.chat_template


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.permute) lays them out."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


class TinyGguf:
    """A one-layer model, written by the `gguf` package."""

    def __init__(self) -> None:
        self.values: dict[str, str | int | float | list[int]] = {
            "llama.block_count": 1,
            "llama.context_length": 64,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": FFN,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": HEAD_DIM,
        }
        rng = np.random.default_rng(0)
        shapes = {
            "token_embd": (VOCAB, HIDDEN),
            "output_norm": (HIDDEN,),
            "output": (VOCAB, HIDDEN),
            "blk.0.attn_norm": (HIDDEN,),
            "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "blk.0.ffn_norm": (HIDDEN,),
            "blk.0.ffn_gate": (FFN, HIDDEN),
            "blk.0.ffn_up": (FFN, HIDDEN),
            "blk.0.ffn_down": (HIDDEN, FFN),
        }
        self.tensors = {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        self.types: dict[str, Type] = {}

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in self.values.items():
            add: Callable[..., None] = {
                str: writer.add_string,
                int: writer.add_uint32,
                float: writer.add_float32,
                list: writer.add_array,
                bool: writer.add_bool,
            }[type(value)]
            add(key, value)
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, tensor, raw_dtype=self.types.get(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(scope="module", params=rest_by_night(["tiny", "smollm2"], by_day=["tiny"]))
def whole_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that transformers can read too: quantised as SmolLM2's is, or that one itself."""
    if request.param == "smollm2":
        path: Path = request.getfixturevalue("smollm2_path")
        return path
    tiny = TinyGguf()
    for name, kind in {
        "blk.0.attn_q": Type.Q4_1, "blk.0.attn_k": Type.Q4_1, "blk.0.attn_v": Type.Q8_0, "blk.0.ffn_down": Type.Q4_1,
        "token_embd": Type.Q8_0, "blk.0.ffn_up": Type.F16,
    }.items():  # fmt: skip
        tiny.types[f"{name}.weight"] = kind
        tiny.tensors[f"{name}.weight"] = gguf.quants.quantize(tiny.tensors[f"{name}.weight"], kind)
    return tiny.write(tmp_path_factory.mktemp("whole") / "tiny.gguf")


@pytest.fixture(scope="module")
def whole(whole_file: Path) -> dict[str, torch.Tensor]:
    return load(whole_file, 1, 0)


def test_same_tensors_as_transformers(whole_file: Path, whole: dict[str, torch.Tensor]) -> None:
    # Importing it takes seconds, so only the test that compares with it does.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: PLC0415

    config = transformers.AutoConfig.from_pretrained(whole_file.parent, gguf_file=whole_file.name)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(whole_file), return_tensors=True, model_to_load=empty)["tensors"]
    assert theirs.keys() == whole.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_rank_reads_its_part(whole_file: Path, whole: dict[str, torch.Tensor], num_ranks: int) -> None:
    """Together the ranks cover every tensor, and each part is that of the whole."""
    config = describe(whole_file).config
    covered: dict[str, set[int]] = {name: set() for name in whole}
    for rank in range(num_ranks):
        table = shard_table(config, num_ranks, rank)
        for name, part in load(whole_file, num_ranks, rank).items():
            assert part.is_contiguous()
            assert torch.equal(part, whole[name][table[name].index]), (rank, name)
            covered[name].update(range(table[name].start, table[name].stop))
    for name, shard in shard_table(config, num_ranks, 0).items():
        assert shard.axis is None or covered[name] == set(range(shard.full_shape[shard.axis]))


QUANTISED = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
RAW = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]


@pytest.mark.parametrize("kind", [Type.F32, *QUANTISED, *RAW], ids=lambda kind: kind.name)
def test_every_type(tmp_path: Path, kind: Type) -> None:
    """Slices, also those that begin and end inside a block, equal the library's dequantisation of the whole tensor."""
    tiny = TinyGguf()
    rng = np.random.default_rng(1)
    for name, tensor in tiny.tensors.items():
        if tensor.ndim != 2 or kind is Type.F32:
            continue
        tiny.types[name] = kind
        if kind in RAW:  # the package cannot make these: any bytes are some weights
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            tiny.tensors[name] = rng.integers(0, 60, shape, dtype=np.uint8)
        else:
            tiny.tensors[name] = gguf.quants.quantize(tensor, kind)
    path = tiny.write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(describe(path))
    for tensor in gguf.GGUFReader(path).tensors:
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = from_gguf(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            whole = whole.reshape(-1, HEAD_DIM // 2, 2, whole.shape[-1]).swapaxes(1, 2).reshape(whole.shape)
        assert checkpoint.shape(name) == whole.shape
        shards = [Shard(whole.shape)]
        if whole.ndim == 2:
            shards += [Shard(whole.shape, 0, 3, 29), Shard(whole.shape, 1, 0, 171), Shard(whole.shape, 1, 171, 203)]
        for shard in shards:
            part = checkpoint.read(name, shard, torch.float32).numpy()
            np.testing.assert_array_equal(part, whole[shard.index], err_msg=f"{name} {shard}")


def test_query_and_key_rows_come_back_in_half_split_order(tmp_path: Path) -> None:
    tiny = TinyGguf()
    query, key = (np.random.default_rng(2).normal(size=(n * HEAD_DIM, HIDDEN)).astype(np.float32) for n in (4, 2))
    tiny.tensors["blk.0.attn_q.weight"] = permuted(query, HEADS)
    tiny.tensors["blk.0.attn_k.weight"] = permuted(key, KV_HEADS)
    path = tiny.write(tmp_path / "tiny.gguf")
    for rank in range(4):
        part = load(path, 4, rank)
        ours = part["model.layers.0.self_attn.q_proj.weight"].numpy()
        np.testing.assert_array_equal(ours, query[rank * HEAD_DIM : (rank + 1) * HEAD_DIM])
        ours = part["model.layers.0.self_attn.k_proj.weight"].numpy()
        np.testing.assert_array_equal(ours, key[rank // 2 * HEAD_DIM : (rank // 2 + 1) * HEAD_DIM])


def test_only_the_slice_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TinyGguf()
    for name in ("blk.0.ffn_up.weight", "blk.0.ffn_down.weight"):
        tiny.tensors[name] = gguf.quants.quantize(tiny.tensors[name], Type.Q8_0)
        tiny.types[name] = Type.Q8_0
    checkpoint = open_checkpoint(describe(tiny.write(tmp_path / "tiny.gguf")))
    sizes: list[int] = []
    real = gguf.quants.dequantize

    def spy(data: np.ndarray, kind: Type) -> np.ndarray:
        sizes.append(data.size)
        return real(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", spy)
    checkpoint.read("model.layers.0.mlp.up_proj.weight", Shard((FFN, HIDDEN), 0, 7, 10), torch.float32)
    checkpoint.read("model.layers.0.mlp.down_proj.weight", Shard((HIDDEN, FFN), 1, 30, 70), torch.float32)
    block_bytes = 34
    assert sizes == [3 * (HIDDEN // 32) * block_bytes, HIDDEN * 3 * block_bytes]


def test_run_dtype_and_progress(tmp_path: Path) -> None:
    info = describe(TinyGguf().write(tmp_path / "tiny.gguf"))
    seen: list[tuple[int, int]] = []
    table = shard_table(info.config, 1, 0)
    weights = load_shard(
        info, table, dtype=torch.bfloat16, device=CPU, progress=lambda done, total: seen.append((done, total))
    )
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert not info.config.tie_word_embeddings
    assert seen[-1] == (info.config.num_parameters * 2,) * 2
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.rope.scaling.factor", -2.0, "factor of linear RoPE scaling is -2.0"),
        ("llama.rope.dimension_count", 32, "llama.rope.dimension_count is 32 and the head dimension 64"),
        ("llama.attention.value_length", 32, "llama.attention.value_length is 32"),
        ("llama.expert_count", 8, "llama.expert_count is 8"),
        ("llama.rope.scaling.attn_factor", 1.19, "llama.rope.scaling.attn_factor is 1.19"),
        ("llama.attention.causal", False, "llama.attention.causal is False"),
        ("llama.attention.head_count_kv", [2, 1], r"head_count_kv is \[2, 1\]; all layers must have the same"),
        ("llama.attention.head_count_kv", 3, "num_kv_heads is 3"),
        ("llama.attention.head_count", 0, "the head dimension 256"),
        ("llama.embedding_length", "256", "llama.embedding_length is '256'"),
        ("split.count", 2, "split.count is 2: it is one of 2 parts; join them with llama-gguf-split --merge FIRST OUT"),
        ("general.type", "adapter", "tiny.gguf is an adapter .LoRA., not a model; merge it"),
        ("adapter.type", "lora", "tiny.gguf is an adapter .LoRA., not a model; merge it"),
        ("tokenizer.ggml.eos_token_id", VOCAB, "special token 40"),
    ],
)
def test_unsupported_metadata_is_refused_by_name(
    tmp_path: Path, key: str, value: str | int | float, message: str
) -> None:
    tiny = TinyGguf()
    tiny.values[key] = value
    path = tiny.write(tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match=message) as error:
        describe(path)
    assert str(path) in str(error.value)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'qwen2'"):
        describe(tmp_path / "x.gguf")


def test_rope_frequencies(tmp_path: Path) -> None:
    """As llama.cpp's converter writes Llama 3's scaling: float32 divisors; ones are as good as none."""
    tiny = TinyGguf()
    plain = describe(tiny.write(tmp_path / "plain.gguf")).config
    tiny.tensors["rope_freqs.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    assert describe(tiny.write(tmp_path / "ones.gguf")).config == plain
    tiny.tensors["rope_freqs.weight"][3] = 8
    path = tiny.write(tmp_path / "scaled.gguf")
    info = describe(path)
    assert info.config.rope_divisors == (1, 1, 1, 8, *(1,) * (HEAD_DIM // 2 - 4))
    assert "rope_freqs.weight" in info.rope_scaling
    assert FINAL_NORM in load(path, 1, 0)
    tiny.tensors["rope_freqs.weight"] = np.ones(HEAD_DIM, np.float32)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is F32 \[64\]; F32 \[32\] is needed"):
        describe(tiny.write(tmp_path / "wide.gguf"))


@pytest.mark.parametrize(
    ("values", "divisor"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4),
        ({"llama.rope.scaling.factor": 4.0}, 4),
        ({"llama.rope.scale_linear": 4.0}, 4),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 1.0}, None),
    ],
)
def test_linear_scaling(tmp_path: Path, values: dict[str, str | float], divisor: float | None) -> None:
    tiny = TinyGguf()
    tiny.values |= values
    config = describe(tiny.write(tmp_path / "x.gguf")).config
    assert config.rope_divisors == ((divisor,) * (HEAD_DIM // 2) if divisor else ())


def test_other_scaling_is_refused(tmp_path: Path) -> None:
    tiny = TinyGguf()
    tiny.values |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(CheckpointError, match=r"llama.rope.scaling.type is 'yarn'.*made without it"):
        describe(tiny.write(tmp_path / "x.gguf"))


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    tiny = TinyGguf()
    tiny.values["llama.attention.sliding_window"] = 32
    info = describe(tiny.write(tmp_path / "x.gguf"))
    assert info.config.max_position == 32
    assert "sliding_window is 32" in info.warnings[0]
    tiny.values["llama.attention.sliding_window"] = 64
    assert describe(tiny.write(tmp_path / "y.gguf")).warnings == ()


def test_settings_of_each_layer_that_are_equal(tmp_path: Path) -> None:
    tiny = TinyGguf()
    plain = describe(tiny.write(tmp_path / "plain.gguf")).config
    tiny.values |= {"llama.attention.head_count_kv": [KV_HEADS], "llama.feed_forward_length": [FFN]}
    assert describe(tiny.write(tmp_path / "x.gguf")).config == plain


def test_every_end_token(tmp_path: Path) -> None:
    tiny = TinyGguf()
    tiny.values |= {f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("eos", "eot", "eom"), start=2)}
    assert describe(tiny.write(tmp_path / "x.gguf")).config.eos_token_ids == (2, 3, 4)
    tiny.values["tokenizer.ggml.eot_token_id"] = VOCAB
    info = describe(tiny.write(tmp_path / "y.gguf"))
    assert info.config.eos_token_ids == (2, 4)
    assert "special token 40 is not below the vocabulary's 40; answers end at 2, 4" in info.warnings[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.tensors.pop("blk.0.ffn_up.weight"), "lacks model.layers.0.mlp.up_proj.weight"),
        (lambda t: t.tensors.update({"blk.0.attn_q.bias": np.ones(256, np.float32)}), "blk.0.attn_q.bias"),
        (lambda t: t.tensors.update({"blk.1.attn_norm.weight": np.ones(256, np.float32)}), "model.layers.1.input"),
        (lambda t: t.tensors.update({"output.weight": np.ones((41, 256), np.float32)}), r"shape \[41, 256\]"),
        (lambda t: t.tensors.update({"output_norm.weight": np.ones(256, np.int8)}), "of type I8"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, spoil: Callable[[TinyGguf], object], message: str) -> None:
    tiny = TinyGguf()
    spoil(tiny)
    with pytest.raises(CheckpointError, match=message):
        load(tiny.write(tmp_path / "tiny.gguf"), 1, 0)


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_a_type_that_cannot_be_read_is_told_with_those_that_can(tmp_path: Path, dtype: type) -> None:
    tiny = TinyGguf()
    tiny.tensors["output_norm.weight"] = tiny.tensors["output_norm.weight"].astype(dtype)
    with pytest.raises(CheckpointError) as caught:
        load(tiny.write(tmp_path / "tiny.gguf"), 1, 0)
    kind = "F64" if dtype is np.float64 else "I32"
    assert str(caught.value).endswith(
        f"{FINAL_NORM} is of type {kind}, which cannot be read; F32, F16, BF16 and quantised types can"
    )


def test_a_file_without_a_vocabulary_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny\.gguf has no tokenizer: it has no tokenizer\.ggml\.tokens"):
        load_tokenizer(TinyGguf().write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("name", rest_by_night(["vocabulary", "smollm2"], by_day=["vocabulary"]))
def test_header_is_the_one_that_the_library_reads(name: str, smollm2_path: Path, tmp_path: Path) -> None:
    path = smollm2_path if name == "smollm2" else write_gguf(tmp_path / "llama.gguf", "llama")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: ours.get(key) for key in ours.metadata_keys} == fields
    assert ours.array_length("tokenizer.ggml.tokens") == len(fields["tokenizer.ggml.tokens"]) >= 500
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.shape, mine.type) == (tuple(tensor.shape.tolist())[::-1], tensor.tensor_type)
        assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_a_header_is_read_once_and_anew_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TinyGguf()
    path = tiny.write(tmp_path / "tiny.gguf")
    assert GgufFile(path).tensors is not GgufFile(path).tensors, "it may change again within the clock's grain"
    monkeypatch.setattr(gguf_file, "_SETTLED_NS", -(10**12))
    first = GgufFile(path)
    assert GgufFile(path).tensors is first.tensors
    name = "general.architecture"
    path.write_bytes(path.read_bytes().replace(first.get(name).encode(), first.get(name).upper().encode()) + b" ")
    assert GgufFile(path).get(name) == first.get(name).upper()


def test_broken_headers_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with one byte of the header changed: CheckpointError or a readable file, nothing else."""
    path = TinyGguf().write(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    header = min(t.offset for t in GgufFile(path).tensors.values())
    broken = tmp_path / "broken.gguf"
    for length in [0, 3, 4, 8, 20, *range(24, header, by_day(67, by_night=17)), len(data) - 1]:
        broken.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"broken\.gguf"):
            GgufFile(broken)
    rng = np.random.default_rng(3)
    refused, step = 0, by_day(16, by_night=4)
    for position in range(0, header, step):
        mutated = bytearray(data)
        mutated[position] = rng.choice([0, 0x7F, 0x80, 0xFF])
        broken.write_bytes(mutated)
        try:
            GgufFile(broken)
        except CheckpointError:
            refused += 1
    assert refused > header // step // 10
