"""Constrained output: which tokens may come next. The only module that knows llguidance.

A grammar is a text as llguidance reads it: its variant of Lark, with JSON schemas written as `%json {…}`. It says which bytes the
output may be. Every token whose bytes can go on with what is there is allowed, however else the same text could be cut into
tokens; an end token is allowed where the output may end. Control tokens have no bytes, so they never are.

Shape suffixes: W words of a mask, 32 tokens each
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model_parallel.config import TokenTable

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

MAX_LEXER_STATES = 50_000
"""Of one grammar, shared by all sequences that follow it; one or two kB each."""
MAX_GRAMMAR_SIZE = 200_000
"""Symbols."""
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""No token is forced on the model because a tokenizer would cut the text that way. Stands last, where it wins and leaves the line
numbers of errors as they are."""


_WORD_SLICES = ["[A-Za-z ]{1,16}", "[a-z]{1,16}"]
"""Parts of the vocabulary, beside those that the library has for JSON, which are allowed as a whole where a grammar allows all
texts of their form. Otherwise token after token is tried: a mask for lines of text took 0.8 ms, and takes 0.1."""


_ALLOWS_NOTHING = "NoExtension"
"""How the library's error begins where nothing can follow."""
_QUOTED_OR_SPECIAL = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|(<[^<>\s]+>)')
"""In a grammar, a text, a comment, a regular expression, or (the group) the name of a special token."""


class GrammarError(ValueError):
    """A grammar that cannot be used. The message is the library's, without what it adds for its developers."""


class _Tokens:
    """A vocabulary as the library wants it."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: list[bytes], eos_token_id: int) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id

    def __call__(self, text: object) -> list[int]:
        raise RuntimeError("nothing is ever cut into tokens for a grammar that forces none")


class GrammarCompiler:
    """Compiles grammars for one vocabulary. May be used by several threads."""

    def __init__(self, table: TokenTable, *, num_threads: int = 1) -> None:
        """Takes a few tenths of a second, and some 20 MB. num_threads: that fill masks."""
        # GPU machines may have torch and msgspec alone, and need it for constrained output only.
        import llguidance  # noqa: PLC0415

        self._library = llguidance
        self.is_renewing = False
        """A grammar is compiled anew in the middle of a step, which can take long; may be read by any thread."""
        self.vocab_size = len(table.lengths)
        self._eos_token_ids = table.eos_token_ids
        tokens = table.tokens()
        # The library needs an end token. One behind the vocabulary, which nobody can draw, stands for none.
        eos = list(table.eos_token_ids) or [self.vocab_size]
        tokens += [b""] * (max(eos) + 1 - len(tokens))
        self._tokenizer = llguidance.LLTokenizer(
            _Tokens(tokens, eos[0]),  # type: ignore[arg-type]
            n_vocab=len(tokens),
            eos_token=eos,
            slices=[*llguidance.LLTokenizer.json_slices(), *_WORD_SLICES],
        )
        self.num_words = -(-len(tokens) // 32)
        self._executor: LLExecutor | None = llguidance.LLExecutor(num_threads) if num_threads > 1 else None

    def compile(self, text: str) -> "Grammar":
        """Raises GrammarError; also for a grammar that allows no beginning, or names a token."""
        if special := _special_token(text):
            raise GrammarError(
                f"{special:.80} is a special token, which no answer may hold; name texts and regular expressions alone"
            )
        grammar = Grammar(self, text)
        mask_W = np.zeros(self.num_words, dtype=np.int32)
        if not Matcher(grammar, spares_end=False).fill(mask_W):
            raise GrammarError("it allows no text at all")
        return grammar

    def new_matcher(self, text: str) -> "LLMatcher":
        """Raises GrammarError."""
        limits = self._library.LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SIZE, verbose_errors=False
        )
        matcher = self._library.LLMatcher(self._tokenizer, text + _OPTIONS, log_level=0, limits=limits)
        if matcher.is_error():
            error = _tidied(matcher.get_error())
            raise GrammarError("the library that compiles grammars fails on it" if error.startswith("panic") else error)
        return matcher

    def write_masks(self, matchers: "Sequence[LLMatcher]", mask_RW: NDArray[np.int32]) -> None:
        """By all threads. One that meets a limit says so itself (`is_error`)."""
        if self._executor is None or len(matchers) == 1:
            for matcher, mask_W in zip(matchers, mask_RW, strict=True):
                matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
            return
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, mask_RW.ctypes.data, mask_RW.strides[0], len(rows))

    def end_mask(self) -> NDArray[np.int32]:
        """int32 [W]: the end tokens."""
        bits = np.zeros(32 * self.num_words, dtype=np.uint8)
        bits[list(self._eos_token_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


class Grammar:
    """A compiled grammar, and what it has learnt about its texts: sequences that follow it share that."""

    def __init__(self, compiler: GrammarCompiler, text: str) -> None:
        """Raises GrammarError."""
        self.compiler = compiler
        self.text = text
        self.end_mask_W = compiler.end_mask()
        self._fresh = compiler.new_matcher(text)

    def begin(self) -> "LLMatcher":
        """At the beginning of a text, with what has been learnt."""
        return self._fresh.deep_copy()

    def begin_anew(self) -> "LLMatcher":
        """The same with nothing learnt, for others too: what is learnt counts against limits."""
        self.compiler.is_renewing = True
        try:
            self._fresh = self.compiler.new_matcher(self.text)
        finally:
            self.compiler.is_renewing = False
        return self._fresh.deep_copy()


class Matcher:
    """Where one sequence stands in its grammar. Every rank has one, and all come to the same."""

    def __init__(self, grammar: Grammar, *, spares_end: bool) -> None:
        """With `spares_end` an end token is allowed only where nothing else is (SamplingParams.ignore_eos)."""
        self._grammar = grammar
        self._spares_end = spares_end
        self._matcher = grammar.begin()
        self._token_ids: list[int] = []
        self.has_failed = False
        """It allows nothing, or has become too complex, or was given a token that it does not allow."""
        self.is_complete = False
        """Nothing can come any more."""

    @property
    def num_words(self) -> int:
        """Of a mask."""
        return self._grammar.compiler.num_words

    @property
    def limit_met(self) -> str:
        """Which limit of the library's it has met, in the library's words; "" for none, also where it just allows nothing."""
        error = _tidied(self._matcher.get_error()) if self._matcher.is_error() else ""
        return "" if error.startswith(_ALLOWS_NOTHING) else error.removeprefix("Parser Error: ")

    @property
    def is_open(self) -> bool:
        """It says which token is next."""
        return not (self.is_complete or self.has_failed)

    def fill(self, mask_W: NDArray[np.int32]) -> bool:
        """Write which tokens may come next, a bit each, lowest first. False when there is none, or that cannot be told."""
        return Matcher.fill_all([self], mask_W[None])[0]

    @staticmethod
    def fill_all(matchers: "Sequence[Matcher]", mask_RW: NDArray[np.int32]) -> list[bool]:
        """`fill` of several that share a compiler, on its threads. Of each row what `fill` returns."""
        matchers[0]._grammar.compiler.write_masks([matcher._matcher for matcher in matchers], mask_RW)
        return [matcher._check(mask_W) for matcher, mask_W in zip(matchers, mask_RW, strict=True)]

    def _check(self, mask_W: NDArray[np.int32]) -> bool:
        """Whether a mask that has been written says what may come next."""
        is_told = not self._matcher.is_error()
        if not is_told and self._begin_anew():
            self._grammar.compiler.write_masks([self._matcher], mask_W[None])
            is_told = not self._matcher.is_error()
        if is_told and self._spares_end:
            others_W = mask_W & ~self._grammar.end_mask_W
            if others_W.any():
                mask_W[:] = others_W
        self.has_failed = not (is_told and mask_W.any())
        return not self.has_failed

    def consume(self, token_id: int) -> None:
        """The sequence goes on with this token. Nothing happens at its end, where a row in flight may still bring one."""
        if not self.is_open:
            return
        self._token_ids.append(token_id)
        if not self._matcher.consume_token(token_id) and not self._begin_anew():
            self.has_failed = True
            return
        self.is_complete = self._matcher.is_stopped()

    def ahead(self, draft: int) -> "Matcher":
        """Another one, as this would be if the sequence went on with a token that may not be allowed; this one stays as it is."""
        copy = Matcher.__new__(Matcher)
        copy._grammar, copy._spares_end = self._grammar, self._spares_end
        copy._matcher, copy._token_ids = self._matcher, self._token_ids
        copy.has_failed, copy.is_complete = self.has_failed, self.is_complete
        if self.is_open:
            # Not by trying: what is not allowed looks like a limit that was met, and everything would be begun anew.
            copy.has_failed = self._matcher.validate_tokens([draft]) < 1
            if not copy.has_failed:
                copy._matcher, copy._token_ids = self._matcher.deep_copy(), [*self._token_ids]
                copy.consume(draft)
        return copy

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens, none of which has failed."""
        if num_tokens:
            del self._token_ids[-num_tokens:]
            self._matcher.rollback(num_tokens)
            self.is_complete = False

    def _begin_anew(self) -> bool:
        """The library's limits count for all sequences of a grammar, and one that has met one is of no use any more. So that what
        others have done decides nothing, it is tried again with a matcher that knows this sequence alone."""
        try:
            self._matcher = self._grammar.begin_anew()
        except GrammarError:  # it compiled before, so this is a limit that depends on the moment
            return False
        return self._matcher.consume_tokens(self._token_ids)


def allowed_bits(mask_RW: NDArray[np.int32], token_ids: range) -> NDArray[np.bool_]:
    """[R, tokens] of bool: the part of masks that speaks of a range of tokens, which may begin and end within a word."""
    first, last = token_ids.start // 8, -(-token_ids.stop // 8)
    bits = np.unpackbits(mask_RW.view(np.uint8)[:, first:last], axis=1, bitorder="little")
    begin = token_ids.start - 8 * first
    return bits[:, begin : begin + len(token_ids)].view(np.bool_)


def _special_token(text: str) -> str:
    """The first one that a grammar names, by its text or as <[number]>; "" when it names none. The library has no special tokens
    to look a name up in, and allows those that are given by number."""
    return next((found[1] for found in _QUOTED_OR_SPECIAL.finditer(text) if found[1]), "")


def _tidied(message: str) -> str:
    """Without backtraces and states."""
    for mark in ("<backtrace>", "<state>", "<non-verbose/>", "<grammar>"):
        message = message.partition(mark)[0]
    return message.strip()
