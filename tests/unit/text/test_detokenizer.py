"""However tokens and text are cut into pieces, the result is that of the whole."""

from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.support.small_tokenizer import sentencepiece_model
from serving.text.detokenizer import IncrementalDetokenizer, StopStrings
from serving.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.llama_tokenizers import TEXTS, llama_directory, tokenizer_json

T = TypeVar("T", str, list[int])


@pytest.fixture(scope="module")
def tokenizers(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    new = tmp_path_factory.mktemp
    return [
        load_tokenizer(smollm2_path),
        load_tokenizer(llama_directory(new("spm"), tokenizer__model=sentencepiece_model())),
        load_tokenizer(llama_directory(new("json"), tokenizer__json=tokenizer_json())),
    ]


def cut(whole: T, cuts: list[int]) -> list[T]:
    bounds = [0, *sorted(min(c, len(whole)) for c in cuts), len(whole)]
    return [whole[a:b] for a, b in pairwise(bounds)]


def detokenize(tokenizer: Tokenizer, chunks: list[list[int]], *, continues_text: bool = False) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, continues_text=continues_text)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


CUTS = st.lists(st.integers(0, 60))


@given(ids=st.lists(st.integers(0, 600)), cuts=CUTS)
def test_any_chunks_of_any_tokens(tokenizers: list[Tokenizer], ids: list[int], cuts: list[int]) -> None:
    """Also of tokens that no text gives: lone bytes, control tokens, ids beyond the vocabulary."""
    for tokenizer in tokenizers:
        assert "".join(detokenize(tokenizer, cut(ids, cuts))) == tokenizer.decode(ids)


@given(text=st.text(st.sampled_from("a é日🙂\n👩‍ ")) | st.sampled_from(TEXTS), cuts=CUTS)
@example("🙂🙂", [1, 2, 3, 4, 5, 6, 7])
def test_characters_are_never_split(tokenizers: list[Tokenizer], text: str, cuts: list[int]) -> None:
    for tokenizer in tokenizers:
        pieces = detokenize(tokenizer, cut(tokenizer.encode(text), cuts))
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
        assert pieces[-1] == ""
        assert text.count("\ufffd") == "".join(pieces).count("\ufffd")


def test_an_unfinished_character_at_the_end(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode("a🙂", add_bos=False)[:-1]
        pieces = detokenize(tokenizer, [ids])
        assert pieces == ["a", "\ufffd"]
        assert "".join(pieces) == tokenizer.decode(ids)


def test_leading_space(tokenizers: list[Tokenizer]) -> None:
    """Of an answer that stands alone it is no text; of one that goes on after other text it is."""
    llama = tokenizers[1]
    ids = llama.encode("the dog", add_bos=False)
    assert "".join(detokenize(llama, [[], [1], ids[:1], ids[1:]])) == "the dog"
    assert "".join(detokenize(llama, [ids], continues_text=True)) == " the dog"
    ids = tokenizers[0].encode(" Paris")
    assert "".join(detokenize(tokenizers[0], [ids])) == " Paris"


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character: the first stop that is complete ends the text; the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text(st.sampled_from("abc")),
    stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=4),
    cuts=CUTS,
)
@example("aabaac", ["aabaad", "aac"], [5])
@example("abcd", ["abcd", "bc"], [1, 2, 3])
def test_stop_strings_across_any_chunks(text: str, stops: list[str], cuts: list[int]) -> None:
    stop_strings = StopStrings(stops)
    shown = ""
    seen = ""
    for chunk in cut(text, cuts):
        seen += chunk
        shown += stop_strings.push(chunk)
        final, matched = reference(seen, stops)
        assert stop_strings.matched == matched  # known as soon as it can be known
        assert final.startswith(shown)  # nothing shown is ever taken back
        held = len(final) - len(shown)
        assert matched is None or held == 0
        assert held < max(map(len, stops), default=1)
    assert (shown + stop_strings.flush(), stop_strings.matched) == reference(text, stops)
    assert stop_strings.push("more") == ("" if stop_strings.matched else "more")


def test_only_what_may_begin_a_stop_string_is_held() -> None:
    stop_strings = StopStrings(["\nUser:", "###"])
    assert stop_strings.push("Hello\n") == "Hello"
    assert stop_strings.push("Us") == ""
    assert stop_strings.push("age #") == "\nUsage "
    assert stop_strings.push("##rest") == ""
    assert stop_strings.matched == "###"
    assert stop_strings.flush() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).push("text") == "text"
