"""A tokenizer of bytes and a backend that says what it is told to."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import cache

import numpy as np

from model_parallel.config import TokenTable
from model_parallel.engine.matching import GrammarCompiler, Matcher, allowed_bits
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, Timings, TokenLogprobs
from serving.contracts.group_link import GroupOutputs
from serving.contracts.models import Licence, ModelCard
from serving.text.tokenizer import Part

BOS, EOS, IM_START, IM_END, AB = 256, 257, 258, 259, 260
TIMINGS = Timings(queue_s=0.25, prefill_s=0.5, decode_s=0.75)

Script = Callable[[Sequence[EngineRequest]], AsyncIterator[tuple[EngineOutput, ...]]]


class ByteTokenizer:
    """Token b is byte b; 256 to 259 are control tokens; 260 is "ab", so that tokens depend on what follows."""

    vocab_size = 261
    bos_token_id = BOS
    eos_token_ids = (EOS,)
    control_token_ids = frozenset({BOS, EOS, IM_START, IM_END})
    strips_leading_space = False

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        ids = [BOS] if add_bos else []
        if parse_special and "</s>" in text:
            before, _, after = text.partition("</s>")
            rest = self.encode(after, add_bos=False, parse_special=True)
            return [*ids, *self.encode(before, add_bos=False), EOS, *rest]
        data = text.encode()
        position = 0
        while position < len(data):
            is_ab = data[position : position + 2] == b"ab"
            ids.append(AB if is_ab else data[position])
            position += 2 if is_ab else 1
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= self.vocab_size or token_id in self.control_token_ids:
            return b""
        return b"ab" if token_id == AB else bytes([token_id])

    def spelt_bytes(self, token_id: int) -> bytes:
        return (self.control_token_text(token_id) or "").encode() or self.token_bytes(token_id)

    def control_token_text(self, token_id: int | None) -> str | None:
        return {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}.get(token_id or 0)

    def control_token_id(self, text: str) -> int:
        return {"<|im_start|>": IM_START, "<|im_end|>": IM_END}[text]

    def has_control_token(self, text: str) -> bool:
        return text in ("<|im_start|>", "<|im_end|>")

    def encode_parts(self, parts: Iterable[Part], *, every_part_is_first: bool = False) -> list[int]:
        ids: list[int] = []
        for part in parts:
            pieces = re.split(r"(<\|im_start\|>|<\|im_end\|>)", part.text) if part.is_markup else [part.text]
            for piece in pieces:
                is_control = part.is_markup and self.has_control_token(piece)
                ids += [self.control_token_id(piece)] if is_control else self.encode(piece, add_bos=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


def card(name: str = "tiny", *, chat_format: str = "chatml", **changes: object) -> ModelCard:
    values = {
        "name": name,
        "source": "/secret/place",
        "architecture": "LlamaForCausalLM",
        "num_parameters": 1234,
        "vocab_size": 270,  # wider than the tokenizer
        "max_model_len": 100,
        "bos_token_id": BOS,
        "eos_token_ids": (EOS,),
        "chat_format": chat_format,
        "dtype": "float32",
        "device": "cpu",
        "tensor_parallel_size": 2,
        "num_groups": 1,
        "deterministic": True,
        "kernels": "reference",
        "licence": Licence(name="Apache-2.0"),
    }
    return ModelCard(**(values | changes))  # type: ignore[arg-type]


class FakeBackend:
    """Runs `script` for each request, and remembers what came and what was closed."""

    def __init__(self, script: Script | None = None, cards: Sequence[ModelCard] = ()) -> None:
        self.models: Mapping[str, ModelCard] = {
            each.name: each for each in cards or (card(), card("plain", chat_format=""))
        }
        self.script = script or say("Paris")
        self.requests: list[EngineRequest] = []
        self.num_open = 0
        self.started = asyncio.Event()
        self.healthy = dict.fromkeys(self.models, True)

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncIterator[GroupOutputs]:
        assert model in self.models
        self.requests = list(requests)
        self.num_open += 1
        try:
            async for outputs in self.script(requests):
                self.started.set()
                yield GroupOutputs("group-1", outputs)
        finally:
            self.num_open -= 1

    async def can_serve(self, model: str) -> bool:
        return self.healthy[model]

    async def closed(self) -> None:
        """Wait until every iterator is closed. Raises TimeoutError when one is left."""
        async with asyncio.timeout(60):
            while self.num_open:
                await asyncio.sleep(0.005)


def steps(*answers: Sequence[Sequence[int]], finish: FinishReason = FinishReason.STOP, eos: bool = True) -> Script:
    """Step i brings answers[c][i] for choice c, of those that have an i-th; the last one ends the choice."""

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        for step in range(max(map(len, answers))):
            await asyncio.sleep(0)
            yield tuple(
                _output(request, answer, step, finish, eos)
                for request, answer in zip(requests, answers, strict=True)
                if step < len(answer)
            )

    return script


def _output(
    request: EngineRequest, answer: Sequence[Sequence[int]], step: int, finish: FinishReason, eos: bool
) -> EngineOutput:
    is_last = step == len(answer) - 1
    ends = is_last and eos and finish is FinishReason.STOP
    token_ids = (*answer[step], *((EOS,) if ends else ()))
    top = request.sampling.logprobs
    return EngineOutput(
        request_id=request.request_id,
        choice=request.choice,
        token_ids=token_ids,
        logprobs=()
        if top is None
        else tuple(
            TokenLogprobs(token, -0.5, tuple((other, -0.5 - other) for other in range(top))) for token in token_ids
        ),
        finish_reason=finish if is_last else None,
        stop_token_id=EOS if ends else None,
        num_cached_tokens=3,
        timings=TIMINGS,
    )


def say(*texts: str, finish: FinishReason = FinishReason.STOP) -> Script:
    """Choice c answers texts[c], a byte a step."""
    return steps(*([[byte] for byte in text.encode()] for text in texts), finish=finish)


async def for_ever(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
    """One token, then nothing until it is closed."""
    yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord("x"),)),)
    await asyncio.Event().wait()


_COMPILER_TABLE = TokenTable.of([ByteTokenizer().token_bytes(token_id) for token_id in range(270)], (EOS,))
_CLOSING = frozenset(b'"}],:{')
_MAX_DRAWN = 4000


@cache
def _compiler() -> GrammarCompiler:
    return GrammarCompiler(_COMPILER_TABLE)


def obey(*texts: str, seed: int = 0) -> Script:
    """Choice c draws what its request's grammar allows, some tokens a step, as a model of no knowledge would, but one that likes
    to come to an end; or it says texts[c] where the request has no grammar, or that text follows it."""

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        answers = [
            _drawn(request, (texts or ("Paris",))[choice % max(1, len(texts))], seed + choice)
            for choice, request in enumerate(requests)
        ]
        parts = ([answer[i : i + 8] for i in range(0, len(answer), 8)] or [[]] for answer in answers)
        async for outputs in steps(*parts, eos=False)(requests):
            yield outputs

    return script


def _drawn(request: EngineRequest, text: str, seed: int) -> list[int]:
    token_ids = list(text.encode())
    if not request.grammar:
        return token_ids
    grammar = _compiler().compile(request.grammar)
    matcher = Matcher(grammar, spares_end=False)
    for token_id in token_ids:
        matcher.consume(token_id)
    mask_W = np.zeros(matcher.num_words, dtype=np.int32)
    if matcher.is_complete or (matcher.is_open and matcher.fill(mask_W) and mask_W[EOS // 32] >> (EOS % 32) & 1):
        return token_ids
    draw = np.random.default_rng(seed)
    matcher, token_ids = Matcher(grammar, spares_end=False), []
    while not matcher.is_complete and len(token_ids) < _MAX_DRAWN:
        assert matcher.fill(mask_W)
        allowed = np.flatnonzero(allowed_bits(mask_W[None], range(270))[0]).tolist()
        liked = [token_id for token_id in allowed if token_id in _CLOSING or token_id == EOS]
        token_id = int(draw.choice(liked if liked and draw.random() < 0.4 else allowed))
        matcher.consume(token_id)
        token_ids += [] if token_id == EOS else [token_id]
    return token_ids
