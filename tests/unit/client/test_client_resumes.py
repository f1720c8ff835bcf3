"""What the client does when a gateway goes away in the middle of a stream, and what it leaves to its caller."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serving.client import client as client_module
from serving.client.client import Client
from serving.client.resuming import FIRST_PAUSE_S, LAST_PAUSE_S, RESUME_WITHIN_S, Patience
from tests.support.waiting import PATIENCE_S

UNAVAILABLE, EXHAUSTED, INVALID = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
)
Part = pb.GenerateStreamResponse | tuple[grpc.StatusCode, int | None]
"""A message, or an end: status and grpc-retry-pushback-ms."""


def message(*token_ids: int, index: int = 0, token: bytes = b"", num_prompt_logprobs: int = 0) -> Part:
    return pb.GenerateStreamResponse(
        index=index,
        token_ids=token_ids,
        resume_token=token,
        prompt_logprobs=[pb.TokenLogprobs()] * num_prompt_logprobs,
    )


class Scripted(inference_pb2_grpc.InferenceServicer):
    """Answers one call after the other as it is told."""

    def __init__(self, *answers: list[Part]) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self._answers = iter(answers)

    def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateStreamResponse]:
        self.requests.append(request)
        for part in next(self._answers):
            if isinstance(part, tuple):
                code, pushback_ms = part
                if pushback_ms is not None:
                    context.set_trailing_metadata((("grpc-retry-pushback-ms", str(pushback_ms)),))
                context.abort(code, "scripted")
            yield part


@contextmanager
def served(*gateways: Scripted) -> Iterator[list[str]]:
    """Their addresses."""
    with ExitStack() as stack:
        addresses = []
        for gateway in gateways:
            server = grpc.server(ThreadPoolExecutor(4))
            inference_pb2_grpc.add_InferenceServicer_to_server(gateway, server)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            server.start()
            stack.callback(lambda server: server.stop(0).wait(PATIENCE_S), server)
        yield addresses


@pytest.fixture(autouse=True)
def pauses_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have waited."""
    found: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", found.append)
    return found


def read(addresses: list[str], connects: bool = True, timeout_s: float = PATIENCE_S) -> tuple[list[int], int]:
    """All token ids, and how often the stream was asked for again."""
    with Client(*addresses) as client:
        if connects:
            client.wait_until_connected(PATIENCE_S)
        chunks, times = client.stream(pb.GenerateRequest(model="m"), timeout_s=timeout_s)
        return [token for chunk in chunks for token in chunk.token_ids], times.num_resumed


@pytest.mark.parametrize("end", [(UNAVAILABLE, None), (UNAVAILABLE, 20), (grpc.StatusCode.UNKNOWN, None)])
def test_it_asks_the_next_gateway_for_what_has_not_come(end: Part) -> None:
    first = Scripted(
        [
            message(token=b"t1", num_prompt_logprobs=2),
            message(1),
            message(7, 8, 9, index=2),
            message(2, 3, token=b"t2"),
            end,
        ]
    )
    second = Scripted([message(4, token=b"t3"), (UNAVAILABLE, None)])
    third = Scripted([message(5)])
    with served(first, second, third) as addresses:
        assert read(addresses) == ([1, 7, 8, 9, 2, 3, 4, 5], 2)
    assert first.requests == [pb.GenerateRequest(model="m")]
    (again,) = second.requests
    assert (again.model, again.resume_token, list(again.resume_from.num_tokens)) == ("m", b"t2", [3, 0, 3])
    assert again.resume_from.num_prompt_logprobs == 2
    (last,) = third.requests
    assert (last.resume_token, list(last.resume_from.num_tokens)) == (b"t3", [4, 0, 3])


@pytest.mark.parametrize("num_streams", [2, 3, 4])
def test_streams_that_are_lost_together_go_to_the_next_gateway_together(num_streams: int) -> None:
    """Each told the client to go on, and the second brought it back to the gateway that was lost."""
    first = Scripted(*([message(1, token=b"t"), (UNAVAILABLE, None)] for _ in range(num_streams)))
    second = Scripted(*([message(2)] for _ in range(num_streams)))
    with served(first, second) as addresses, Client(*addresses) as client:
        client.wait_until_connected(PATIENCE_S)
        streams = [client.stream(pb.GenerateRequest(model="m"), timeout_s=PATIENCE_S)[0] for _ in range(num_streams)]
        assert [list(next(stream).token_ids) for stream in streams] == [[1]] * num_streams
        assert [[list(chunk.token_ids) for chunk in stream] for stream in streams] == [[[2]]] * num_streams
        assert client.address == addresses[1]
    assert (len(first.requests), len(second.requests)) == (num_streams, num_streams)


def test_the_only_gateway_is_asked_again(pauses_s: list[float]) -> None:
    gateway = Scripted(
        [message(1, token=b"t"), (UNAVAILABLE, None)], [(EXHAUSTED, 3000)], [(UNAVAILABLE, 5)], [message(2)]
    )
    with served(gateway) as addresses:
        assert read(addresses) == ([1, 2], 3)
    assert pauses_s[1] == 3.0, "as the server has asked for"


@pytest.mark.parametrize(
    "parts",
    [
        [message(1), (UNAVAILABLE, None)],
        [message(1, token=b"t"), (UNAVAILABLE, -1)],
        [message(1, token=b"t"), (EXHAUSTED, -1)],
        [message(1, token=b"t"), (INVALID, -1)],
        [message(1, token=b"t"), (grpc.StatusCode.DEADLINE_EXCEEDED, None)],
        [(UNAVAILABLE, 10)],
        [(EXHAUSTED, 10)],
    ],
    ids=["no token", "pointless", "quota", "invalid", "deadline", "not begun", "full"],
)
def test_what_does_not_help_is_not_tried(parts: list[Part]) -> None:
    gateway = Scripted(parts, [message(2)])
    with served(gateway) as addresses, pytest.raises(grpc.RpcError):
        read(addresses)
    assert len(gateway.requests) == 1


def test_a_connection_that_breaks_before_the_first_message_is_tried_again() -> None:
    gateway = Scripted([(UNAVAILABLE, None)], [message(1, token=b"t")])
    with served(gateway) as addresses:
        assert read(addresses) == ([1], 0)


def test_who_is_not_there_is_told_at_once(pauses_s: list[float]) -> None:
    with pytest.raises(grpc.RpcError):
        read(["127.0.0.1:1"], connects=False)
    assert pauses_s == []


def test_of_several_the_one_that_is_there_answers() -> None:
    gateway = Scripted([message(1, token=b"t")])
    with served(gateway) as addresses:
        assert read(["127.0.0.1:1", *addresses])[0] == [1]


def test_who_leaves_ends_the_call() -> None:
    gateway = Scripted([message(1, token=b"t"), message(2), message(3)])
    with served(gateway) as addresses, Client(*addresses) as client:
        chunks, _ = client.stream(pb.GenerateRequest(), timeout_s=PATIENCE_S)
        assert next(chunks).token_ids == [1]
        chunks.close()  # type: ignore[attr-defined]
        assert list(chunks) == []


def test_who_reads_on_after_the_client_was_closed_is_told_as_of_any_loss() -> None:
    waits = threading.Event()

    class Waiting(Scripted):
        def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateStreamResponse]:
            yield from super().GenerateStream(request, context)
            waits.wait(PATIENCE_S)

    try:
        with served(Waiting([message(1, token=b"t")], [message(2)])) as addresses:
            with Client(*addresses) as client:
                chunks, _ = client.stream(pb.GenerateRequest(), timeout_s=PATIENCE_S)
                assert next(chunks).token_ids == [1]
            with pytest.raises(grpc.RpcError):
                next(chunks)
            waits.set()
    finally:
        waits.set()


def patience(deadline_s: float) -> tuple[Patience, Callable[[float], None]]:
    now_s = [0.0]

    def advance(seconds: float) -> None:
        now_s[0] += seconds

    return Patience(deadline_s, lambda: now_s[0]), advance


@pytest.mark.parametrize(("deadline_s", "until_s"), [(1000.0, RESUME_WITHIN_S), (20.0, 20.0)])
def test_patience_ends(deadline_s: float, until_s: float) -> None:
    waiting, advance = patience(deadline_s)
    total_s, previous_s, num_tries = 0.0, 0.0, 0
    while (pause_s := waiting.pause_s()) is not None:
        assert FIRST_PAUSE_S / 2 <= pause_s <= LAST_PAUSE_S
        advance(pause_s)
        total_s, previous_s, num_tries = total_s + pause_s, pause_s, num_tries + 1
    assert until_s - LAST_PAUSE_S <= total_s < until_s
    assert previous_s >= LAST_PAUSE_S / 2, "later tries are further apart"
    assert num_tries > until_s / LAST_PAUSE_S


def test_patience_comes_back_with_every_message() -> None:
    waiting, advance = patience(1000.0)
    for _ in range(20):
        assert waiting.pause_s(RESUME_WITHIN_S - 1) is not None
        advance(RESUME_WITHIN_S - 1)
        assert waiting.pause_s(2.0) is None
        waiting.restore()
        if waiting.left_s < RESUME_WITHIN_S:
            break
    assert waiting.pause_s(RESUME_WITHIN_S) is None
