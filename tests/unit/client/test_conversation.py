"""A conversation is cut to what the model can read, and its answer to what is left."""

import grpc
import pytest

from protos import inference_pb2 as pb
from serving.client.conversation import MIN_ANSWER_TOKENS, Messages, fit

CARD = pb.ModelCard(name="tiny", max_model_len=100)


class TooLong(grpc.RpcError):
    def details(self) -> str:
        return "messages[0] has 9999 characters, which cannot fit into max_model_len, 100"


class Stub:
    """A character is a token."""

    def Tokenize(self, request: pb.TokenizeRequest, timeout: float) -> pb.TokenizeResponse:
        num_chars = sum(len(message.content) for message in request.chat.messages)
        if num_chars > 1000:
            raise TooLong
        return pb.TokenizeResponse(token_ids=[1] * num_chars)


def talk(*lengths: int, system: int = 0) -> Messages:
    roles = ("user", "assistant")
    said = [(roles[index % 2], "x" * length) for index, length in enumerate(lengths)]
    return ([("system", "s" * system)] if system else []) + said


@pytest.mark.parametrize(
    ("messages", "max_tokens", "expected"),
    [
        (talk(10), 50, (1, 50, 0)),
        (talk(10), 512, (1, 90, 0)),
        (talk(30, 30, 24), 512, (3, 16, 0)),
        (talk(30, 30, 25), 512, (1, 75, 2)),
        (talk(30, 30, 25, system=10), 512, (2, 65, 2)),
        (talk(20, 20, 20, 20, 20), 512, (3, 40, 2)),
        (talk(99), 1, (1, 1, 0)),
        (talk(9999, 1, 10), 512, (1, 90, 2)),
    ],
)
def test_what_fits(messages: Messages, max_tokens: int, expected: tuple[int, int, int]) -> None:
    room = fit(Stub(), CARD, messages, max_tokens)
    assert room is not None
    assert (len(room.messages), room.max_tokens, room.num_left_out) == expected
    assert room.messages[-1] == messages[-1]
    assert room.max_tokens >= min(MIN_ANSWER_TOKENS, max_tokens)


@pytest.mark.parametrize("messages", [talk(100), talk(85), talk(10, 10, 9999), talk(10, system=90)])
def test_nothing_fits(messages: Messages) -> None:
    assert fit(Stub(), CARD, messages, 512) is None
