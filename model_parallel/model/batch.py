"""One step as tensors: the rows of a plan laid side by side, with what the ranks remember of each sequence.

Shape suffixes: T tokens of the step, padded · D head dim
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model_parallel.config import ModelConfig
from model_parallel.engine.matching import Matcher
from model_parallel.engine.messages import NewSequence, Row
from model_parallel.engine.request import SamplingParams
from model_parallel.kernels.interface import AttentionPlan, SequenceRun


@dataclass(slots=True)
class SequenceState:
    """What a rank remembers of a running sequence."""

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    choice: int
    sampling: SamplingParams
    adapter_id: int = 0
    """Of the adapter that changes its rows; 0 is none."""
    block_ids: list[int] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)
    """Occurrences of each output token, for the presence and frequency penalties."""
    distinct_ids: dict[int, None] = field(default_factory=dict)
    """Every token of prompt and output once, for the repetition penalty."""
    matcher: Matcher | None = None
    """Of a sequence with a grammar: what may come next."""
    num_drafts: int = 0
    """Of a state that is ahead of its sequence; see `ahead`."""

    @classmethod
    def begin(cls, new: NewSequence, matcher: Matcher | None = None) -> "SequenceState":
        """`matcher` stands at the beginning of the output."""
        output = new.token_ids[new.num_prompt_tokens :]
        state = cls(new.seq_id, list(new.token_ids), new.num_prompt_tokens, new.choice, new.sampling, new.adapter_id)
        state.output_counts.update(output)
        state.distinct_ids.update(dict.fromkeys(new.token_ids))
        state.matcher = matcher
        if matcher is not None:
            for token_id in output:
                matcher.consume(token_id)
        return state

    @property
    def position(self) -> int:
        """Of the token that is drawn next."""
        return len(self.token_ids) + self.num_drafts

    def ahead(self, draft: int) -> "SequenceState":
        """What the sequence would be after this token too: that by which the token's row draws.

        It holds what draws depend on and no more: of `token_ids` and `block_ids` it has the sequence's own. Whatever else draws
        come to depend on must be brought as far here. The draft may be a token that can never be drawn; what the rows after it
        draw is then dropped.
        """
        state, sampling = replace(self, num_drafts=self.num_drafts + 1), self.sampling
        if sampling.presence_penalty or sampling.frequency_penalty:
            state.output_counts = self.output_counts.copy()
            state.output_counts[draft] += 1
        if sampling.repetition_penalty != 1.0:
            state.distinct_ids = self.distinct_ids | {draft: None}
        if self.matcher is not None:
            state.matcher = self.matcher.ahead(draft)
        return state

    def append(self, token_id: int) -> None:
        """Take the token just sampled as the sequence's next."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
        self.distinct_ids[token_id] = None
        if self.matcher is not None:
            self.matcher.consume(token_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The step's inputs; the first `num_tokens` rows are real, the rest padding."""

    num_tokens: int
    token_ids_T: Tensor
    """int64."""
    attention: AttentionPlan


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """float32 [D / 2]: theta^(−2i / D) (Su et al. 2021, eq. 15), divided by the checkpoint's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_divisors:
        frequencies /= torch.tensor(config.rope_divisors, dtype=torch.float32, device=device)
    return frequencies


def by_adapter(rows: tuple[Row, ...], sequences: Mapping[int, SequenceState]) -> tuple[Row, ...]:
    """`rows` with those of one adapter beside each other, otherwise in their order. No row's bits depend on its place."""
    return tuple(sorted(rows, key=lambda row: sequences[row.seq_id].adapter_id))


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of a step side by side, as numbers."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """Of each token, as are token ids and positions; see AttentionPlan."""
    runs: list[tuple[int, int, int, int]] = field(default_factory=list)
    """See AttentionPlan.runs_S4. Those of one sequence share a block table."""
    blocks: list[int] = field(default_factory=list)

    def pad_to(self, num_tokens: int, *, scratch_slot: int) -> None:
        """Tokens that nobody looks at, up to `num_tokens` in all."""
        num_padding = num_tokens - len(self.token_ids)
        self.token_ids.extend([0] * num_padding)
        self.positions.extend([0] * num_padding)
        self.slots.extend([scratch_slot] * num_padding)


def lay_out(
    rows: tuple[Row, ...], sequences: Mapping[int, SequenceState], *, block_size: int, in_runs_of_one: bool = False
) -> Layout:
    """`rows` in their order. The sequences' block tables are already up to date.

    in_runs_of_one: a row of several tokens becomes as many runs. That computes the same.
    """
    layout = Layout()
    for row in rows:
        state = sequences[row.seq_id]
        span = range(row.start, row.start + row.num_tokens)
        first_row, first_block = len(layout.token_ids), len(layout.blocks)
        if in_runs_of_one:
            layout.runs.extend((first_row + i, 1, position, first_block) for i, position in enumerate(span))
        else:
            layout.runs.append((first_row, len(span), row.start, first_block))
        layout.blocks.extend(state.block_ids)
        layout.token_ids.extend(state.token_ids[span.start : row.start + row.num_tokens - len(row.draft_token_ids)])
        layout.token_ids.extend(row.draft_token_ids)
        layout.positions.extend(span)
        layout.slots.extend(state.block_ids[p // block_size] * block_size + p % block_size for p in span)
    return layout


def rotary_angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """float32 [T, D], the two halves of D equal."""
    return torch.outer(positions_T.float(), frequencies).repeat(1, 2)


def build_batch(
    rows: tuple[Row, ...],
    sequences: Mapping[int, SequenceState],
    *,
    block_size: int,
    num_blocks: int,
    row_multiple: int,
    frequencies: Tensor,
) -> Batch:
    """The step as `lay_out` has it, padded to a multiple of `row_multiple` tokens, on the device of `frequencies`."""
    device = frequencies.device
    layout = lay_out(rows, sequences, block_size=block_size)
    num_tokens = len(layout.token_ids)
    layout.pad_to(-(-num_tokens // row_multiple) * row_multiple, scratch_slot=num_blocks * block_size)

    def tensor(values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    angles_TD = rotary_angles(tensor(layout.positions), frequencies)
    blocks_X = tensor(layout.blocks)
    ends = [first for *_, first in layout.runs[1:]] + [len(layout.blocks)]
    plan = AttentionPlan(
        slots_T=tensor(layout.slots),
        cos_TD=angles_TD.cos(),
        sin_TD=angles_TD.sin(),
        runs=tuple(
            [
                SequenceRun(first_row=row, num_tokens=count, start=start, block_table=blocks_X[first:end])
                for (row, count, start, first), end in zip(layout.runs, ends, strict=True)
            ]
        ),
        runs_S4=tensor(layout.runs),
        blocks=blocks_X,
    )
    return Batch(num_tokens=num_tokens, token_ids_T=tensor(layout.token_ids), attention=plan)
