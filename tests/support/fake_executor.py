"""Ranks without a model: they check every plan against a KV cache of their own and answer deterministically.

A slot of the cache holds a digest of what the keys and values there depend on: the salt and all tokens up to it.
A row that would read a slot with any other content fails. The next token is a hash of all tokens before it, so that
chunks, preemption and shared prefixes must not change a request's output.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model_parallel.engine.messages import (
    AdapterLoad,
    AdapterOutcome,
    CompiledGrammar,
    DraftRequest,
    NewSequence,
    Row,
    RowResult,
    StepPlan,
    StepResult,
)
from model_parallel.engine.request import EngineRequest, SamplingParams, TokenLogprobs
from model_parallel.errors import GroupFailedError

VOCAB_SIZE = 50


REPETITIVE = 1 << 20
"""Added to a seed: what comes next depends on the last two tokens alone, so that the answer goes round in circles."""
SOMETIMES = 1 << 24
"""Times a percentage, added to a seed: of so many tokens this is true, the others depend on all before them."""


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """What the fake model continues `token_ids` with."""
    percentage = 100 if seed & REPETITIVE else seed // SOMETIMES
    if percentage == 100 or (percentage and _digest(f"{seed}:{','.join(map(str, token_ids))}") % 100 < percentage):
        token_ids = token_ids[-2:]
    text = f"{seed}:{','.join(map(str, token_ids))}"
    return _digest(text) % VOCAB_SIZE


def _digest(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def foretell(token_ids: Sequence[int], seed: int, num_tokens: int) -> list[int]:
    """What the fake model continues `token_ids` with, token after token."""
    known = list(token_ids)
    for _ in range(num_tokens):
        known.append(next_token(known, seed))
    return known[len(token_ids) :]


def token_logprob(token_ids: Sequence[int], position: int) -> TokenLogprobs:
    """The fake model's log-probability of the token at `position`, which depends on all before it."""
    digest = hashlib.sha256(",".join(map(str, token_ids[: position + 1])).encode()).digest()
    return TokenLogprobs(token_ids[position], -float(digest[0]) - 1.0)


def solo_output(request: EngineRequest) -> list[int]:
    """The tokens that a request must get, worked out without any engine."""
    sampling = request.sampling
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)}
    token_ids = [*request.prompt_token_ids, *request.output_token_ids]
    drawn: list[int] = []
    while len(request.output_token_ids) + len(drawn) < sampling.max_tokens:
        drawn.append(next_token(token_ids + drawn, sampling.seed))
        if drawn[-1] in stops:
            break
    return drawn


def solo_prompt_logprobs(request: EngineRequest) -> list[TokenLogprobs]:
    """The prompt log-probabilities that a request must get, once."""
    if request.sampling.prompt_logprobs is None:
        return []
    first = max(1, request.sampling.prompt_logprobs_start)
    return [token_logprob(request.prompt_token_ids, p) for p in range(first, len(request.prompt_token_ids))]


@dataclass
class _RankSequence:
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    salt: bytes
    adapter_id: int
    block_ids: list[int] = field(default_factory=list)
    most_output: int | None = None
    """Tokens after which its grammar is complete."""
    _contents: list[bytes] = field(default_factory=list)
    """Of the slots of `token_ids`, which only grow, as far as somebody has asked."""

    @property
    def is_complete(self) -> bool:
        return self.most_output is not None and len(self.token_ids) - self.num_prompt_tokens >= self.most_output

    def slot_contents(self, drafts: Sequence[int] = ()) -> list[bytes]:
        known = self._contents
        for token_id in self.token_ids[len(known) :]:
            known.append(self._content_after(known, token_id))
        if not drafts:
            return known
        contents = list(known)
        for token_id in drafts:
            contents.append(self._content_after(contents, token_id))
        return contents

    def _content_after(self, before: Sequence[bytes], token_id: int) -> bytes:
        last = before[-1] if before else b"salt" + self.salt + self.adapter_id.to_bytes(4)
        return hashlib.sha256(last + token_id.to_bytes(4)).digest()


class FakeExecutor:
    """All ranks of a group, in the caller's thread. An AssertionError means that a plan was wrong."""

    def __init__(self, *, num_blocks: int, block_size: int, max_tokens_a_step: int = 1 << 30, epoch: int = 1) -> None:
        self.plans: list[StepPlan] = []
        self.salts: dict[int, bytes] = {}
        """Ranks are not told the salt: the test says which one belongs to the sampling seed of a request."""
        self.poisoned_seeds: set[int] = set()
        """Requests whose keys, values and logits are not finite."""
        self.fails_at_step: int | None = None
        self.proposal_errs: Callable[[int], bool] = lambda position: position % 7 == 0
        """The draft model is wrong about the token of that position."""
        self.has_no_proposal: Callable[[int], bool] = lambda num_known: num_known % 11 == 0
        """It says nothing after so many tokens."""
        self.during_step: Callable[[], None] | None = None
        """Called in the middle of every step."""
        self.on_failure: Callable[[str], None] | None = None
        self.is_shut_down = False
        self.grammars: dict[int, str] = {}
        """Compiled ones: the text is the number of tokens after which an output is complete, or "wrong"."""
        self.steps_to_compile = 2
        self.sequences: dict[int, _RankSequence] = {}
        self._submitted: deque[StepPlan] = deque()
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_tokens_a_step = max_tokens_a_step
        self._epoch = epoch
        self._blocks: list[list[bytes | None]] = [[None] * block_size for _ in range(num_blocks)]
        """What each slot of each block holds."""
        self._compiling: dict[int, tuple[str, int]] = {}
        """Text, and steps that are left."""
        self.adapters: set[int] = set()
        """Loaded."""
        self.broken_adapters: set[str] = set()
        """Digests of those that cannot be loaded."""
        self.max_adapters = 0
        self.num_steps_to_load = 3
        self._loading: dict[int, tuple[AdapterLoad, int]] = {}

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        self.on_failure = callback

    def shutdown(self) -> None:
        self.is_shut_down = True

    def submit(self, plan: StepPlan) -> None:
        self._submitted.append(plan)

    def collect(self) -> StepResult:
        plan = self._submitted.popleft()
        if plan.step_id == self.fails_at_step:
            raise GroupFailedError("rank 1 died")
        assert (plan.epoch, plan.step_id) == (self._epoch, len(self.plans) + 1)
        self.plans.append(plan)
        if self.during_step is not None:
            self.during_step()
        self._take_adapters(plan)
        for seq_id in plan.finished:
            del self.sequences[seq_id]
        for new in plan.new_sequences:
            assert new.seq_id not in self.sequences
            self.sequences[new.seq_id] = self._accept(new)
        for grammar_id in plan.dropped_grammars:
            self.grammars.pop(grammar_id, None)
            self._compiling.pop(grammar_id, None)
        for grammar in plan.new_grammars:
            assert grammar.grammar_id not in self.grammars | self._compiling
            self._compiling[grammar.grammar_id] = grammar.text, self.steps_to_compile
        assert len({row.seq_id for row in plan.rows}) == len(plan.rows)
        assert sum(row.num_tokens for row in plan.rows) <= self._max_tokens_a_step
        for row in plan.rows:
            adapter_id = self.sequences[row.seq_id].adapter_id
            assert not adapter_id or adapter_id in self.adapters, "a row of an adapter that is not loaded"
            self._extend_table(row)
        # Rows of one step run side by side: none may read what another writes, nor write where another reads.
        for row in plan.rows:
            self._check_reads(row, row.start)
        written: set[tuple[int, int]] = set()
        for row in plan.rows:
            self._write(row, written)
        for row in plan.rows:
            self._check_reads(row, row.start + row.num_tokens)
        return StepResult(
            plan.epoch,
            plan.step_id,
            tuple(self._answer(row) for row in plan.rows),
            self._compile(),
            self._settle_adapters(plan),
            tuple(self._propose(request) for request in plan.draft_requests),
        )

    def _propose(self, request: DraftRequest) -> tuple[int, ...]:
        """As the model, with errors."""
        sequence = self.sequences[request.seq_id]
        known = len(sequence.token_ids)
        if self.has_no_proposal(known):
            return ()
        foretold = foretell(sequence.token_ids, sequence.sampling.seed, request.num_tokens)
        return tuple((token + self.proposal_errs(known + i)) % VOCAB_SIZE for i, token in enumerate(foretold))

    @property
    def kept_grammars(self) -> set[int]:
        """Ids of those that are compiled or will be."""
        return self.grammars.keys() | self._compiling.keys()

    def _compile(self) -> tuple[CompiledGrammar, ...]:
        self._compiling = {grammar_id: (text, left - 1) for grammar_id, (text, left) in self._compiling.items()}
        done = {grammar_id: text for grammar_id, (text, left) in self._compiling.items() if left <= 0}
        for grammar_id, text in done.items():
            del self._compiling[grammar_id]
            if text != "wrong":
                self.grammars[grammar_id] = text
        return tuple(CompiledGrammar(grammar_id, "wrong" * (text == "wrong")) for grammar_id, text in done.items())

    def _accept(self, new: NewSequence) -> _RankSequence:
        salt = self.salts.get(new.sampling.seed, b"")
        most_output = int(self.grammars[new.grammar_id]) if new.grammar_id else None
        return _RankSequence(
            list(new.token_ids),
            new.num_prompt_tokens,
            new.sampling,
            salt,
            new.adapter_id,
            most_output=most_output,
        )

    def _take_adapters(self, plan: StepPlan) -> None:
        for adapter_id in plan.adapters_to_drop:
            self.adapters.remove(adapter_id)
        for load in plan.adapters_to_load:
            assert load.adapter_id not in self.adapters and load.adapter_id not in self._loading
            self._loading[load.adapter_id] = (load, plan.step_id + self.num_steps_to_load)
            assert len(self.adapters) + len(self._loading) <= self.max_adapters

    def _settle_adapters(self, plan: StepPlan) -> tuple[AdapterOutcome, ...]:
        outcomes = []
        for adapter_id, (load, due) in list(self._loading.items()):
            if plan.step_id >= due:
                del self._loading[adapter_id]
                error = "rank 1: it is broken" if load.digest in self.broken_adapters else ""
                if not error:
                    self.adapters.add(adapter_id)
                outcomes.append(AdapterOutcome(adapter_id, error))
        return tuple(outcomes)

    def _extend_table(self, row: Row) -> None:
        sequence = self.sequences[row.seq_id]
        if row.reset_blocks:
            sequence.block_ids = []
        sequence.block_ids += row.new_block_ids
        end, num_drafts = row.start + row.num_tokens, len(row.draft_token_ids)
        assert 0 <= row.start < end - num_drafts <= len(sequence.token_ids)
        assert not num_drafts or (row.sample and row.num_tokens == 1 + num_drafts)
        assert end <= len(sequence.block_ids) * self._block_size
        assert all(0 <= block_id < self._num_blocks for block_id in sequence.block_ids)
        assert len(set(sequence.block_ids)) == len(sequence.block_ids)
        assert not row.sample or end - num_drafts == len(sequence.token_ids)

    def _slot(self, sequence: _RankSequence, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self._block_size], position % self._block_size

    def _check_reads(self, row: Row, end: int) -> None:
        sequence = self.sequences[row.seq_id]
        if sequence.sampling.seed in self.poisoned_seeds:
            return
        contents, size = sequence.slot_contents(row.draft_token_ids)[:end], self._block_size
        for number, start in enumerate(range(0, end, size)):
            expected = contents[start : start + size]
            block_id = sequence.block_ids[number]
            assert self._blocks[block_id][: len(expected)] == expected, (
                f"sequence {row.seq_id}, positions from {start}: wrong content in block {block_id}"
            )

    def _write(self, row: Row, written: set[tuple[int, int]]) -> None:
        sequence = self.sequences[row.seq_id]
        contents = sequence.slot_contents(row.draft_token_ids)
        for position in range(row.start, row.start + row.num_tokens):
            slot = self._slot(sequence, position)
            assert slot not in written
            written.add(slot)
            is_poisoned = sequence.sampling.seed in self.poisoned_seeds
            block_id, offset = slot
            self._blocks[block_id][offset] = b"not finite" if is_poisoned else contents[position]

    def _answer(self, row: Row) -> RowResult:
        sequence = self.sequences[row.seq_id]
        sampling = sequence.sampling
        if sampling.seed in self.poisoned_seeds:
            sequence.token_ids += [0] * row.sample
            return RowResult(row.seq_id, error_kind="numerical_error")
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.prompt_logprobs is not None:
            first = max(row.start + 1, sampling.prompt_logprobs_start)
            last = min(row.start + row.num_tokens, sequence.num_prompt_tokens - 1)
            prompt_logprobs = tuple(token_logprob(sequence.token_ids, p) for p in range(first, last + 1))
        if not row.sample:
            return RowResult(row.seq_id, prompt_logprobs=prompt_logprobs)
        drawn = []
        for draft in (*row.draft_token_ids, None):
            drawn.append(next_token(sequence.token_ids, sampling.seed))
            sequence.token_ids.append(drawn[-1])
            if draft != drawn[-1] or sequence.is_complete:
                break
        if row.draft_token_ids:
            num_computed = len(sequence.token_ids) - 1
            del sequence.block_ids[-(-num_computed // self._block_size) :]
        logprobs: list[TokenLogprobs] = []
        if sampling.logprobs is not None:
            num_tokens = len(sequence.token_ids)
            logprobs = [token_logprob(sequence.token_ids, p) for p in range(num_tokens - len(drawn), num_tokens)]
        return RowResult(
            row.seq_id,
            drawn[0],
            logprobs[0] if logprobs else None,
            prompt_logprobs,
            is_complete=sequence.is_complete,
            more_token_ids=tuple(drawn[1:]),
            more_logprobs=tuple(logprobs[1:]),
        )
