"""Which grammars the ranks of a group have, as its leader knows it.

Ranks compile a grammar beside the steps that they run. A sequence with a grammar waits, outside of the queue, until every rank
has compiled it; one with a grammar that is there already does not wait.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from model_parallel.config import SchedulerConfig
from model_parallel.engine.messages import CompiledGrammar, NewGrammar
from model_parallel.errors import RequestError


@dataclass(slots=True, eq=False)
class GroupGrammar:
    """One grammar."""

    grammar_id: int
    text: str
    num_bytes: int
    """Of the text, in UTF-8."""
    num_users: int = 0
    """Sequences that live and follow it."""
    is_compiled: bool = False
    error: str = ""
    """Why the ranks cannot have it."""


@dataclass(slots=True)
class GrammarTable:
    """Bounded in number and bytes. What is in use stays; of the others those go that were used least recently."""

    config: SchedulerConfig
    num_compiled: int = 0
    """Since the start."""
    _by_text: dict[str, GroupGrammar] = field(default_factory=dict)
    """The one used last comes last."""
    _by_id: dict[int, GroupGrammar] = field(default_factory=dict)
    _last_id: int = 0
    _new: list[GroupGrammar] = field(default_factory=list)
    """Not told yet."""
    _dropped: list[int] = field(default_factory=list)
    """Neither."""

    def __len__(self) -> int:
        return len(self._by_text)

    @property
    def has_news(self) -> bool:
        """The ranks must be told of something."""
        return bool(self._new or self._dropped)

    def check_room(self, texts: set[str]) -> None:
        """Raises RequestError "overloaded" when these and those in use are more than the ranks may keep."""
        used = [grammar for grammar in self._by_text.values() if grammar.num_users and grammar.text not in texts]
        num_needed = len(texts) + len(used)
        num_bytes = sum(map(_num_bytes, texts)) + sum(grammar.num_bytes for grammar in used)
        if num_needed > self.config.max_grammars or num_bytes > self.config.max_grammar_bytes:
            raise RequestError(
                f"the group would have {num_needed} grammars of {num_bytes} bytes in use; it may have "
                f"{self.config.max_grammars} and {self.config.max_grammar_bytes} bytes",
                kind="overloaded",
            )

    def acquire(self, text: str) -> GroupGrammar:
        """For one more sequence. There is room."""
        grammar = self._by_text.pop(text, None)
        if grammar is None:
            self._last_id += 1
            grammar = GroupGrammar(self._last_id, text, _num_bytes(text))
            self._by_id[grammar.grammar_id] = grammar
            self._new.append(grammar)
        self._by_text[text] = grammar
        grammar.num_users += 1
        self._make_room()
        return grammar

    def release(self, grammar: GroupGrammar) -> None:
        """A sequence has ended."""
        grammar.num_users -= 1

    def take_news(self) -> tuple[tuple[NewGrammar, ...], tuple[int, ...]]:
        """(new, dropped) for the ranks."""
        new = tuple([NewGrammar(grammar.grammar_id, grammar.text) for grammar in self._new])
        dropped = tuple(self._dropped)
        self._new.clear()
        self._dropped.clear()
        return new, dropped

    def take_compiled(self, compiled: tuple[CompiledGrammar, ...]) -> Iterator[GroupGrammar]:
        """What every rank has now; a grammar that failed is forgotten."""
        for each in compiled:
            grammar = self._by_id.get(each.grammar_id)
            if grammar is None:  # dropped meanwhile
                continue
            grammar.is_compiled, grammar.error = True, each.error
            self.num_compiled += 1
            if each.error:
                self._drop(grammar)
            yield grammar

    def check_integrity(self, living: Mapping[int, int]) -> None:
        """Compare with the sequences, by the ids of their grammars. Raises RuntimeError when they disagree."""
        if {grammar.grammar_id: grammar for grammar in self._by_text.values()} != self._by_id:
            raise RuntimeError("the two indexes of grammars disagree")
        if not self._by_id.keys().isdisjoint(self._dropped) or not all(
            self._by_id.get(g.grammar_id) is g for g in self._new
        ):
            raise RuntimeError("the ranks would be told to drop a grammar that is kept, or to keep one that is not")
        for grammar_id, grammar in self._by_id.items():
            if grammar.num_users != living.get(grammar_id, 0):
                raise RuntimeError(f"grammar {grammar_id} counts {grammar.num_users} sequences")
        num_bytes = sum(grammar.num_bytes for grammar in self._by_id.values())
        if len(self) > self.config.max_grammars or num_bytes > self.config.max_grammar_bytes:
            raise RuntimeError(f"{len(self)} grammars of {num_bytes} bytes are kept")

    def _make_room(self) -> None:
        num_bytes = sum(grammar.num_bytes for grammar in self._by_text.values())
        unused = [grammar for grammar in self._by_text.values() if not grammar.num_users]
        for grammar in unused:
            if len(self._by_text) <= self.config.max_grammars and num_bytes <= self.config.max_grammar_bytes:
                return
            num_bytes -= grammar.num_bytes
            self._drop(grammar)

    def _drop(self, grammar: GroupGrammar) -> None:
        del self._by_text[grammar.text], self._by_id[grammar.grammar_id]
        if grammar in self._new:
            self._new.remove(grammar)
        else:
            self._dropped.append(grammar.grammar_id)


def _num_bytes(text: str) -> int:
    return len(text.encode())
