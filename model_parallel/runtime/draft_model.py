"""A small model on rank 0 that guesses what sequences draw next. The leader says when (engine/model_drafter.py).

It is on one rank, whole, because a small model gains nothing by being cut, and because then all ranks meet the same drafts: they
come with the leader's next plan, whatever processors the ranks have. It draws as the group's model would, with the sequence's
noise, penalties and grammar, so that where both models are alike drafts are right at any temperature. It knows no adapters:
whether a draft is right is told by the group's model, which does.

It has as many blocks of keys and values as the group's cache, and needs no more, but for prefixes that sequences share there.

Shape suffixes: T tokens of a pass · E hidden · R sequences · V vocabulary
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.loader import load_shard
from model_parallel.collectives.interface import SoloCollectives
from model_parallel.config import CacheConfig, GroupConfig, ModelConfig
from model_parallel.engine.kv_blocks import BlockTable, KVBlocks
from model_parallel.engine.messages import DraftRequest, Row
from model_parallel.engine.model_drafter import tokens_to_read
from model_parallel.engine.request import SamplingParams
from model_parallel.errors import ConfigError
from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.interface import Kernels
from model_parallel.model.batch import SequenceState, build_batch, lay_out, rotary_frequencies
from model_parallel.model.llama import Llama
from model_parallel.model.partition import shard_table
from model_parallel.model.sampler import Sampler
from model_parallel.runtime.recorded_steps import RecordedSteps

MAX_RECORDED_ROWS = 64
"""Of a pass; the program of each number of rows is kept."""


@dataclass(slots=True)
class _Read:
    """What the cache holds of one sequence."""

    table: BlockTable
    num_tokens: int = 0
    """Leading tokens of the sequence."""
    guessed: list[int] = field(default_factory=list)
    """Drafts after those, which may be the sequence's next tokens."""


@dataclass(slots=True)
class _Guess:
    """A sequence while its drafts are made."""

    request: DraftRequest
    sequence: SequenceState
    read: _Read
    ahead: SequenceState
    """The sequence after the drafts that there are."""
    drafts: list[int] = field(default_factory=list)
    has_ended: bool = False

    @property
    def wants_more(self) -> bool:
        return not self.has_ended and len(self.drafts) < self.request.num_tokens


class DraftModel:
    """See the module. Called by the rank's own thread, between its steps' rows."""

    def __init__(self, config: GroupConfig, target: ModelConfig, kernels: Kernels, device: torch.device) -> None:
        """Loads the model and allocates its cache. Raises ConfigError, CheckpointError."""
        assert config.draft is not None
        info = describe(Path(config.draft.checkpoint_path))
        check_same_width(info.config, target)
        self._kernels = kernels
        self._block_size, self._num_blocks = config.cache.block_size, config.cache.num_blocks
        self._device = device
        dtype = getattr(torch, config.parallel.dtype)
        table, solo = shard_table(info.config, 1, 0), SoloCollectives()
        weights = load_shard(
            info, table, dtype=dtype, device=device, keep_groups=config.draft.quantization == "packed"
        )  # fmt: skip
        self._model = Llama(info.config, weights, kernels=kernels, collectives=solo)
        self._frequencies = rotary_frequencies(info.config, device)
        self._caches = [
            kernels.allocate_cache(
                num_blocks=self._num_blocks,
                block_size=self._block_size,
                num_kv_heads=info.config.num_kv_heads,
                head_dim=info.config.head_dim,
                dtype=dtype,
            )
            for _ in range(info.config.num_layers)
        ]
        self._recorded: RecordedSteps | None = None
        if isinstance(kernels, CpuKernels):
            self._recorded = RecordedSteps(
                self._model, self._caches, self._frequencies, kernels=kernels, collectives=solo
            )  # fmt: skip
        self._sampler = Sampler(kernels, solo, self._model.vocabulary, info.config.vocab_size)
        self._max_position = info.config.max_position
        self._blocks = KVBlocks(
            CacheConfig(num_blocks=self._num_blocks, block_size=self._block_size, enable_prefix_caching=False)
        )
        self._reads: OrderedDict[int, _Read] = OrderedDict()
        """By seq_id, the one that was asked about longest ago first."""

    @property
    def num_layers_done(self) -> int:
        return self._model.num_layers_done

    def forget(self, seq_ids: Sequence[int]) -> None:
        """They have ended."""
        for seq_id in seq_ids:
            if (read := self._reads.pop(seq_id, None)) is not None:
                self._blocks.release(read.table)

    def propose(
        self, requests: Sequence[DraftRequest], sequences: Mapping[int, SequenceState]
    ) -> tuple[tuple[int, ...], ...]:
        """Drafts for each request; none for a sequence that is not read to its end yet, or has no room."""
        guesses = [self._begin(request, sequences[request.seq_id], requests) for request in requests]
        self._read_new_tokens([guess for guess in guesses if guess is not None])
        while guessing := [guess for guess in guesses if guess is not None and guess.wants_more]:
            self._pass(guessing, [self._row_of_draft(guess) for guess in guessing])
        return tuple([() if guess is None else tuple(guess.drafts) for guess in guesses])

    def _begin(self, request: DraftRequest, sequence: SequenceState, requests: Sequence[DraftRequest]) -> _Guess | None:
        """Blocks for all that the request needs. None where there are not enough."""
        read = self._reads.pop(request.seq_id, None) or _Read(self._blocks.new_table(b""))
        self._reads[request.seq_id] = read
        num_known = len(sequence.token_ids)
        for guessed, token_id in zip(read.guessed, sequence.token_ids[read.num_tokens :], strict=False):
            if guessed != token_id:
                break
            read.num_tokens += 1
        read.guessed = []
        read.num_tokens = min(read.num_tokens, num_known - 1)  # the last one is computed for its logits
        num_needed = num_known + request.num_tokens
        if num_needed > self._max_position or not self._has_room(read.table, num_needed, requests):
            self.forget([request.seq_id])
            return None
        own = replace(sequence, block_ids=read.table.block_ids, sampling=_only_draws(sequence.sampling))
        return _Guess(request, own, read, ahead=own)

    def _has_room(self, table: BlockTable, num_tokens: int, requests: Sequence[DraftRequest]) -> bool:
        """Takes it from those that were asked about longest ago, not in this step."""
        asked = {request.seq_id for request in requests}
        while self._blocks.grow(table, num_tokens) is None:
            oldest = next((seq_id for seq_id in self._reads if seq_id not in asked), None)
            if oldest is None:
                return False
            self.forget([oldest])
        return True

    def _read_new_tokens(self, guesses: Sequence[_Guess]) -> None:
        """The first pass: what was drawn since the last time, or a part of a prompt."""
        rows = []
        numbers = tokens_to_read([len(guess.sequence.token_ids) - guess.read.num_tokens for guess in guesses])
        for guess, num_new in zip(guesses, numbers, strict=True):
            start = guess.read.num_tokens
            guess.read.num_tokens += num_new
            guess.has_ended = guess.read.num_tokens < len(guess.sequence.token_ids)
            rows.append(Row(guess.request.seq_id, start, num_new, sample=not guess.has_ended))
        if rows:
            self._pass(guesses, rows)

    def _row_of_draft(self, guess: _Guess) -> Row:
        """The pass of the last draft."""
        draft = guess.drafts[-1]
        guess.read.guessed.append(draft)
        start = len(guess.sequence.token_ids) + len(guess.drafts) - 1
        return Row(guess.request.seq_id, start, 1, sample=True, draft_token_ids=(draft,))

    def _pass(self, guesses: Sequence[_Guess], rows: Sequence[Row]) -> None:
        """One row for each of `guesses`; those that sample get another draft."""
        hidden_TE = self._forward(tuple(rows), {guess.request.seq_id: guess.sequence for guess in guesses})
        ends, drawing, num_tokens = [], [], 0
        for guess, row in zip(guesses, rows, strict=True):
            num_tokens += row.num_tokens
            if row.sample:
                ends.append(num_tokens - 1)
                drawing.append(guess)
        if not drawing:
            return
        padded = ends + [ends[0]] * (-len(ends) % self._kernels.row_multiple)
        logits_RV = self._model.logits(hidden_TE[torch.tensor(padded, device=self._device)])
        for guess, sampled in zip(drawing, self._sampler.sample(logits_RV, [g.ahead for g in drawing]), strict=False):
            if sampled.token_id is None or sampled.error_kind:
                guess.has_ended = True
                continue
            guess.drafts.append(sampled.token_id)
            if guess.wants_more:
                guess.ahead = guess.ahead.ahead(sampled.token_id)
                matcher = guess.ahead.matcher
                guess.has_ended = matcher is not None and not matcher.is_open

    def _forward(self, rows: tuple[Row, ...], sequences: Mapping[int, SequenceState]) -> Tensor:
        """[T, E]: hidden states, row after row, then padding."""
        if self._recorded is not None and sum(row.num_tokens for row in rows) <= MAX_RECORDED_ROWS:
            return self._recorded.forward(lay_out(rows, sequences, block_size=self._block_size))
        batch = build_batch(
            rows,
            sequences,
            block_size=self._block_size,
            num_blocks=self._num_blocks,
            row_multiple=self._kernels.row_multiple,
            frequencies=self._frequencies,
        )
        return self._model.forward(batch.token_ids_T, batch.attention, self._caches)


def check_same_width(draft: ModelConfig, target: ModelConfig) -> None:
    """Tokens must be the same; here it shows in their number alone. Raises ConfigError."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"the draft model has {draft.vocab_size} tokens and the model {target.vocab_size}; they must have the same"
        )


def _only_draws(sampling: SamplingParams) -> SamplingParams:
    """Nobody asks for the log-probabilities of drafts."""
    return sampling if sampling.logprobs is None else msgspec.structs.replace(sampling, logprobs=None)
