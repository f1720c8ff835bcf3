"""Which tokens a grammar allows, with vocabularies of bytes and words."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from model_parallel.config import TokenTable
from model_parallel.engine import matching
from model_parallel.engine.matching import Grammar, GrammarCompiler, GrammarError, Matcher, allowed_bits

EOS, OTHER_EOS, WORDS = 256, 257, ["yes", "no", "maybe", '{"', '":', " {", "é"]
TOKENS = [*(bytes([byte]) for byte in range(256)), b"", b"", *(word.encode() for word in WORDS), b""]
TABLE = TokenTable.of(TOKENS, (EOS, OTHER_EOS))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TABLE)


def matcher(compiler: GrammarCompiler, text: str, *, spares_end: bool = False) -> Matcher:
    return Matcher(compiler.compile(text), spares_end=spares_end)


def allowed(state: Matcher) -> set[int]:
    mask_W = np.zeros(state.num_words, dtype=np.int32)
    state.fill(mask_W)
    return set(np.flatnonzero(allowed_bits(mask_W[None], range(len(TOKENS)))[0]).tolist())


def texts(token_ids: set[int]) -> set[str]:
    return {TOKENS[token_id].decode(errors="replace") for token_id in token_ids}


def random_text(state: Matcher, seed: int, most: int = 400) -> bytes | None:
    """What one gets by drawing among the allowed tokens; None where it is not complete after so many."""
    draw = np.random.default_rng(seed)
    text = b""
    for _ in range(most):
        token_ids = sorted(allowed(state))
        token_id = int(draw.choice(token_ids))
        if token_id in (EOS, OTHER_EOS):
            return text
        text += TOKENS[token_id]
        state.consume(token_id)
        if state.is_complete:
            return text
    return None


def test_a_table_gives_back_its_tokens() -> None:
    assert TABLE.tokens() == TOKENS


def test_every_way_of_cutting_a_text_is_allowed(compiler: GrammarCompiler) -> None:
    state = matcher(compiler, 'start: "yes" | "no"')
    assert texts(allowed(state)) == {"y", "yes", "n", "no"}
    state.consume(ord("y"))
    assert texts(allowed(state)) == {"e"}
    state.consume(ord("e"))
    assert not state.is_complete
    state.consume(ord("s"))
    assert state.is_complete and not state.has_failed


def test_end_tokens_are_allowed_only_where_the_text_may_end(compiler: GrammarCompiler) -> None:
    state = matcher(compiler, "start: /a[0-9]*/")
    assert allowed(state) == {ord("a")}
    state.consume(ord("a"))
    assert {EOS, OTHER_EOS} <= allowed(state)
    state.consume(OTHER_EOS)
    assert state.is_complete


def test_a_sequence_that_ignores_ends_draws_one_only_where_nothing_else_can_be(compiler: GrammarCompiler) -> None:
    state = matcher(compiler, "start: /a[0-9]{0,2}/", spares_end=True)
    for token in "a12":
        assert not {EOS, OTHER_EOS} & allowed(state)
        state.consume(ord(token))
    assert state.is_complete


def test_control_tokens_are_never_allowed(compiler: GrammarCompiler) -> None:
    state = matcher(compiler, "start: /(?s:.*)/")
    assert len(TOKENS) - 1 not in allowed(state)


def test_characters_may_be_spread_over_tokens(compiler: GrammarCompiler) -> None:
    state = matcher(compiler, 'start: "é"')
    first, second = "é".encode()
    assert allowed(state) == {first, TOKENS.index("é".encode())}
    state.consume(first)
    assert allowed(state) == {second}


@pytest.mark.parametrize("seed", range(5))
def test_texts_of_a_schema_are_valid_under_it(compiler: GrammarCompiler, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yes"]}, "c": {"type": "array", "maxItems": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    text = random_text(matcher(compiler, "start: %json " + json.dumps(schema)), seed)
    if text is not None:
        found = json.loads(text)
        assert isinstance(found["a"], int) and found["b"] in ("x", "yes")


@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}x?", r"(é|yes)+!", r"\d{4}-\d\d", r"[^ab]{3}", r"(a|b)*c"])
def test_texts_of_a_regular_expression_match_it(compiler: GrammarCompiler, pattern: str) -> None:
    found = [random_text(matcher(compiler, f"start: /{pattern}/"), seed, most=60) for seed in range(5)]
    assert any(found)
    assert all(text is None or re.fullmatch(pattern, text.decode()) for text in found)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no start rule found"),
        ("start: other", 'unknown name: "other"'),
        ('start: "a\n', "1(10): lexer error"),
        ('start: %json {"type": "objekt"}', "Invalid type: objekt"),
        ("start: /(?=a)b/", "look-around"),
        ('start: %json {"$ref": "#"}', "no text at all"),
        ("start: <|im_end|>", "<|im_end|> is a special token"),
        ("start: <[258]>", "<[258]> is a special token"),
        ("start: <[^1-100]>", "<[^1-100]> is a special token"),
        ("start: <[*]> /a/", "<[*]> is a special token"),
        ("start: /<a>/ <|b|>", "<|b|> is a special token"),
        ('start: "<a>\\"<b>" x // <c>\nx: /<d>[>]/ <e>', "<e> is a special token"),
        ("start: \x00", "1(8): lexer error"),
    ],
)
def test_a_wrong_grammar_is_told_apart(compiler: GrammarCompiler, text: str, wrong: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(wrong)) as error:
        compiler.compile(text)
    assert "backtrace" not in str(error.value) and "no_forcing" not in str(error.value).splitlines()[0]


def test_a_token_that_is_not_allowed_fails_the_sequence_alone(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile('start: "yes"')
    wrong, right = Matcher(grammar, spares_end=False), Matcher(grammar, spares_end=False)
    wrong.consume(ord("n"))
    assert wrong.has_failed and not wrong.is_complete
    wrong.consume(ord("y"))
    assert wrong.has_failed
    right.consume(TOKENS.index(b"yes"))
    assert right.is_complete


def test_what_others_have_used_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library shares the states of a grammar's lexer among its sequences, and their limit too."""
    monkeypatch.setattr(matching, "MAX_LEXER_STATES", 300)
    compiler = GrammarCompiler(TABLE)
    text = "start: /(a|b)*a(a|b){14}/"  # 2^14 states, of which a text meets a few dozen
    renewed: list[str] = []
    told: list[bool] = []
    compile_anew = compiler.new_matcher

    def new_matcher(text: str) -> LLMatcher:
        renewed.append(text)
        told.append(compiler.is_renewing)  # so that a rank that does this in a step is not taken to hang
        return compile_anew(text)

    monkeypatch.setattr(compiler, "new_matcher", new_matcher)
    alone = [random_text(Matcher(Grammar(compiler, text), spares_end=False), seed, most=40) for seed in range(20)]
    assert len(renewed) == 20
    grammar = Grammar(compiler, text)
    together = [random_text(Matcher(grammar, spares_end=False), seed, most=40) for seed in range(20)]
    assert together == alone
    assert len(renewed) > 21, "the limit was never met, so this test tells nothing"
    assert told == [False] * 21 + [True] * (len(renewed) - 21) and not compiler.is_renewing


def test_tokens_can_be_taken_back(compiler: GrammarCompiler) -> None:
    state = matcher(compiler, 'start: "yes" | "maybe not"')
    before = allowed(state)
    for token in b"maybe not":
        state.consume(token)
    assert state.is_complete
    state.rollback(9)
    assert allowed(state) == before and not state.is_complete
    state.consume(TOKENS.index(b"yes"))
    assert state.is_complete


def test_a_model_without_end_tokens_ends_where_nothing_can_follow() -> None:
    compiler = GrammarCompiler(TokenTable.of(TOKENS[:256], ()))
    state = matcher(compiler, 'start: "a"')
    mask_W = np.zeros(state.num_words, dtype=np.int32)
    assert state.fill(mask_W)
    assert np.flatnonzero(allowed_bits(mask_W[None], range(256))[0]).tolist() == [ord("a")]
    state.consume(ord("a"))
    assert state.is_complete


@given(st.integers(0, 90), st.integers(1, 90))
def test_a_part_of_a_mask_begins_and_ends_anywhere(start: int, num_tokens: int) -> None:
    bits = np.random.default_rng(start).integers(0, 2, (2, 192), dtype=np.uint8)
    mask_RW = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    part = allowed_bits(mask_RW, range(start, start + num_tokens))
    assert part.dtype == np.bool_ and (part == bits[:, start : start + num_tokens]).all()


def test_a_matcher_ahead_is_as_one_that_has_come_so_far_and_leaves_the_first_as_it_is(
    compiler: GrammarCompiler,
) -> None:
    first = matcher(compiler, 'start: "ab" ("c" | "d")')
    first.consume(ord("a"))
    second = first.ahead(ord("b"))
    assert (allowed(first), allowed(second)) == ({ord("b")}, {ord("c"), ord("d")})
    third, wrong = second.ahead(ord("d")), second.ahead(ord("x"))
    assert third.is_complete and not third.is_open
    assert wrong.has_failed and not wrong.is_open and not wrong.is_complete
    assert wrong.ahead(ord("c")).has_failed and third.ahead(ord("c")).is_complete
    assert first.is_open and second.is_open and allowed(second) == {ord("c"), ord("d")}
    first.consume(ord("b"))
    assert allowed(first) == allowed(second)
