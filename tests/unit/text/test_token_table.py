"""The bytes of every token, for each kind of tokenizer: what constrained output allows is what the answer's text will be."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bench.support.small_tokenizer import sentencepiece_model
from model_parallel.checkpoint.detect import describe
from model_parallel.config import TokenTable
from model_parallel.engine.matching import GrammarCompiler, Matcher, allowed_bits
from serving.gateway.core.constraints import Constraint, JsonSchema, OneOf, Regex, grammar_of
from serving.text.detokenizer import IncrementalDetokenizer
from serving.text.token_table import token_table
from serving.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.llama_tokenizers import (
    TEXTS,
    byte_level_json,
    llama_directory,
    tiktoken_directory,
    tokenizer_json,
    write_gguf,
)

KINDS = ["gguf-byte-level", "sentencepiece", "tokenizer.json", "byte-level.json", "gguf-pieces", "tiktoken"]
CHOICES = ["Paris", " leading", "", "  two", "é日🙂", "</s>", 'quo"te\\', "a\nb\tc\x00"]


class Served(NamedTuple):
    tokenizer: Tokenizer
    table: TokenTable
    compiler: GrammarCompiler


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    new = tmp_path_factory.mktemp("tokenizer")
    source = {
        "gguf-byte-level": lambda: smollm2_path,
        "sentencepiece": lambda: llama_directory(new, tokenizer__model=sentencepiece_model()),
        "tokenizer.json": lambda: llama_directory(new, tokenizer__json=tokenizer_json()),
        "byte-level.json": lambda: llama_directory(new, tokenizer__json=byte_level_json([])),
        "gguf-pieces": lambda: write_gguf(new / "llama.gguf", "llama"),
        "tiktoken": lambda: tiktoken_directory(new),
    }[request.param]()
    tokenizer = load_tokenizer(source)
    table = token_table(tokenizer, describe(source).config.vocab_size, tokenizer.eos_token_ids)
    return Served(tokenizer, table, GrammarCompiler(table))


def follow(served: Served, constraint: Constraint, token_ids: list[int], *, strips_space: bool = False) -> Matcher:
    grammar = grammar_of(constraint, strips_space=strips_space)
    matcher = Matcher(served.compiler.compile(grammar.text), spares_end=False)
    for token_id in token_ids:
        matcher.consume(token_id)
    return matcher


def test_the_bytes_are_those_that_the_tokenizer_decodes(served: Served) -> None:
    tokens = served.table.tokens()
    for text in TEXTS:
        token_ids = served.tokenizer.encode(text, add_bos=False)
        data = b"".join(tokens[token_id] for token_id in token_ids)
        decoded = served.tokenizer.decode(token_ids)
        assert data.removeprefix(b" " * served.tokenizer.strips_leading_space).decode() == decoded, repr(text)
    assert all(tokens[token_id] == b"" for token_id in served.tokenizer.control_token_ids if token_id < len(tokens))
    assert served.table.eos_token_ids == served.tokenizer.eos_token_ids != ()


def test_the_tokenizers_own_tokens_of_a_text_are_allowed(served: Served) -> None:
    """And complete it: nothing else can follow the only text."""
    for text in [text for text in TEXTS if text]:
        token_ids = served.tokenizer.encode(text, add_bos=False)
        decoded = served.tokenizer.decode(token_ids)  # some know no difference between a space and its sign
        matcher = follow(
            served,
            OneOf(field="choice", texts=[decoded]),
            token_ids,
            strips_space=served.tokenizer.strips_leading_space,
        )
        assert matcher.is_complete and not matcher.has_failed, repr(text)


def test_json_texts_as_the_tokenizer_cuts_them_are_allowed(served: Served) -> None:
    value = {"name": 'Zoë "Z" \\ 日本 🙂', "n": [1, -2.5e3, None], "deep": {"a": {"b": []}}}
    for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, ensure_ascii=False, indent=2)):
        token_ids = served.tokenizer.encode(text, add_bos=False)
        strips_space = served.tokenizer.strips_leading_space
        assert follow(served, JsonSchema(field="x", schema={}), token_ids, strips_space=strips_space).is_complete, text


@pytest.mark.parametrize("strips_space", [False, True])
def test_drawn_texts_are_the_texts_that_were_asked_for(served: Served, strips_space: bool) -> None:
    """Of an answer to a conversation, a space that the first token brings is not part of the text."""
    strips_space = strips_space and served.tokenizer.strips_leading_space
    draw = np.random.default_rng(3)
    seen = set()
    for constraint in (OneOf(field="choice", texts=CHOICES), Regex(field="regex", pattern=r" ?[a-z]{2}/\d")):
        grammar = served.compiler.compile(grammar_of(constraint, strips_space=strips_space).text)
        for _ in range(12):
            matcher = Matcher(grammar, spares_end=False)
            token_ids: list[int] = []
            while not matcher.is_complete:
                mask_W = np.zeros(matcher.num_words, dtype=np.int32)
                assert matcher.fill(mask_W)
                allowed = np.flatnonzero(allowed_bits(mask_W[None], range(len(served.table.lengths)))[0])
                token_ids.append(int(draw.choice(allowed)))
                matcher.consume(token_ids[-1])
            detokenizer = IncrementalDetokenizer(served.tokenizer, continues_text=not strips_space)
            ended = [token_id for token_id in token_ids if token_id not in served.table.eos_token_ids]
            text = detokenizer.push(ended) + detokenizer.flush()
            if isinstance(constraint, OneOf):
                assert text in CHOICES
                seen.add(text)
            else:
                assert len(text.strip(" ")) == 4 and text.strip(" ")[2] == "/" and len(text) in (4, 5)
    assert len(seen) > 3
