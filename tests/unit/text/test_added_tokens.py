"""Tokens that files beside a vocabulary add to it, for every kind of vocabulary; and vocabularies of odd shapes."""

import base64
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Library

from bench.support.small_tokenizer import sentencepiece_model
from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.tiktoken_file import llama3_special_tokens
from model_parallel.errors import CheckpointError, RequestError
from serving.text.token_bytes import byte_level_bytes
from serving.text.tokenizer import Part, Tokenizer, load_tokenizer
from tests.support.llama_tokenizers import (
    TEXTS,
    byte_level_json,
    llama_directory,
    pieces,
    tokenizer_json,
    tokenizer_json_with,
)

VOCABULARIES: dict[str, dict[str, str | bytes]] = {
    "tokenizer.json": {"tokenizer__json": tokenizer_json()},
    "tokenizer.model": {"tokenizer__model": sentencepiece_model()},
}
IM_END = {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> dict[str, str | bytes]:
    return VOCABULARIES[request.param]


def load(directory: Path, vocabulary: dict[str, str | bytes], **files: Any) -> Tokenizer:
    written = {name: json.dumps(content) for name, content in files.items()}
    return load_tokenizer(llama_directory(directory, **vocabulary, **written))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {"added_tokens_decoder": {"505": IM_END}, "eos_token": "<|im_end|>"}},
        {"added_tokens__json": {"<|im_end|>": 505}, "tokenizer_config__json": {"eos_token": "<|im_end|>"}},
        {
            "added_tokens__json": {"<|im_end|>": 505},
            "special_tokens_map__json": {"eos_token": {"content": "<|im_end|>"}},
        },
    ],
)
def test_an_end_token_that_only_the_tokenizers_files_name(
    tmp_path: Path, vocabulary: dict[str, str | bytes], files: dict[str, Any]
) -> None:
    """A ChatML fine-tune whose configurations still end at </s>."""
    tokenizer = load(tmp_path, vocabulary, **files)
    assert tokenizer.eos_token_ids == (2, 505)
    assert tokenizer.control_token_id("<|im_end|>") == 505
    assert 505 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.token_bytes(505) == b""
    assert tokenizer.encode("hello") == load_tokenizer(llama_directory(tmp_path, **vocabulary)).encode("hello")


@pytest.mark.parametrize("word", ["Zürich", "New York"])
def test_words_that_are_added(tmp_path: Path, vocabulary: dict[str, str | bytes], word: str) -> None:
    added = IM_END | {"content": word, "special": False}
    tokenizer = load(tmp_path, vocabulary, tokenizer_config__json={"added_tokens_decoder": {"500": added}})
    ids = tokenizer.encode(f"in {word}!", add_bos=False)
    assert 500 in ids
    assert tokenizer.token_bytes(500) == word.encode()
    assert tokenizer.decode(ids).replace(" ", "") == f"in{word}!".replace(" ", "")


@pytest.mark.parametrize("vocabulary_json", [tokenizer_json(), byte_level_json([])])
@pytest.mark.parametrize("content", ["Zürich", "<tool>"])
@pytest.mark.parametrize("flags", [
    {}, {"single_word": True}, {"normalized": True}, {"single_word": True, "normalized": True}, {"normalized": None},
])  # fmt: skip
def test_words_are_found_where_transformers_finds_them(
    tmp_path: Path, vocabulary_json: str, content: str, flags: dict[str, Any]
) -> None:
    data = json.loads(vocabulary_json)
    data["normalizer"] = data["normalizer"] or {"type": "NFC"}
    word = IM_END | {"content": content, "special": False} | flags
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(len(data["model"]["vocab"])): {key: value for key, value in word.items() if value is not None}
        },
    }
    tokenizer = load(tmp_path, {"tokenizer__json": json.dumps(data)}, tokenizer_config__json=config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (f"in {content}!", f"in{content}er", f"a {content} {content}", f"{content}", f" {content} "):
        assert tokenizer.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("scheme", ["", "first", "always", "never"])
def test_spaces_around_words_are_those_of_transformers(tmp_path: Path, scheme: str, legacy: bool | None) -> None:
    """Of Llama's class: a text gets one space, and what follows an added word none of its own unless legacy is true."""
    data = json.loads(tokenizer_json_with(["Zürich", "  ", "\n\n"], scheme=scheme))
    data["model"]["byte_fallback"] = False  # Llama's class has bytes, whatever the file says
    for number, token in enumerate(data["added_tokens"][3:]):
        token |= {"special": False, "normalized": number == 0}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    tokenizer = load(tmp_path, {"tokenizer__json": json.dumps(data)}, tokenizer_config__json=config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "in Zürich!",
        "inZüricher",
        "Zürich",
        "Zürich x",
        "a  b\n\nc\n\n d",
        "def f():\n    return 1\n",
        "日本",
    ):
        assert tokenizer.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False), repr(text)
    assert tokenizer.warnings == ()


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
    ],
)
def test_steps_that_transformers_ignores_are_told(tmp_path: Path, change: dict[str, Any]) -> None:
    data = json.loads(tokenizer_json_with([], scheme="first")) | change
    config = {"tokenizer_class": "LlamaTokenizer"}
    (told,) = load(tmp_path, {"tokenizer__json": json.dumps(data)}, tokenizer_config__json=config).warnings
    assert (
        "text is cut by its normalizer and pre_tokenizer; transformers 5 cuts by the rule of the class LlamaTokenizer"
        in told
    )


def test_a_word_of_which_the_normalizer_leaves_nothing_is_refused(tmp_path: Path) -> None:
    """The library panics over it in texts of other letters than ASCII's."""
    data = json.loads(byte_level_json([])) | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    word = data["added_tokens"][0] | {"id": 400, "content": "\n\n", "special": False}
    data["added_tokens"].append(word | {"normalized": True})
    with pytest.raises(
        CheckpointError, match=r"added token '\\n\\n' is to be found in normalized text, where nothing is left"
    ):
        load(tmp_path, {"tokenizer__json": json.dumps(data)})
    data["added_tokens"][-1]["normalized"] = False
    assert 400 in load(tmp_path, {"tokenizer__json": json.dumps(data)}).encode("é\n\né")


def test_padding_at_vocab_size(tmp_path: Path, vocabulary: dict[str, str | bytes]) -> None:
    """It starts, no text becomes it, and it stands for nothing."""
    for number, extra in enumerate(({"added_tokens__json": {"<pad>": 512}}, {
        "tokenizer_config__json": {"added_tokens_decoder": {"512": {"content": "[PAD]", "special": False}}},
    })):  # fmt: skip
        directory = tmp_path / str(number)
        directory.mkdir()
        tokenizer = load(directory, vocabulary, **extra)
        for text in ("<pad>", "[PAD]"):
            ids = tokenizer.encode(text, add_bos=False)
            assert 512 not in ids
            assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes(512) == b""


def test_tokens_that_are_there_already(tmp_path: Path, vocabulary: dict[str, str | bytes]) -> None:
    added = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = load(tmp_path, vocabulary, added_tokens__json=added)
    plain_directory = tmp_path / "plain"
    plain_directory.mkdir()
    plain = load(plain_directory, vocabulary)
    assert tokenizer.control_token_ids == plain.control_token_ids == {0, 1, 2}
    assert all(tokenizer.encode(text) == plain.encode(text) for text in TEXTS)


def test_a_token_in_the_place_of_a_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the token '<x>' is added at 5, which is '<0x02>'"):
        load(tmp_path, VOCABULARIES["tokenizer.model"], added_tokens__json={"<x>": 5})


def llama_3_json(texts: list[str]) -> tuple[str, int]:
    """As Llama 3's file: added tokens follow the vocabulary and do not stand in it. And the id of the first, BOS."""
    data = json.loads(byte_level_json([]))
    special = {token["content"] for token in data["added_tokens"]}
    ranked = [text for text in sorted(data["model"]["vocab"], key=data["model"]["vocab"].get) if text not in special]
    first = len(ranked)
    data["model"] |= {"vocab": {text: i for i, text in enumerate(ranked)}, "ignore_merges": True}
    names = ["<|begin_of_text|>", "<|end_of_text|>", *texts]
    data["added_tokens"] = [data["added_tokens"][0] | {"id": first + i, "content": t} for i, t in enumerate(names)]
    return json.dumps(data), first


@pytest.mark.parametrize("shape", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize(
    ("in_the_file", "beside", "offsets"),
    [
        (["<|im_start|>", "<|im_end|>"], ["<pad>"], [4]),
        (["<|im_start|>", "<|im_end|>"], ["<pad>"], [20]),
        ([], ["<|im_start|>", "<|im_end|>"], [2, 3]),
        (["<|im_start|>"], ["<|im_end|>", "<pad>"], [9, 6]),
    ],
    ids=["next", "after a gap", "all beside", "out of order"],
)
def test_added_tokens_outside_the_vocabulary_keep_their_ids(
    tmp_path: Path, shape: str, in_the_file: list[str], beside: list[str], offsets: list[int]
) -> None:
    """Llama 3's, and most fine-tunes': a file beside them that adds one more must not number the others anew."""
    text, first = llama_3_json(in_the_file)
    ids = {token: first + offset for token, offset in zip(beside, offsets, strict=True)}
    files: dict[str, Any] = {
        "added_tokens_decoder": {
            "tokenizer_config__json": {"added_tokens_decoder": {str(i): IM_END | {"content": t} for t, i in ids.items()}}
        },
        "added_tokens.json": {
            "added_tokens__json": ids, "tokenizer_config__json": {"additional_special_tokens": beside},
        },
    }[shape]  # fmt: skip
    path = (
        llama_directory(tmp_path, tokenizer__json=text, **{k: json.dumps(v) for k, v in files.items()}) / "config.json"
    )
    config = json.loads(path.read_text()) | {"bos_token_id": first, "eos_token_id": first + 1}
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    named = {t: first + i for i, t in enumerate(("<|begin_of_text|>", "<|end_of_text|>", *in_the_file))} | ids
    assert {t: tokenizer.control_token_id(t) for t in named} == named
    library = Library.from_str(text)
    library.encode_special_tokens = True
    for plain in [*TEXTS, *named]:
        assert tokenizer.encode(plain, add_bos=False) == library.encode(plain, add_special_tokens=False).ids, plain


@pytest.mark.parametrize("place", ["vocabulary", "added tokens"])
def test_an_id_that_no_vocabulary_has_is_refused(tmp_path: Path, place: str) -> None:
    """Before a list as long is made."""
    data = json.loads(tokenizer_json())
    data["model"]["vocab"]["far"] = 1_000_000_000
    if place == "added tokens":
        data["added_tokens"].append(data["added_tokens"][1] | {"id": 1_000_000_000, "content": "far"})
    with pytest.raises(CheckpointError, match=r"tokenizer.json: a token has the id 1000000000; the most is 2097151"):
        load(tmp_path, {"tokenizer__json": json.dumps(data)})


@pytest.mark.parametrize("lstrip", [False, True])
def test_a_word_that_is_looked_for_in_normalized_text(tmp_path: Path, lstrip: bool) -> None:
    """As tokenizer.add_tokens(["DOG"]) writes it: the space before it belongs to it."""
    data = json.loads(tokenizer_json())
    word = {"id": 500, "content": "DOG", "special": False, "normalized": True, "lstrip": lstrip}
    data["added_tokens"].append(data["added_tokens"][1] | word)
    text = json.dumps(data)
    tokenizer, library = load(tmp_path, {"tokenizer__json": text}), Library.from_str(text)
    for plain in ("the DOG DOGs", "a DOG", "DOG", "xDOG", "a  DOG DOG b"):
        ids = library.encode(plain, add_special_tokens=False).ids
        assert tokenizer.encode(plain, add_bos=False) == ids
        assert tokenizer.decode(ids) == library.decode(ids) == plain


def test_bos_of_the_tokenizers_files(tmp_path: Path, vocabulary: dict[str, str | bytes]) -> None:
    config = {
        "bos_token": "<|start|>",
        "add_bos_token": True,
        "added_tokens_decoder": {"500": IM_END | {"content": "<|start|>"}},
    }
    tokenizer = load(tmp_path, vocabulary, tokenizer_config__json=config)
    assert tokenizer.bos_token_id == 500
    # A tokenizer.json's own post_processor decides what texts begin with.
    assert tokenizer.encode("a")[0] == (1 if "tokenizer__json" in vocabulary else 500)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model", "gguf"])
def test_an_end_token_that_would_follow_texts_is_told(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        types = [p.type for p in pieces()]
        path = write_gguf(tmp_path / "x.gguf", [p.piece for p in pieces()], types, eos_token_id=2, add_eos_token=True)
        tokenizer = load_tokenizer(path)
    else:
        tokenizer = load(tmp_path, VOCABULARIES[kind], tokenizer_config__json={"add_eos_token": True})
    assert tokenizer.encode("hello")[-1] != 2
    told = [warning for warning in tokenizer.warnings if "add_eos_token is true; it is not used" in warning]
    assert len(told) == (kind != "tokenizer.json")  # transformers ignores it there too


def test_spaces_around_control_tokens_in_markup(tmp_path: Path) -> None:
    """Phi-3's tokens take the spaces after them along."""
    data = json.loads(tokenizer_json())
    data["added_tokens"].append(data["added_tokens"][1] | {"id": 500, "content": "<|user|>", "rstrip": True})
    data["added_tokens"].append(data["added_tokens"][1] | {"id": 501, "content": "<|end|>", "lstrip": True})
    text = json.dumps(data)
    library = Library.from_str(text)
    tokenizer = load_tokenizer(llama_directory(tmp_path, tokenizer__json=text))
    for markup in ("<|user|>\n a <|end|>\n b", "<|user|> <|end|>", "x <|end|><|user|>\n"):
        assert (
            tokenizer.encode_parts([Part(markup, is_markup=True)])
            == library.encode(markup, add_special_tokens=False).ids
        )


def test_parse_special(tmp_path: Path, vocabulary: dict[str, str | bytes]) -> None:
    tokenizer = load(tmp_path, vocabulary)
    assert tokenizer.encode("a</s>b", parse_special=True)[0] == 1
    assert tokenizer.encode("a</s>b", parse_special=True).count(2) == 1
    assert 2 not in tokenizer.encode("a</s>b")
    assert tokenizer.encode("<s>a", parse_special=True) == tokenizer.encode("a")
    assert tokenizer.spelt_bytes(2) == b"</s>"
    assert tokenizer.spelt_bytes(3 + 65) == b"A"


# ---- GGUF ----


def write_gguf(path: Path, tokens: list[str], types: list[int], *, model: str = "llama", **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1, "context_length": 8, "embedding_length": 8, "feed_forward_length": 8,
        "attention.head_count": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model == "llama":
        writer.add_token_scores([float(-i) for i in range(len(tokens))])
    for key, value in values.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_several_unknown_pieces(tmp_path: Path) -> None:
    """Phi-3's files call their control tokens unknown."""
    tokens = [p.piece for p in pieces()] + ["<|user|>", "<|end|>"]
    types = [p.type for p in pieces()] + [2, 2]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", tokens, types, bos_token_id=1, eos_token_id=501))
    assert tokenizer.control_token_ids == {0, 1, 2, 500, 501}
    assert tokenizer.eos_token_ids == (501,)
    ids = tokenizer.encode("<|user|>hi<|end|>", add_bos=False)
    assert tokenizer.decode(ids) == "<|user|>hi<|end|>"


def test_no_unknown_piece(tmp_path: Path) -> None:
    kept = [p for p in pieces() if p.piece != "<unk>"]
    path = write_gguf(
        tmp_path / "x.gguf", [p.piece for p in kept], [p.type for p in kept], bos_token_id=0, eos_token_id=1
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 499
    assert tokenizer.decode(tokenizer.encode("🙂 hello", add_bos=False)) == "🙂 hello"


def test_no_unknown_piece_and_no_bytes(tmp_path: Path) -> None:
    """There is no token to take for a character that the vocabulary lacks."""
    kept = [p for p in pieces() if p.piece != "<unk>" and not p.piece.startswith("<0x")]
    path = write_gguf(
        tmp_path / "x.gguf", [p.piece for p in kept], [p.type for p in kept], bos_token_id=0, eos_token_id=1
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("hello", add_bos=False)) == "hello"
    with pytest.raises(RequestError, match="vocabulary has no token for"):
        tokenizer.encode("🙂 hello")


def test_user_defined_control_tokens(tmp_path: Path) -> None:
    """Some converters call <|im_end|> an ordinary word; the file's chat template shows what it is."""
    tokens, types = [p.piece for p in pieces()] + ["<|im_end|>", "<|im_start|>"], [p.type for p in pieces()] + [4, 4]
    plain = load_tokenizer(write_gguf(tmp_path / "x.gguf", tokens, types, eos_token_id=2))
    assert 500 in plain.encode("<|im_end|>")
    template = "{{ '<|im_start|>' }}{{ '<|im_end|>' }}"
    tokenizer = load_tokenizer(write_gguf(tmp_path / "y.gguf", tokens, types, eos_token_id=2), markup=template)
    assert {500, 501} <= tokenizer.control_token_ids
    assert 500 not in tokenizer.encode("<|im_end|>")


# ---- Llama 3's vocabulary in three formats ----


def test_llama_3_in_gguf_and_metas_format(tmp_path: Path) -> None:
    """The same byte-level vocabulary as tokenizer.json, with `tokenizer.ggml.pre` llama-bpe, and as a tiktoken file."""
    library = Library.from_str(byte_level_json([]))
    data = json.loads(library.to_str())
    ids: dict[str, int] = data["model"]["vocab"]
    tokens = sorted(ids, key=lambda text: ids[text])
    types = [3 if text in ("<unk>", "<s>", "</s>") else 1 for text in tokens]
    merges = [" ".join(merge) for merge in data["model"]["merges"]]
    path = write_gguf(
        tmp_path / "x.gguf", tokens, types, model="gpt2", pre="llama-bpe", merges=merges, bos_token_id=1, eos_token_id=2
    )
    ours = load_tokenizer(path)
    assert ours.encode("a")[0] == 1  # as llama.cpp does for this rule when the file does not say
    for text in TEXTS:
        assert ours.encode(text, add_bos=False) == library.encode(text, add_special_tokens=False).ids, repr(text)

    directory = tmp_path / "Llama-3-8B-Instruct"
    directory.mkdir()
    ranked = [byte_level_bytes(text) for text in tokens[3:]]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranked))
    (directory / "tokenizer.model").write_bytes(lines)
    (directory / "consolidated.00.pth").write_bytes(b"")
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": -1, "use_scaled_rope": True, "rope_theta": 500000.0}
    (directory / "params.json").write_text(json.dumps(params))
    info = describe(directory)
    first = len(ranked)
    assert (info.chat_format, info.tokenizer_kind) == ("llama-3", "tiktoken")
    assert info.config.vocab_size == first + 256 == first + len(llama3_special_tokens())
    assert (info.config.max_position, info.config.rope_divisors != ()) == (131072, True)
    meta = load_tokenizer(directory)
    assert meta.encode("a")[0] == first == meta.control_token_id("<|begin_of_text|>")
    assert set(meta.eos_token_ids) == {first + 1, first + 8, first + 9}
    for text in TEXTS:
        assert [i + 3 for i in meta.encode(text, add_bos=False)] == ours.encode(text, add_bos=False), repr(text)


def test_a_broken_tiktoken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 2\n")
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    (tmp_path / "params.json").write_text('{"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 300}')
    with pytest.raises(CheckpointError, match="line 2 is no token with the rank 1"):
        describe(tmp_path)
