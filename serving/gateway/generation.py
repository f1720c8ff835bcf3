"""One client request from a query to its chunks or scores. Knows nothing of the wire: every front end shares it."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import msgspec

from model_parallel.engine.request import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    Timings,
    TokenLogprobs,
)
from model_parallel.errors import RequestError
from serving.config import LimitsConfig
from serving.gateway.backend import Backend, GroupUnavailableError, ModelCard
from serving.gateway.choices import Choice, Chunk, Summary
from serving.gateway.prompts import PromptEncoder
from serving.gateway.validate import (
    ChatPrompt,
    GenerateQuery,
    ScoreQuery,
    TextPrompt,
    TokenizeQuery,
    check_generate,
    check_score,
    check_token_ids,
    check_tokenize,
    find_model,
    output_budget,
)
from serving.tokenizer import Tokenizer

_SAME_NAME = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "ignore_eos", "logprobs", "prompt_logprobs",
)  # fmt: skip


class DeadlineExceededError(Exception):
    """The client's deadline passed first."""


class CancelledInGroupError(Exception):
    """The replica group was told to cancel the request by someone other than this gateway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a front end knows of a request besides its content."""

    request_id: str
    """Made by the server."""
    arrived_s: float
    """On the generator's clock."""
    timeout_s: float | None
    """Left of the client's deadline at arrival."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredTokens:
    """Log-probabilities of one continuation's tokens, each with the most likely alternative."""

    tokens: tuple[TokenLogprobs, ...]

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(token.logprob for token in self.tokens)

    @property
    def is_greedy(self) -> bool:
        """Greedy decoding of the context would have given it."""
        return all(token.top[0][0] == token.token_id for token in self.tokens)


class Generator:
    """Runs the requests of one gateway on the backend. Raises what `interceptors` maps to status codes."""

    def __init__(
        self,
        backend: Backend,
        tokenizers: Mapping[str, Tokenizer],
        limits: LimitsConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.models: Mapping[str, ModelCard] = backend.models
        self.tokenizers = tokenizers
        self._encoders = {name: PromptEncoder(card, tokenizers[name]) for name, card in backend.models.items()}
        self._limits = limits
        self._backend = backend

    async def generate(self, query: GenerateQuery, call: Call, seed: int) -> AsyncGenerator[Chunk, None]:
        """Chunks of all choices as they are made. Close it (`aclose`) to end the request early."""
        card = find_model(self.models, query.model)
        prompt = await self._encoders[card.name].encode("prompt", check_generate(query, card, self._limits))
        max_tokens = output_budget(len(prompt), query.max_tokens, card)
        sampling = _sampling_params(query, seed=seed, max_tokens=max_tokens)
        num_choices = query.n or 1
        tokenizer, continues_text = self.tokenizers[card.name], not isinstance(query.prompt, ChatPrompt)
        choices = [Choice(index, tokenizer, query.stop, continues_text=continues_text) for index in range(num_choices)]
        submitted_s = self.clock()
        requests = self._requests(card, call, submitted_s, [(prompt, sampling)] * num_choices)
        last: Chunk | None = None
        async with aclosing(self._run(card, requests)) as outputs:
            async for output in outputs:
                choice = choices[output.choice]
                if choice.finished:  # by a stop string, which the group does not know of
                    continue
                _raise_failure(output)
                chunk = choice.take(output)
                if all(choice.finished for choice in choices):
                    last = chunk
                    break
                yield chunk
        if last is None:
            raise RuntimeError("the backend ended before every choice did")
        last_outputs = [choice.last_output for choice in choices]
        num_tokens = sum(choice.num_tokens for choice in choices)
        yield replace(last, summary=self._summary(call, submitted_s, len(prompt), num_tokens, last_outputs))

    async def score(self, query: ScoreQuery, call: Call) -> tuple[list[ScoredTokens], Summary]:
        """Scores of the continuations, in their order."""
        card = find_model(self.models, query.model)
        context, continuations = check_score(query, card, self._limits)
        encoder = self._encoders[card.name]
        pairs = [await encoder.encode_pair(context, index, end) for index, end in enumerate(continuations)]
        submitted_s = self.clock()
        greedy = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=1)
        sequences = [(whole, msgspec.structs.replace(greedy, prompt_logprobs_start=start)) for whole, start in pairs]
        tokens: list[list[TokenLogprobs]] = [[] for _ in pairs]
        last_outputs: list[EngineOutput | None] = [None] * len(pairs)
        requests = self._requests(card, call, submitted_s, sequences)
        async with aclosing(self._run(card, requests)) as outputs:
            async for output in outputs:
                _raise_failure(output)
                tokens[output.choice] += output.prompt_logprobs
                if output.finish_reason is not None:
                    last_outputs[output.choice] = output
        if [len(scored) for scored in tokens] != [len(whole) - start for whole, start in pairs]:
            raise RuntimeError("the backend did not report every prompt log-probability that was asked for")
        num_prompt_tokens = sum(len(whole) for whole, _ in pairs)
        summary = self._summary(call, submitted_s, num_prompt_tokens, 0, last_outputs)
        return [ScoredTokens(tokens=tuple(scored)) for scored in tokens], summary

    async def tokenize(self, query: TokenizeQuery) -> tuple[int, ...]:
        """Token ids of a text or a conversation."""
        card = find_model(self.models, query.model)
        prompt = check_tokenize(query, card, self._limits)
        encoder = self._encoders[card.name]
        if isinstance(prompt, TextPrompt):
            return await encoder.encode_text("text", prompt.text, add_bos=query.add_bos is not False)
        return await encoder.encode("messages", prompt)

    def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        card = find_model(self.models, model)
        check_token_ids("token_ids", token_ids, card)
        return self.tokenizers[card.name].decode(token_ids)

    async def _run(self, card: ModelCard, requests: list[EngineRequest]) -> AsyncGenerator[EngineOutput, None]:
        steps = self._backend.generate(card.name, requests)
        async with aclosing(steps):
            async for outputs in steps:
                for output in outputs:
                    yield output

    def _requests(
        self, card: ModelCard, call: Call, now_s: float, sequences: Sequence[tuple[tuple[int, ...], SamplingParams]]
    ) -> list[EngineRequest]:
        deadline_s = None
        if call.timeout_s is not None:
            deadline_s = call.timeout_s - (now_s - call.arrived_s)
            if deadline_s <= 0:
                raise DeadlineExceededError("the deadline passed before a replica group got the request")
        return [
            EngineRequest(
                request_id=f"{call.request_id}-{choice}",
                prompt_token_ids=prompt,
                sampling=sampling,
                choice=choice,
                eos_token_ids=card.eos_token_ids,
                deadline_s=deadline_s,
            )
            for choice, (prompt, sampling) in enumerate(sequences)
        ]

    def _summary(
        self,
        call: Call,
        submitted_s: float,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        last_outputs: Sequence[EngineOutput | None],
    ) -> Summary:
        known = [output for output in last_outputs if output is not None]
        timings = [output.timings for output in known if output.timings is not None]
        group = None
        if timings:
            group = Timings(
                queue_s=max(timing.queue_s for timing in timings),
                prefill_s=max(timing.prefill_s for timing in timings),
                decode_s=max(timing.decode_s for timing in timings),
            )
        return Summary(
            num_prompt_tokens=num_prompt_tokens,
            num_completion_tokens=num_completion_tokens,
            num_cached_tokens=sum(output.num_cached_tokens for output in known),
            group=group,
            gateway_s=submitted_s - call.arrived_s,
            total_s=self.clock() - call.arrived_s,
        )


def _sampling_params(query: GenerateQuery, *, seed: int, max_tokens: int) -> SamplingParams:
    given = {field: value for field in _SAME_NAME if (value := getattr(query, field)) is not None}
    return SamplingParams(
        **given,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=tuple(query.stop_token_ids),
        logit_bias=tuple(query.logit_bias),
    )


def _raise_failure(output: EngineOutput) -> None:
    match output.finish_reason:
        case FinishReason.DEADLINE:
            raise DeadlineExceededError("the deadline passed before the answer was complete")
        case FinishReason.CANCELLED:
            raise CancelledInGroupError("the request was cancelled")
        case FinishReason.ERROR if output.error_kind == "unavailable":
            raise GroupUnavailableError(output.error)
        case FinishReason.ERROR:
            raise RequestError(output.error, kind=output.error_kind)
