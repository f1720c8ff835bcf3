"""One client request from a query to its chunks or scores. Knows nothing of the wire: every front end shares it."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime

import msgspec

from model_parallel.engine.request import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from model_parallel.errors import RequestError
from serving.config import LimitsConfig
from serving.contracts.accounts import Accounts, OpenAccounts, Principal
from serving.contracts.errors import (
    CancelledInGroupError,
    DeadlineExceededError,
    GroupCallLostError,
    GroupDrainingError,
    GroupRefusedError,
    GroupSilentError,
    GroupUnavailableError,
)
from serving.contracts.group_link import GroupOutputs
from serving.contracts.models import ModelCard
from serving.gateway.core.admission import RecentRefusals, SharedRoom
from serving.gateway.core.backend import Backend
from serving.gateway.core.call import Call
from serving.gateway.core.choices import Choice, Chunk, Summary
from serving.gateway.core.constraints import GrammarText, grammar_of
from serving.gateway.core.demand import DemandCounter
from serving.gateway.core.fields import DRAWN_SEED_BITS
from serving.gateway.core.grammars import GrammarChecker, WrongSchemaError
from serving.gateway.core.metering import Meter
from serving.gateway.core.prompts import PromptEncoder
from serving.gateway.core.resume_tokens import KEY_BYTES, AskedStream, ResumeTokens, Stream
from serving.gateway.core.resumption import MAX_RECOVERY_PAUSE_S, MIN_RECOVERY_PAUSE_S, RECOVERY_TIMEOUT_S, Resumption
from serving.gateway.core.tools import tool_grammar
from serving.gateway.core.validate import (
    ChatPrompt,
    GenerateQuery,
    ScoreQuery,
    TextPrompt,
    TokenizeQuery,
    check_delivered,
    check_generate,
    check_score,
    check_token_ids,
    check_tokenize,
    find_model,
    output_budget,
)
from serving.text.token_table import token_table
from serving.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SAME_NAME = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "ignore_eos", "logprobs", "prompt_logprobs",
)  # fmt: skip


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
        accounts: Accounts | None = None,
        resume_tokens: ResumeTokens | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_concurrent_requests: int = 1024,
    ) -> None:
        """`resume_tokens` are those of the deployment; unset, streams are resumed by this gateway alone. Of the
        `max_concurrent_requests` no tenant fills all with requests that wait for a grammar's trial."""
        self.clock = clock
        self._room_for_trials = SharedRoom(max_concurrent_requests)
        self._tokens = resume_tokens or ResumeTokens(secrets.token_bytes(KEY_BYTES))
        self.models: Mapping[str, ModelCard] = backend.models
        self.tokenizers = dict(tokenizers)
        self._encoders = {
            name: PromptEncoder(card, tokenizers[name]) for name, card in backend.models.items() if not card.parent
        }
        self._limits = limits
        self._backend = backend
        self._accounts: Accounts = accounts or OpenAccounts()
        self._refusals = RecentRefusals(clock)
        self.demand = DemandCounter(self._encoders)
        self.grammars = {
            card.name: self._checker(card, tokenizers[card.name]) for card in backend.models.values() if not card.parent
        }

    def _checker(self, card: ModelCard, tokenizer: Tokenizer) -> GrammarChecker:
        return GrammarChecker(
            lambda: token_table(tokenizer, card.vocab_size, card.eos_token_ids),
            self._limits.max_grammar_compile_s,
            self._room_for_trials,
        )

    def close(self) -> None:
        """End what runs beside the requests."""
        for checker in self.grammars.values():
            checker.close()

    async def set_model(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        """Be ready for a model that the backend is about to serve, or to serve with another card."""
        encoder = await asyncio.to_thread(PromptEncoder, card, tokenizer)
        self._encoders[card.name], self.tokenizers[card.name] = encoder, tokenizer
        self.demand.add_model(card.name)
        if (old := self.grammars.get(card.name)) is not None:
            old.close()
        self.grammars[card.name] = self._checker(card, tokenizer)

    def forget_model(self, name: str) -> None:
        """The backend does not serve it any more. Requests that have begun go on."""
        del self._encoders[name], self.tokenizers[name]
        self.demand.forget_model(name)
        self.grammars.pop(name).close()

    def begin(self, query: GenerateQuery, call: Call) -> Stream:
        """An answer that is not streamed, with the seed that was asked for or is drawn here."""
        return Stream(
            billed_id=call.request_id,
            seed=draw_seed() if query.seed is None else query.seed,
            created_unix_s=int(time.time()),
        )

    def begin_stream(
        self,
        query: GenerateQuery,
        call: Call,
        request: bytes,
        token: bytes | None = None,
        delivered: Sequence[int] = (),
        token_field: str = "resume_token",
    ) -> Stream:
        """A streamed answer; with a `token`, one that was broken after `delivered` tokens of each choice.

        `request` is everything that changes a byte of the answer. Raises what `ResumeTokens.resume` and `model_for` do.
        """
        card = self.model_for(call, query.model)
        asked = AskedStream(request=request, tenant_id=call.principal.tenant_id, card=card, token_field=token_field)
        if token is None:
            seed = draw_seed() if query.seed is None else query.seed
            return self._tokens.begin(asked, request_id=call.request_id, seed=seed)
        stream = self._tokens.resume(token, asked, tuple(delivered))
        logger.info("request %s goes on with the stream of request %s", call.request_id, stream.billed_id)
        return stream

    async def generate(self, query: GenerateQuery, call: Call, stream: Stream) -> AsyncGenerator[Chunk, None]:
        """Chunks of all choices as they are made: the first n are the first prompt's, and so on. Close it (`aclose`) to
        end the request early. The query must be normalised.

        Of a stream that is resumed, what its client has comes again; a chunk is wholly among that or not at all.
        """
        card = self.model_for(call, query.model)
        encoder, tokenizer, num_choices = self._encoders[card.base], self.tokenizers[card.base], query.n or 1
        checker = self.grammars[card.base]
        sequences: list[tuple[tuple[int, ...], SamplingParams]] = []
        num_prompt_tokens = 0
        begun = datetime.fromtimestamp(stream.created_unix_s)  # a resumed stream has the prompt that it began with
        for field, prompt in check_generate(query, card, self._limits).items():
            token_ids = await encoder.encode(
                field, prompt, parse_special=bool(query.parse_special), tools=query.tools, now=begun
            )
            max_tokens = output_budget(len(token_ids), query.max_tokens, card, self._limits, field)
            if query.max_tokens is None:
                max_tokens = min(max_tokens, int(card.default_sampling.get("max_tokens", max_tokens)))
            num_prompt_tokens += len(token_ids)
            sampling = _sampling_params(query, card, seed=stream.seed, max_tokens=max_tokens)
            sequences += [(token_ids, sampling)] * num_choices
        check_delivered(stream.delivered, [sampling.max_tokens for _, sampling in sequences])
        grammar = _grammar(query, tokenizer)
        call.observer.generates(
            "chat" if isinstance(query.prompt, ChatPrompt) else "text_completion", num_choices, sequences[0][1]
        )
        choices = _choices(query, tokenizer, [token_ids for token_ids, _ in sequences])
        num_output_tokens = sum(sampling.max_tokens for _, sampling in sequences)
        meter = await self._meter(
            call, card, num_prompt_tokens, num_output_tokens, num_choices=num_choices, billed_id=stream.billed_id
        )
        with meter:
            # What the client has was made for it, even if this call ends before it has made it again.
            meter.num_completion_tokens = sum(stream.delivered)
            if grammar is not None:  # after the quota, so that nobody has trials without any
                grammar = await _checked(grammar, checker, query, tokenizer, call)
            requests = self._requests(card, call, sequences, "" if grammar is None else grammar.text)
            last: Chunk | None = None
            async with aclosing(self._run(card, requests, call, meter)) as outputs:
                async for output in outputs:
                    choice = choices[output.choice]
                    if choice.finished:  # by a stop string, which the group does not know of
                        continue
                    meter.took(output)
                    _raise_failure(output)
                    for chunk in choice.take_around(output, stream.num_delivered(output.choice)):
                        meter.num_completion_tokens = sum(
                            max(each.num_tokens, stream.num_delivered(index)) for index, each in enumerate(choices)
                        )
                        if all(choice.finished for choice in choices):
                            last = chunk
                            break
                        yield chunk
                    if last is not None:
                        break
            if last is None or last.finish_reason is None:
                raise RuntimeError("the backend ended before every choice did")
            summary = await meter.close(last.finish_reason)
        yield replace(last, summary=summary)

    async def score(self, query: ScoreQuery, call: Call) -> tuple[list[ScoredTokens], Summary]:
        """Scores of the continuations, in their order."""
        card = self.model_for(call, query.model)
        context, continuations = check_score(query, card, self._limits)
        encoder = self._encoders[card.base]
        pairs = [await encoder.encode_pair(context, index, end) for index, end in enumerate(continuations)]
        greedy = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=1)
        sequences = [(whole, msgspec.structs.replace(greedy, prompt_logprobs_start=start)) for whole, start in pairs]
        tokens: list[list[TokenLogprobs]] = [[] for _ in pairs]
        meter = await self._meter(call, card, sum(len(whole) for whole, _ in pairs), 0)
        with meter:
            requests = self._requests(card, call, sequences)
            async with aclosing(self._run(card, requests, call, meter)) as outputs:
                async for output in outputs:
                    meter.took(output)
                    _raise_failure(output)
                    tokens[output.choice] += output.prompt_logprobs
            if [len(scored) for scored in tokens] != [len(whole) - start for whole, start in pairs]:
                raise RuntimeError("the backend did not report every prompt log-probability that was asked for")
            summary = await meter.close(FinishReason.LENGTH)
        return [ScoredTokens(tokens=tuple(scored)) for scored in tokens], summary

    async def tokenize(self, query: TokenizeQuery, call: Call) -> tuple[int, ...]:
        """Token ids of a text or a conversation."""
        card = self.model_for(call, query.model)
        prompt = check_tokenize(query, card, self._limits)
        encoder = self._encoders[card.base]
        if isinstance(prompt, TextPrompt):
            return await encoder.encode_text(
                "text", prompt.text, add_bos=query.add_bos is not False, parse_special=bool(query.parse_special)
            )
        return await encoder.encode("messages", prompt)

    def detokenize(self, model: str, token_ids: Sequence[int], call: Call) -> str:
        """Text of token ids."""
        card = self.model_for(call, model)
        check_token_ids("token_ids", token_ids, card)
        return self.tokenizers[card.base].decode(token_ids)

    def visible_models(self, principal: Principal) -> list[ModelCard]:
        """Those that the sender may use, by name."""
        return [
            card
            for name, card in sorted(self.models.items())
            if (principal.models is None or name in principal.models) and card.is_visible_to(principal.tenant_id)
        ]

    def model_for(self, call: Call, name: str) -> ModelCard:
        """Without a name it is the one that the sender may use, where adapters do not count beside a model. Raises
        UnknownModelError, PermissionDeniedError, and ValidationError for no name where there are several."""
        if not name:
            visible = self.visible_models(call.principal)
            candidates = [card for card in visible if not card.parent] or visible
            name = candidates[0].name if len(candidates) == 1 else ""
        card = find_model(self.models, name, call.principal)
        call.principal.check_model(name)
        call.observer.resolved(name, card.base)
        return card

    def tokenizer_of(self, call: Call, name: str) -> Tokenizer:
        """Raises what `model_for` does."""
        return self.tokenizers[self.model_for(call, name).base]

    async def _meter(
        self,
        call: Call,
        card: ModelCard,
        num_prompt_tokens: int,
        num_output_tokens: int,
        *,
        num_choices: int = 1,
        billed_id: str = "",
    ) -> Meter:
        """Reserves the most that the request can use. Raises QuotaExceededError."""
        reservation = await self._accounts.reserve(
            call.principal,
            request_id=call.request_id,
            model=card.name,
            num_tokens=num_prompt_tokens + num_output_tokens,
            billed_id=billed_id,
        )
        return Meter(
            call, card.name, num_prompt_tokens, reservation, self.clock, num_choices=num_choices, billed_id=billed_id
        )

    async def _run(
        self, card: ModelCard, requests: list[EngineRequest], call: Call, meter: Meter
    ) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of the request, whichever groups run it: when one is lost, another goes on where it stopped.

        Raises GroupUnavailableError when no group accepts it at first, or none goes on within RECOVERY_TIMEOUT_S, and
        PoisonedRequestError when too many groups are lost while they run it.
        """
        self.demand.count(card.base, requests)
        self._refusals.check(card.base, max(1, card.num_groups), requests)
        trace_context = meter.submit()
        rest = Resumption(requests)
        recover_until_s = math.inf
        pause_s = MIN_RECOVERY_PAUSE_S
        is_begun = False
        while True:
            is_accepted = False
            try:
                steps = self._offer(card, rest.requests(self._time_left(call)), trace_context)
                async with aclosing(steps):
                    while step := await _next_within(steps, None if is_accepted else recover_until_s - self.clock()):
                        is_accepted = is_begun = True
                        recover_until_s, pause_s = math.inf, MIN_RECOVERY_PAUSE_S
                        meter.received(step)
                        for output in step.outputs:
                            yield rest.take(output)
                return
            except (GroupUnavailableError, GroupRefusedError) as error:
                if isinstance(error, GroupCallLostError) or (is_accepted and isinstance(error, GroupUnavailableError)):
                    rest.lose(error)
                if is_accepted:
                    meter.interrupted()
                recover_until_s = min(recover_until_s, self.clock() + RECOVERY_TIMEOUT_S)
                may_wait = is_begun or isinstance(error, GroupSilentError | GroupDrainingError | GroupCallLostError)
                if not may_wait or self.clock() >= recover_until_s:
                    raise
                if not self._is_served(card):  # it was removed, and no group of it will come
                    raise
                if isinstance(error, GroupRefusedError) and error.kind != "overloaded":
                    raise
                logger.info("request %s waits for a group that goes on: %s", call.request_id, error)
            if not is_accepted:  # Another group may take at once what one has lost.
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RECOVERY_PAUSE_S)

    async def _offer(
        self, card: ModelCard, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncGenerator[GroupOutputs, None]:
        """Offers the request to one group after another until one accepts it."""
        for num_others in reversed(range(max(1, card.num_groups))):
            if not self._is_served(card):
                raise GroupUnavailableError(f"model {card.base!r} is not served any more", may_have_run=False)
            try:
                async with aclosing(self._backend.generate(card.base, requests, trace_context)) as steps:
                    async for step in steps:
                        yield step
                return
            except GroupRefusedError as error:
                if error.kind != "overloaded" or not error.engine:
                    raise
                self._refusals.remember(card.base, error.engine, requests, error)
                if not num_others:
                    raise
                self._refusals.check(card.base, max(1, card.num_groups), requests)
            except GroupUnavailableError as error:
                if error.may_have_run or not num_others:
                    raise

    def _is_served(self, card: ModelCard) -> bool:
        """Still, and not another model by its name."""
        served = self.models.get(card.base)
        return served is not None and served.weights == card.weights

    def _time_left(self, call: Call) -> float | None:
        """Of the client's deadline; None without one. Raises DeadlineExceededError."""
        if call.timeout_s is None:
            return None
        left_s = call.timeout_s - (self.clock() - call.arrived_s)
        if left_s <= 0:
            raise DeadlineExceededError("the deadline passed before a replica group could answer")
        return left_s

    def _requests(
        self,
        card: ModelCard,
        call: Call,
        sequences: Sequence[tuple[tuple[int, ...], SamplingParams]],
        grammar: str = "",
    ) -> list[EngineRequest]:
        return [
            EngineRequest(
                request_id=f"{call.request_id}-{choice}",
                prompt_token_ids=prompt,
                sampling=sampling,
                choice=choice,
                eos_token_ids=card.eos_token_ids,
                grammar=grammar,
                deadline_s=self._time_left(call),
                cache_salt=call.principal.cache_salt,
                adapter=card.adapter,
                tenant=call.principal.tenant_id,
                weight=call.principal.weight,
                priority=call.principal.priority,
            )
            for choice, (prompt, sampling) in enumerate(sequences)
        ]


def _choices(query: GenerateQuery, tokenizer: Tokenizer, prompts: Sequence[tuple[int, ...]]) -> list[Choice]:
    """One for each of `prompts`, in which the prompt of several choices stands several times."""
    return [
        Choice(
            index,
            tokenizer,
            [stop for stop in query.stop if stop],
            prompt_token_ids=token_ids,
            reports_prompt=index % (query.n or 1) == 0,
            continues_text=_continues_text(query),
            shows_special=query.skip_special_tokens is False,
        )
        for index, token_ids in enumerate(prompts)
    ]


async def _checked(
    grammar: GrammarText, checker: GrammarChecker, query: GenerateQuery, tokenizer: Tokenizer, call: Call
) -> GrammarText:
    """The grammar; or a looser one, where only functions that may be loose are in the way. Raises what `check` does."""
    tools = query.tools
    try:
        await checker.check(grammar, call.principal.tenant_id)
    except WrongSchemaError as error:
        places = [] if tools is None else [index for index, _ in tools.callable_tools]
        unsupported = {places[number] for number in error.unsupported if number < len(places)}
        if tools is None or not (looser := unsupported & tools.loosenable):
            raise
        grammar = tool_grammar(
            tools, query.constraint, strips_space=_strips_space(query, tokenizer), loose=grammar.loose_tools | looser
        )
        await checker.check(grammar, call.principal.tenant_id)
    if tools is not None:
        call.ignore([f"{tools.tools[index].field_at(index)}.parameters" for index in sorted(grammar.loose_tools)])
    return grammar


def _grammar(query: GenerateQuery, tokenizer: Tokenizer) -> GrammarText | None:
    """What the answers must follow, which nobody has tried to compile; None for nothing. Raises ValidationError."""
    strips_space = _strips_space(query, tokenizer)
    if query.tools is not None and query.tools.is_used:
        return tool_grammar(query.tools, query.constraint, strips_space=strips_space)
    if query.constraint is not None:
        return grammar_of(query.constraint, strips_space=strips_space)
    return None


def _strips_space(query: GenerateQuery, tokenizer: Tokenizer) -> bool:
    return tokenizer.strips_leading_space and not _continues_text(query)


def _continues_text(query: GenerateQuery) -> bool:
    """The answer goes on where a text ends, so that a space that begins it belongs to it."""
    return not isinstance(query.prompt, ChatPrompt) or query.prompt.continues_last


def draw_seed() -> int:
    """For a request that brings none."""
    return secrets.randbits(DRAWN_SEED_BITS)


def _sampling_params(query: GenerateQuery, card: ModelCard, *, seed: int, max_tokens: int) -> SamplingParams:
    defaults = {field: value for field, value in card.default_sampling.items() if field in _SAME_NAME}
    given = defaults | {field: value for field in _SAME_NAME if (value := getattr(query, field)) is not None}
    given |= {"top_k": int(given["top_k"])} if "top_k" in given else {}
    if given.get("top_k", 0) >= card.vocab_size:
        del given["top_k"]  # keeps all, as without it
    return SamplingParams(
        **given,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=tuple(query.stop_token_ids),
        logit_bias=tuple(query.logit_bias),
    )


async def _next_within(steps: AsyncGenerator[GroupOutputs, None], timeout_s: float | None) -> GroupOutputs | None:
    """The next item, None at the end. Raises GroupUnavailableError when it takes longer."""
    if timeout_s is None or timeout_s == math.inf:
        return await anext(steps, None)
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(steps, None)
    except TimeoutError:
        raise GroupUnavailableError("no replica group could go on with the request in time") from None


def _raise_failure(output: EngineOutput) -> None:
    match output.finish_reason:
        case FinishReason.DEADLINE:
            raise DeadlineExceededError("the deadline passed before the answer was complete")
        case FinishReason.CANCELLED:
            raise CancelledInGroupError("the request was cancelled")
        case FinishReason.ERROR:
            raise RequestError(output.error, kind=output.error_kind)
