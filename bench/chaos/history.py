"""What clients saw of their streams, and whether it is what they would have seen without any fault."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One choice of an answer, as one group alone gives it."""

    token_ids: tuple[int, ...]
    finish_reason: int


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a request must bring."""

    choices: tuple[Answer, ...]
    num_prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One message, as far as it is checked."""

    choice: int
    token_ids: tuple[int, ...]
    finish_reason: int
    usage: tuple[int, int] | None
    """Prompt and completion tokens; on the last message."""


@dataclass(kw_only=True)
class History:
    """One stream as its client recorded it."""

    chunks: list[Chunk] = field(default_factory=list)
    status: grpc.StatusCode | None = None
    """None until the stream has ended."""

    def record(self, message: Any) -> None:
        """A GenerateStreamResponse."""
        usage = (message.usage.prompt_tokens, message.usage.completion_tokens) if message.HasField("usage") else None
        self.chunks.append(
            Chunk(
                choice=message.index,
                token_ids=tuple(message.token_ids),
                finish_reason=message.finish_reason,
                usage=usage,
            )
        )


def violations(histories: Sequence[History], references: Sequence[Reference]) -> list[str]:
    """Everything in which the streams differ from their references; empty when there is nothing."""
    found = [f"{len(histories)} streams for {len(references)} requests"] if len(histories) != len(references) else []
    for number, (history, reference) in enumerate(zip(histories, references, strict=False)):
        found += [f"stream {number}: {what}" for what in _violations_of(history, reference)]
    return found


def _violations_of(history: History, reference: Reference) -> list[str]:
    found: list[str] = []
    delivered: dict[int, list[int]] = {choice: [] for choice in range(len(reference.choices))}
    ended: dict[int, int] = {}
    for chunk in history.chunks:
        if chunk.choice not in delivered:
            found.append(f"choice {chunk.choice} was not asked for")
            continue
        if chunk.choice in ended and chunk.token_ids:
            found.append(f"choice {chunk.choice} goes on after its end")
        expected = reference.choices[chunk.choice].token_ids
        found += _misplaced(chunk, delivered[chunk.choice], expected)
        delivered[chunk.choice] += chunk.token_ids
        if chunk.finish_reason:
            ended[chunk.choice] = chunk.finish_reason
    if history.status is not grpc.StatusCode.OK:
        found.append(f"the stream ended with {history.status}")
    for choice, answer in enumerate(reference.choices):
        if len(delivered[choice]) != len(answer.token_ids):
            found.append(f"choice {choice} has {len(delivered[choice])} tokens instead of {len(answer.token_ids)}")
        if ended.get(choice, 0) != answer.finish_reason:
            found.append(f"choice {choice} ended with {ended.get(choice, 0)} instead of {answer.finish_reason}")
    usage = (reference.num_prompt_tokens, sum(len(answer.token_ids) for answer in reference.choices))
    told = [chunk.usage for chunk in history.chunks if chunk.usage is not None]
    if told[-1:] != [usage]:
        found.append(f"usage is {told} instead of {usage}")
    return found


def _misplaced(chunk: Chunk, before: Sequence[int], expected: Sequence[int]) -> list[str]:
    """Whether a chunk is not what comes next."""
    begin, end = len(before), len(before) + len(chunk.token_ids)
    if chunk.token_ids == tuple(expected[begin:end]):
        return []
    for shift in range(1, 4):
        if chunk.token_ids == tuple(expected[begin - shift : end - shift]) and begin >= shift:
            return [f"choice {chunk.choice} repeats {shift} tokens at {begin}"]
        if chunk.token_ids == tuple(expected[begin + shift : end + shift]):
            return [f"choice {chunk.choice} lacks {shift} tokens at {begin}"]
    return [f"choice {chunk.choice} has other tokens from {begin} on"]


def check_faults(planned: Mapping[str, int], observed: Mapping[str, int]) -> list[str]:
    """A run in which a fault did not happen proves nothing about it."""
    return [
        f"{planned.get(name, 0)} faults of {name} were planned and {observed.get(name, 0)} happened"
        for name in sorted(planned.keys() | observed.keys())
        if planned.get(name, 0) != observed.get(name, 0)
    ]
