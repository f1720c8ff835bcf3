"""What the leader tells its ranks each step and what rank 0 answers. Plain data; msgpack on the wire.

Ranks keep every sequence's tokens and block table. The first message about a sequence is whole, later ones carry only what
is new. Sampled tokens are not sent back: every rank learns them from the sampler's all-gather and appends them itself.
"""

import msgspec

from model_parallel.engine.request import SamplingParams, TokenLogprobs


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """Everything a rank must know about a sequence, once."""

    seq_id: int
    """Unique within an epoch; made by the scheduler."""
    token_ids: tuple[int, ...]
    """Prompt, then output tokens that another group already delivered."""
    num_prompt_tokens: int
    choice: int
    sampling: SamplingParams
    grammar_id: int = 0
    """The grammar that its output must follow, which every rank has compiled by now; 0 for none."""
    adapter_id: int = 0
    """Of the adapter that changes its rows; 0 is none."""


class NewGrammar(msgspec.Struct, frozen=True, array_like=True):
    """A grammar that ranks are to compile beside the steps that they run."""

    grammar_id: int
    """Unique within an epoch; made by the scheduler, from 1."""
    text: str


class Row(msgspec.Struct, frozen=True, array_like=True):
    """A run of one sequence's tokens to compute in this step."""

    seq_id: int
    start: int
    """Position of the first token to compute; everything before it is in the KV cache."""
    num_tokens: int
    sample: bool
    """The run ends at the sequence's last token, so draw the next one and append it."""
    new_block_ids: tuple[int, ...] = ()
    """To append to the sequence's block table before computing."""
    reset_blocks: bool = False
    """Empty the block table first: the sequence was preempted and starts again with new blocks."""
    draft_token_ids: tuple[int, ...] = ()
    """What may follow the sequence's last token, counted in `num_tokens`. A token is drawn after each. Drafts that are what was
    drawn before them are right, as long as all before them are, and the tokens drawn after those are appended too. Afterwards
    the block table keeps as many blocks as the tokens that have been computed fill."""


class DraftRequest(msgspec.Struct, frozen=True, array_like=True):
    """What the draft model is to propose of what may follow a sequence's last token."""

    seq_id: int
    num_tokens: int
    """At most."""


class AdapterLoad(msgspec.Struct, frozen=True, array_like=True):
    """An adapter that the ranks begin to load."""

    adapter_id: int
    """Not 0; made by the scheduler, and the same for an adapter that comes back."""
    digest: str
    path: str


class AdapterOutcome(msgspec.Struct, frozen=True, array_like=True):
    """What became of loading an adapter, on all ranks together."""

    adapter_id: int
    error: str = ""
    """Why no rank has it; empty when all have."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step of the whole group. Ranks process what concerns adapters, then `finished`, `new_sequences`, and `rows` in their
    order."""

    epoch: int
    step_id: int
    """Counts from 1; a rank refuses any other than the next."""
    finished: tuple[int, ...] = ()
    """Sequences to forget."""
    new_sequences: tuple[NewSequence, ...] = ()
    rows: tuple[Row, ...] = ()
    new_grammars: tuple[NewGrammar, ...] = ()
    dropped_grammars: tuple[int, ...] = ()
    """Grammars to forget; no sequence that comes later has one of them."""
    adapters_to_drop: tuple[int, ...] = ()
    """No row of this plan or of a later one uses them, unless they are loaded again."""
    adapters_to_load: tuple[AdapterLoad, ...] = ()
    """Beside this step and the next ones. The result of the step that finds them loaded on every rank, or not, tells so."""
    draft_requests: tuple[DraftRequest, ...] = ()
    """Rank 0 alone answers them, after the rows: it has the draft model. The other ranks meet the drafts in a later plan."""


class RowResult(msgspec.Struct, frozen=True, array_like=True):
    """What one row brought."""

    seq_id: int
    token_id: int | None = None
    """The sampled token, of a row with `sample`."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """For each position p in (start, start + num_tokens] that is a prompt position at or after prompt_logprobs_start: the
    log-probability of the prompt token at p."""
    error_kind: str = ""
    """"numerical_error": this row's logits are not finite. "constraint_error": its grammar allows no token, or became too
    complex. Neighbours are not touched."""
    is_complete: bool = False
    """Nothing can come after the token in the sequence's grammar."""
    more_token_ids: tuple[int, ...] = ()
    """What was drawn after each draft that was right, as far as all drafts before it were."""
    more_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of those, when asked for."""


class CompiledGrammar(msgspec.Struct, frozen=True, array_like=True):
    """What became of a new grammar."""

    grammar_id: int
    error: str = ""
    """Why some rank could not compile it."""


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """Rank 0's answer; one RowResult for every row of the plan, in its order."""

    epoch: int
    step_id: int
    rows: tuple[RowResult, ...] = ()
    compiled_grammars: tuple[CompiledGrammar, ...] = ()
    """Those that every rank has compiled since the step before."""
    adapters: tuple[AdapterOutcome, ...] = ()
    """Of adapters whose loading has ended."""
    proposals: tuple[tuple[int, ...], ...] = ()
    """Of each draft request, in their order: tokens that may follow the sequence's last one. None while the draft model has not
    read the sequence, or has no room for it."""
