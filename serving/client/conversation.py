"""A conversation that goes on for as long as somebody talks: what no longer fits the model is left out, oldest first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from protos import inference_pb2 as pb
from serving.client.client import CONNECT_TIMEOUT_S, chat_prompt

Messages = list[tuple[str, str]]
"""(role, content), oldest first."""

MIN_ANSWER_TOKENS = 16
"""Less room than this for an answer is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What is asked, and how long its answer may be."""

    messages: Messages
    """From the end of what was given, with its system message."""
    max_tokens: int
    num_left_out: int
    """Messages that no longer fit."""


def fit(stub: Any, card: pb.ModelCard, messages: Sequence[tuple[str, str]], max_tokens: int) -> Room | None:
    """The conversation's end that leaves room for an answer of at most `max_tokens`. None where the last message alone leaves
    none. Raises grpc.RpcError."""
    system = [message for message in messages[:1] if message[0] == "system"]
    rest = list(messages[len(system) :])
    num_left_out = 0
    while rest:
        room = card.max_model_len - _num_tokens(stub, card.name, [*system, *rest], card.max_model_len)
        if room >= min(MIN_ANSWER_TOKENS, max_tokens):
            return Room(messages=[*system, *rest], max_tokens=min(max_tokens, room), num_left_out=num_left_out)
        # A question goes with its answer: the format may want them to alternate.
        num_gone = 2 if len(rest) > 2 else len(rest)
        rest, num_left_out = rest[num_gone:], num_left_out + num_gone
    return None


def _num_tokens(stub: Any, model: str, messages: Messages, too_many: int) -> int:
    request = pb.TokenizeRequest(model=model, chat=chat_prompt(messages).chat)
    try:
        return len(stub.Tokenize(request, timeout=CONNECT_TIMEOUT_S).token_ids)
    except grpc.RpcError as error:
        if "cannot fit into max_model_len" in (error.details() or ""):  # so long that it was not tokenised
            return too_many
        raise
