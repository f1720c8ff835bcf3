"""A backend whose tokens are a function of seed, choice and position, and come together by chance, as in runs of one request."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from bench.support.fake_backend import EOS, TIMINGS, FakeBackend
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from serving.contracts.group_link import GroupOutputs

PIECES = tuple("ab é中🙂 xyz. ").__add__(("ab", "\n"))
"""What an answer is made of: characters of one to four bytes."""


def drawn_bytes(seed: int, choice: int, num_bytes: int) -> bytes:
    """Text of at least so many bytes, in whole characters."""
    draw, text = random.Random(f"{seed}:{choice}"), b""
    while len(text) < num_bytes:
        text += draw.choice(PIECES).encode()
    return text


def answer(request: EngineRequest) -> tuple[list[int], FinishReason]:
    """Token ids of a choice, and why it ends. Some end by themselves."""
    sampling = request.sampling
    token_ids = list(drawn_bytes(sampling.seed, request.choice, sampling.max_tokens)[: sampling.max_tokens])
    end = own_end(sampling.seed, request.choice, sampling.max_tokens)
    if sampling.ignore_eos or end >= sampling.max_tokens:
        return token_ids, FinishReason.LENGTH
    return [*token_ids[:end], EOS], FinishReason.STOP


def own_end(seed: int, choice: int, max_tokens: int) -> int:
    """After how many tokens the choice ends by itself, unless `max_tokens` are fewer."""
    return random.Random(f"end {seed}:{choice}").randrange(2 * max_tokens + 1)


def logprob(value: int, number: int) -> TokenLogprobs:
    """Any function of token and position."""
    (noise,) = struct.unpack("<H", struct.pack("<H", (value * 31 + number * 7) % 65536))
    return TokenLogprobs(value, -noise / 1000, ((value, -noise / 1000), (value + 1, -noise / 500)))


class DrawnGroups(FakeBackend):
    """`together(draw)` is how many tokens of a choice a step brings; None brings one."""

    def __init__(self, together: Callable[[], int] | None = None, **cards: object) -> None:
        super().__init__(**cards)  # type: ignore[arg-type]
        self.together = together or (lambda: 1)
        self.on_step: Callable[[], None] = lambda: None
        self.num_started = 0

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncIterator[GroupOutputs]:
        self.num_started += 1
        self.requests = list(requests)
        yield GroupOutputs("group-1", ())
        open_choices = {request.choice: (request, *answer(request)) for request in requests}
        done = dict.fromkeys(open_choices, 0)
        for request in requests:
            if request.sampling.prompt_logprobs is not None:
                for part in _in_parts(_prompt_logprobs(request), self.together):
                    yield GroupOutputs("group-1", (_output(request, prompt_logprobs=part),))
        while open_choices:
            await asyncio.sleep(0)
            self.on_step()
            for choice in list(open_choices):
                request, token_ids, reason = open_choices[choice]
                begin = done[choice]
                end = done[choice] = min(len(token_ids), begin + self.together())
                new = tuple(token_ids[begin:end])
                changes: dict[str, object] = {"token_ids": new}
                if request.sampling.logprobs is not None:
                    changes["logprobs"] = tuple(logprob(token, begin + i) for i, token in enumerate(new))
                if end == len(token_ids):
                    del open_choices[choice]
                    changes["finish_reason"] = reason
                    changes["stop_token_id"] = EOS if reason is FinishReason.STOP else None
                yield GroupOutputs("group-1", (_output(request, **changes),))


def _prompt_logprobs(request: EngineRequest) -> list[TokenLogprobs]:
    return [logprob(token, position) for position, token in enumerate(request.prompt_token_ids)][1:]


def _in_parts(tokens: list[TokenLogprobs], together: Callable[[], int]) -> Sequence[tuple[TokenLogprobs, ...]]:
    parts, begin = [], 0
    while begin < len(tokens):
        end = begin + together()
        parts.append(tuple(tokens[begin:end]))
        begin = end
    return parts


def _output(request: EngineRequest, **changes: object) -> EngineOutput:
    values = {"request_id": request.request_id, "choice": request.choice, "num_cached_tokens": 1, "timings": TIMINGS}
    return EngineOutput(**(values | changes))  # type: ignore[arg-type]
