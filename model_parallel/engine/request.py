"""A request as the engine sees it: token ids in, token ids out."""

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a sequence ended. Exactly one of these closes every accepted request."""

    STOP = "stop"
    """An end-of-sequence token, a stop token, a grammar after which nothing can come, or (told by the gateway) a stop string."""
    LENGTH = "length"
    """max_tokens or the model's length was reached."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. Validated by the front end; the engine takes it as it is.

    Order of operations (as in transformers): the request's grammar, logit_bias, repetition/presence/frequency penalties,
    temperature, top_k, top_p over what top_k left, min_p. Log-probabilities are those of the model itself, before any of these.
    """

    temperature: float = 1.0
    """0 is greedy: the highest logit, the lowest token id among equals."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose mass is at least top_p."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Over prompt and output (Keskar et al. 2019): positive logits are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that the output already holds."""
    frequency_penalty: float = 0.0
    """Subtracted once for every occurrence in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit) pairs."""
    seed: int = 0
    """Unsigned 64 bit. The draw for a token depends on (seed, choice, position, token id) alone."""
    max_tokens: int = 16
    """Most output tokens, counting `EngineRequest.output_token_ids`. 0 with prompt_logprobs only scores the prompt."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """Do not end at an end-of-sequence token. Stop tokens still end it."""
    logprobs: int | None = None
    """Report the log-probability of each output token and of this many most likely alternatives."""
    prompt_logprobs: int | None = None
    """The same for prompt tokens."""
    prompt_logprobs_start: int = 1
    """First prompt position to report; position 0 has nothing before it and no log-probability."""


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """A LoRA adapter: what it is, and where its files lie."""

    digest: str
    """SHA-256 of its files (hexadecimal). Whatever goes by another name or lies elsewhere and has the same is the same."""
    path: str
    """A directory, readable on every node that hosts a rank."""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to run. `n` choices are n of these, which differ in `choice` and `request_id` only."""

    request_id: str
    """Made by the server and unique; never a client's own label."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    choice: int = 0
    output_token_ids: tuple[int, ...] = ()
    """Tokens already delivered by another group: they count as output (penalties, max_tokens, positions), and the answer
    goes on after them."""
    eos_token_ids: tuple[int, ...] = ()
    grammar: str = ""
    """What the output must be, as llguidance writes grammars (engine/matching.py); "" for anything. It has been compiled once,
    so that it is known to be valid."""
    tenant: str = ""
    """Whose request it is, for the fair queue."""
    weight: float = 1.0
    """The tenant's share of a busy group, relative to the others."""
    priority: int = 0
    """Classes of lower numbers are admitted first."""
    cache_salt: bytes = b""
    """Prefix-cache blocks are shared only between requests of equal salt, and of the same adapter."""
    adapter: AdapterRef | None = None
    """What the model's weights are changed by for this request; None is the model itself."""
    deadline_s: float | None = None
    """Seconds from acceptance after which the request ends with FinishReason.DEADLINE."""
    runs_alone: bool = False
    """No other sequence runs in the group while this one does: it may be what ends groups."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural logarithm) of one token, and the most likely alternatives at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went inside the group, in seconds."""

    queue_s: float = 0.0
    """From acceptance to the first step that computed any of it."""
    prefill_s: float = 0.0
    """From there to the first output token."""
    decode_s: float = 0.0
    """From there to the last token."""


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step brought for one request. The one with a finish_reason is the last."""

    request_id: str
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of token_ids when asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Prompt positions in order, continuing where the last output left off."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended it, which is the last of token_ids, when that was an end-of-sequence or stop token."""
    error: str = ""
    """With FinishReason.ERROR: what happened, fit for the client to read."""
    error_kind: str = ""
    """With FinishReason.ERROR: "unavailable" (the group is lost), "numerical_error", "constraint_error" (the grammar allows no
    token here, or became too complex), or "adapter_failed" (the request's adapter could not be loaded)."""
    was_waiting: bool = False
    """With "unavailable": the ranks never heard of it, or they are well and stop; it is not what ended them."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache gave."""
    num_accepted_tokens: int = 0
    """Output tokens until now that were drafted before they were drawn."""
    num_rejected_tokens: int = 0
    """Tokens that were drafted until now and not delivered. They are no output."""
    timings: Timings | None = None
    """Up to now. Set on every output, because a front end that finds a stop string waits for no other."""
