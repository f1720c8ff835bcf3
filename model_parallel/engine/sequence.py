"""One accepted request, as the scheduler keeps it."""

from dataclasses import dataclass, field

from model_parallel.engine.grammars import GroupGrammar
from model_parallel.engine.kv_blocks import BlockTable
from model_parallel.engine.messages import NewSequence, Row, RowResult
from model_parallel.engine.request import EngineRequest, Timings, TokenLogprobs


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Tokens, progress and times of one request. The scheduler alone changes it."""

    seq_id: int
    request: EngineRequest
    table: BlockTable
    accepted_s: float
    """Monotonic, like every `*_s` here."""
    grammar: GroupGrammar | None = None
    """What its output must follow."""
    adapter_id: int = 0
    """0: none."""
    token_ids: list[int] = field(init=False)
    """Prompt, output delivered by another group, and what was sampled here."""
    num_prompt_tokens: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    """End-of-sequence and stop tokens that end this request."""
    next_prompt_logprob: int = field(init=False)
    """First prompt position whose log-probability is still to be delivered; the prompt's length when none is."""
    num_pending: int = 0
    """Tokens that the steps in flight will sample. They follow `token_ids` and are counted before they are known."""
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache, or will be after the step just planned."""
    admitted_step_id: int = 0
    """First step for which its present blocks hold; a result of an earlier one tells nothing about them."""
    num_told_blocks: int = 0
    """Leading blocks of its table that the ranks know. None after a preemption."""
    was_admitted: bool = False
    """It has been charged for its prompt; a preemption does not make it pay twice."""
    was_paused: bool = False
    """It has lost its place in the order of arrival."""
    is_below_fair_share: bool = False
    """Its tenant had not used its share when it was admitted; see fair_queue.py."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache gave at the first admission."""
    num_accepted_tokens: int = 0
    """Tokens drawn here that had been drafted."""
    num_rejected_tokens: int = 0
    """Drafts that were not right."""
    started_s: float | None = None
    """When the first step was planned that computes any of it. The ranks know the sequence from then on."""
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        request, sampling = self.request, self.request.sampling
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.stop_ids = frozenset(sampling.stop_token_ids + (() if sampling.ignore_eos else request.eos_token_ids))
        self.next_prompt_logprob = self.num_prompt_tokens
        if sampling.prompt_logprobs is not None:
            self.next_prompt_logprob = min(self.next_prompt_logprob, max(1, sampling.prompt_logprobs_start))

    @property
    def num_tokens(self) -> int:
        """Pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Known ones, of this group and of those that had the request before."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be planned. Never counts a pending last token: nothing follows it."""
        if self.num_pending and self.has_all_output:
            return 0
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def has_all_output(self) -> bool:
        """No token is wanted beyond the pending ones. True from the beginning when max_tokens is 0."""
        return len(self.token_ids) + self.num_pending - self.num_prompt_tokens >= self.request.sampling.max_tokens

    @property
    def max_cached(self) -> int:
        """Tokens that may come from the prefix cache, which holds keys and values but no logits.

        The next token needs the logits at the last one; the log-probability of prompt position p those at p - 1.
        """
        if self.next_prompt_logprob < self.num_prompt_tokens:
            return self.next_prompt_logprob - 1
        return self.num_tokens - 1

    def new_sequence(self) -> NewSequence:
        """All that the ranks must know before its first row."""
        return NewSequence(
            seq_id=self.seq_id,
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            choice=self.request.choice,
            sampling=self.request.sampling,
            grammar_id=0 if self.grammar is None else self.grammar.grammar_id,
            adapter_id=self.adapter_id,
        )

    def append(self, token_id: int, now_s: float) -> None:
        """Take a sampled token, until now pending."""
        self.token_ids.append(token_id)
        self.num_pending -= 1
        self.last_token_s = now_s
        if self.first_token_s is None:
            self.first_token_s = now_s

    def take_prompt_logprobs(self, row: Row, result: RowResult) -> tuple[TokenLogprobs, ...]:
        """Those not delivered before. Ranks report again what they compute again after a preemption."""
        first_position = max(row.start + 1, self.request.sampling.prompt_logprobs_start)
        fresh = result.prompt_logprobs[max(0, self.next_prompt_logprob - first_position) :]
        self.next_prompt_logprob += len(fresh)
        return fresh

    def timings(self, now_s: float) -> Timings:
        """Stages up to `now_s`; one that was never reached took no time."""
        if self.started_s is None:
            return Timings(queue_s=now_s - self.accepted_s)
        if self.first_token_s is None or self.last_token_s is None:
            return Timings(queue_s=self.started_s - self.accepted_s, prefill_s=now_s - self.started_s)
        return Timings(
            queue_s=self.started_s - self.accepted_s,
            prefill_s=self.first_token_s - self.started_s,
            decode_s=self.last_token_s - self.first_token_s,
        )
