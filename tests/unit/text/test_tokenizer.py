"""Token ids, compared with transformers and sentencepiece; and text never becomes a control token."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers, processors

from bench.support.small_tokenizer import CORPUS, sentencepiece_model
from model_parallel.errors import CheckpointError, ConfigError, RequestError
from serving.text.tokenizer import Part, Tokenizer, load_tokenizer
from tests.support.converted import converted
from tests.support.llama_tokenizers import (
    CONTROL_TEXTS,
    TEXTS,
    byte_level_json,
    llama_directory,
    tokenizer_json,
    tokenizer_json_with,
    write_gguf,
)

ROOT = Path(__file__).parents[3]
KINDS = ["smollm2", "sentencepiece", "tokenizer.json", "gguf-llama"]


@pytest.fixture(scope="module")
def tokenizers_by_kind(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    new = tmp_path_factory.mktemp
    return {
        "smollm2": load_tokenizer(smollm2_path),
        "sentencepiece": load_tokenizer(llama_directory(new("spm"), tokenizer__model=sentencepiece_model())),
        "tokenizer.json": load_tokenizer(llama_directory(new("json"), tokenizer__json=tokenizer_json())),
        "gguf-llama": load_tokenizer(write_gguf(new("gguf") / "llama.gguf", "llama")),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tokenizers_by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_kind[request.param]


def test_same_ids_as_transformers_on_smollm2(smollm2_path: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    """transformers ignores `tokenizer.ggml.pre`: it is given the pre-tokenizer of SmolLM2's own tokenizer.json."""
    theirs = transformers.AutoTokenizer.from_pretrained(converted(smollm2_path))
    ours = tokenizers_by_kind["smollm2"]
    for text in TEXTS:
        if not any(character.isnumeric() for character in text):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [*TEXTS, "1234 5 67", "a1b22", "½ ² Ⅷ ٣٤", "3.14159, 2,000", " 12"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json", "gguf-llama"])
def test_same_ids_as_sentencepiece(kind: str, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ours = tokenizers_by_kind[kind]
    for text in [*TEXTS, *CONTROL_TEXTS]:
        if kind == "tokenizer.json" and "▁" in text:
            continue  # the published form cannot tell the character from a space
        ids = theirs.encode(text)
        assert ours.encode(text, add_bos=False) == ids, repr(text)
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == text.replace("▁", " ")


def test_same_ids_as_transformers_on_llama_tokenizer(tokenizers_by_kind: dict[str, Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizers_by_kind["tokenizer.json"].encode(text, add_bos=False) == ids, repr(text)
        if "▁" not in text:
            assert tokenizers_by_kind["sentencepiece"].encode(text, add_bos=False) == ids, repr(text)
            assert tokenizers_by_kind["sentencepiece"].decode(ids) == theirs.decode(ids) == text


@pytest.mark.parametrize("text", CONTROL_TEXTS)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.control_token_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


# SmolLM2 has no token for some control characters, nor for the bytes that begin unassigned planes: they are dropped.
KNOWN = st.text(
    st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d")
)


@given(text=KNOWN | st.lists(st.sampled_from([*CONTROL_TEXTS, *TEXTS])).map("".join))
def test_any_text_comes_back_without_control_tokens(tokenizers_by_kind: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in tokenizers_by_kind.values():
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.control_token_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == (text.replace("▁", " ") if tokenizer.strips_leading_space else text)


def test_a_lone_surrogate_is_refused(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers_by_kind.values():
        with pytest.raises(RequestError, match="surrogate at character 2"):
            tokenizer.encode("ab\ud800")


def test_byte_tokens_do_not_come_from_their_names(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    for kind in KINDS[1:]:
        tokenizer = tokenizers_by_kind[kind]
        line_break = 3 + 0x0A
        assert tokenizer.token_bytes(line_break) == b"\n"
        assert line_break not in tokenizer.encode("<0x0A>")
        assert line_break in tokenizer.encode("\n")


def test_characters_that_a_vocabulary_lacks(tmp_path: Path) -> None:
    """Without byte fallback they become the unknown token, as in transformers; its text does not."""
    data = json.loads(tokenizer_json())
    data["model"]["byte_fallback"] = False
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=300, minloglevel=2
    )
    kinds: list[dict[str, str | bytes]] = [
        {"tokenizer__json": json.dumps(data)},
        {"tokenizer__model": model.getvalue()},
    ]
    for number, files in enumerate(kinds):
        directory = tmp_path / str(number)
        directory.mkdir()
        tokenizer = load_tokenizer(llama_directory(directory, **files))
        ids = tokenizer.encode("🙂 hello\n", add_bos=False)
        assert 0 in ids
        if number == 0:  # transformers reads no normalizer of a tokenizer.model
            assert ids == transformers.AutoTokenizer.from_pretrained(directory).encode(
                "🙂 hello\n", add_special_tokens=False
            )
        assert 0 not in tokenizer.encode("unk", add_bos=False)
        assert tokenizer.token_bytes(0) == b""
        assert tokenizer.control_token_ids == {0, 1, 2}


def test_smollm2_special_tokens(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["smollm2"]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (49152, 1, (2,))
    assert tokenizer.control_token_ids == frozenset(range(17))
    assert tokenizer.control_token_id("<|im_end|>") == 2
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)  # its texts do not begin with BOS
    with pytest.raises(ConfigError, match=r"no control token '<\|eot_id\|>'"):
        tokenizer.control_token_id("<|eot_id|>")


def test_tokens_without_text(tokenizer: Tokenizer) -> None:
    """Control tokens, and ids that only the logits have, stand for nothing."""
    for token_id in [*tokenizer.control_token_ids, tokenizer.vocab_size, tokenizer.vocab_size + 100]:
        assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([*tokenizer.control_token_ids]) == ""


def test_an_end_token_is_never_matched_in_text(tmp_path: Path) -> None:
    """Even when a tokenizer.json calls it an ordinary added token."""
    data = json.loads(tokenizer_json())
    data["added_tokens"][2]["special"] = False
    data["added_tokens"].append(data["added_tokens"][1] | {"id": 500, "content": "<|mark|>", "special": True})
    data["added_tokens"].append(data["added_tokens"][1] | {"id": 501, "content": "<|word|>", "special": False})
    tokenizer = load_tokenizer(llama_directory(tmp_path, tokenizer__json=json.dumps(data)))
    assert tokenizer.control_token_ids == {0, 1, 2, 500}
    assert {2, 500}.isdisjoint(tokenizer.encode("</s> <|mark|>", add_bos=False))
    assert 501 in tokenizer.encode("<|word|>")
    assert tokenizer.token_bytes(501) == b"<|word|>"
    assert tokenizer.decode(tokenizer.encode("</s> <|mark|><|word|>")).replace(" ", "") == "</s><|mark|><|word|>"


def test_tokens_beyond_the_logits(tmp_path: Path) -> None:
    """A padding token that the model does not have is never used, whatever its file calls it; a token of the vocabulary itself
    would be, and is refused."""
    data = json.loads(tokenizer_json())
    data["model"]["vocab"].update({f"filler{i}": i for i in range(500, 512)})
    extra = data["added_tokens"][1] | {"id": 512, "content": "<pad>", "special": True}
    data["added_tokens"].append(extra)
    for special in (True, False):
        extra["special"] = special
        tokenizer = load_tokenizer(llama_directory(tmp_path, tokenizer__json=json.dumps(data)))
        assert 512 not in tokenizer.encode("<pad>")
        assert tokenizer.token_bytes(512) == b""
        with pytest.raises(ConfigError, match="<pad>"):
            tokenizer.control_token_id("<pad>")
    data["added_tokens"].pop()
    data["model"]["vocab"]["filler512"] = 512
    with pytest.raises(CheckpointError, match="has the token 512, and the model's vocabulary 512"):
        load_tokenizer(llama_directory(tmp_path, tokenizer__json=json.dumps(data)))


def test_guard_against_a_tokenizer_that_would(tmp_path: Path) -> None:
    """A vocabulary whose merges spell the end token: the text is refused, never passed on."""
    data = json.loads(tokenizer_json())
    data["added_tokens"] = []
    vocab = data["model"]["vocab"]
    vocab["</"], vocab["s>"] = 500, 501
    data["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], *data["model"]["merges"]]
    tokenizer = load_tokenizer(llama_directory(tmp_path, tokenizer__json=json.dumps(data)))
    assert tokenizer.encode("hello")
    with pytest.raises(RequestError, match="control token"):
        tokenizer.encode("</s>")


@pytest.mark.parametrize("stated", [True, False])
def test_bos_as_the_checkpoint_says(tmp_path: Path, stated: bool) -> None:
    config = json.dumps({"add_bos_token": stated})
    directory = llama_directory(tmp_path, tokenizer_config__json=config, tokenizer__model=sentencepiece_model())
    assert (load_tokenizer(directory).encode("a")[0] == 1) == stated


@pytest.mark.parametrize("class_name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("bos", ["<s>", "<unk>"])
@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>", ""])
def test_what_a_text_begins_with_is_what_transformers_writes(
    tmp_path: Path, class_name: str, stated: bool | None, bos: str, template: str
) -> None:
    """Where there is a tokenizer.json, its post_processor decides, whatever add_bos_token says; what differs is told."""
    library = Library.from_str(tokenizer_json())
    ids = [("<s>", 1), ("</s>", 2)]
    library.post_processor = processors.TemplateProcessing(single=template or "$A", special_tokens=ids)
    data = json.loads(library.to_str())
    if not template:
        data["post_processor"] = None
    config = {"tokenizer_class": class_name, "add_bos_token": stated, "bos_token": bos, "eos_token": "</s>"}
    config = {key: value for key, value in config.items() if value is not None}
    llama_directory(tmp_path, tokenizer__json=json.dumps(data), tokenizer_config__json=json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).encode("hello")
    ours = tokenizer.encode("hello")
    ends = template.endswith("</s>")
    assert ours == (theirs[:-1] if ends else theirs)
    begins = "<s>" in template
    is_odd = stated not in (None, begins) or (begins and bos != "<s>")
    assert len(tokenizer.warnings) == is_odd + ends


@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("scheme", ["", "always", "first"])
def test_the_space_after_a_control_token_is_that_of_transformers(
    tmp_path: Path, class_name: str | None, legacy: bool | None, scheme: str
) -> None:
    """`legacy` counts with Llama's class alone, where none means false."""
    config = {"tokenizer_class": class_name, "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
    config = {key: value for key, value in config.items() if value is not None}
    text = tokenizer_json_with(["<|im_start|>"], scheme=scheme)
    llama_directory(tmp_path, tokenizer__json=text, tokenizer_config__json=json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).encode("<|im_start|>user", add_special_tokens=False)
    tokenizer = load_tokenizer(tmp_path, markup="<|im_start|>")
    assert tokenizer.encode_parts([Part("<|im_start|>user", is_markup=True)]) == theirs


@pytest.mark.parametrize("text", [tokenizer_json(), byte_level_json([])])
def test_dropout_of_merges_is_not_used_and_told(tmp_path: Path, text: str) -> None:
    plain = load_tokenizer(llama_directory(tmp_path, tokenizer__json=text))
    data = json.loads(text)
    data["model"]["dropout"] = 0.5
    tokenizer = load_tokenizer(llama_directory(tmp_path, tokenizer__json=json.dumps(data)))
    for sample in TEXTS:
        assert tokenizer.encode(sample) == plain.encode(sample)
    assert plain.warnings == ()
    (warning,) = tokenizer.warnings
    assert warning.startswith(f"{tmp_path}/tokenizer.json: model.dropout is 0.5")


def without_prefix_steps() -> str:
    """As converters write a sentencepiece model without a dummy prefix."""
    data = json.loads(tokenizer_json())
    data["normalizer"] = data["normalizer"]["normalizers"][1]
    data["decoder"]["decoders"].pop()
    return json.dumps(data)


def one_byte_level_step(prefix: bool) -> str:
    data = json.loads(byte_level_json([]))
    data["pre_tokenizer"] = data["pre_tokenizer"]["pretokenizers"][1] | {"add_prefix_space": prefix, "use_regex": True}
    return json.dumps(data)


PREFIX_FILES = {
    "prepend": tokenizer_json(),
    "none": without_prefix_steps(),
    **{scheme: tokenizer_json_with([], scheme=scheme) for scheme in ("always", "first", "never")},
    "bytes": one_byte_level_step(False),
    "bytes with a space": one_byte_level_step(True),
    "bytes after a split": byte_level_json([]),
}
BYTE_LEVEL_CLASSES = ("GPT2TokenizerFast", "GPTNeoXTokenizer")


@pytest.mark.parametrize(
    "class_name",
    [
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "CodeLlamaTokenizer",
        "PreTrainedTokenizerFast",
        None,
        *BYTE_LEVEL_CLASSES,
    ],
)
@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("file", PREFIX_FILES)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_space_before_a_text_is_that_of_transformers(
    tmp_path: Path, class_name: str | None, stated: bool | None, file: str, model_type: str
) -> None:
    """Some classes make it anew from add_prefix_space, whatever tokenizer.json says; where they cut text by another rule than
    the file's besides, that is told."""
    config = {"tokenizer_class": class_name, "add_prefix_space": stated, "bos_token": "<s>", "eos_token": "</s>"}
    config = {key: value for key, value in config.items() if value is not None} | {"unk_token": "<unk>"}
    llama_directory(tmp_path, tokenizer__json=PREFIX_FILES[file], tokenizer_config__json=json.dumps(config))
    model = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model_type, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(model))
    tokenizer = load_tokenizer(tmp_path)
    is_bytes = file.startswith("bytes")
    counts = model_type == "llama"
    other_kind = (class_name in BYTE_LEVEL_CLASSES and not is_bytes) or (
        class_name == "CodeLlamaTokenizer" and is_bytes
    )
    other_rule = class_name in BYTE_LEVEL_CLASSES and file == "bytes after a split"
    said = [
        warning
        for warning in tokenizer.warnings
        if f"the rule of the class {str(class_name).removesuffix('Fast')}," in warning
    ]
    assert len(said) == len(tokenizer.warnings) == (counts and (other_kind or other_rule))
    if counts and other_kind:
        return
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "a", "The capital of France", "It's\nwe'll", "x" * 30, "🙂", "日本語", "\n a"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_bos=False) == ids, repr(text)
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("stated", [{}, {"add_prefix_space": True}, {"add_prefix_space": False}])
def test_the_space_before_a_text_of_a_sentencepiece_model(tmp_path: Path, stated: dict[str, bool]) -> None:
    config = json.dumps({"tokenizer_class": "LlamaTokenizer"} | stated)
    llama_directory(tmp_path, tokenizer__model=sentencepiece_model(), tokenizer_config__json=config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).encode("The capital", add_special_tokens=False)
    assert load_tokenizer(tmp_path).encode("The capital", add_bos=False) == theirs


def test_threads(tokenizer: Tokenizer) -> None:
    texts = TEXTS * 5
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer"),
        ({"tokenizer__json": "{"}, "tokenizer.json"),
        ({"tokenizer__json": "{}"}, "not a valid tokenizer"),
        ({"tokenizer__json": '{"added_tokens": [{"id": 3}]}'}, "not a valid tokenizer"),
        ({"tokenizer__json": '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'}, "ByteLevel or ByteFallback"),
        ({"tokenizer__model": b""}, "not a sentencepiece model"),
        ({"tokenizer__model": b"IQ== 0\nIg== 1\n"}, "not a sentencepiece model"),
    ],
)
def test_broken_tokenizers(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(llama_directory(tmp_path, **files))


@pytest.mark.parametrize(
    ("model", "message"),
    [("plamo2", "tokenizer.ggml.model is 'plamo2'"), ("gpt2", "tokenizer.ggml.pre is None; supported: gpt-2, smollm")],
)
def test_unknown_gguf_tokenizers_are_refused_by_name(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write_gguf(tmp_path / "x.gguf", model))


def test_imports_stay_light() -> None:
    script = (
        "import sys, serving.text.chat, serving.text.detokenizer, serving.models.fetch; "
        "print([m for m in ('torch', 'ray', 'transformers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
