"""What a client has of a stream, and the request that brings the rest of it when gateway or connection are gone."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import grpc

from protos import inference_pb2 as pb

RESUME_WITHIN_S = 60.0
"""How long a stream that is broken is tried again without a message, where its deadline is not sooner. Ray has a new gateway in a
fraction of it."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0
"""Between two tries. Each is twice as long as the one before."""

_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
)
"""What gRPC makes of a connection that breaks."""


class Received:
    """What has come of one stream."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._token = b""
        self.has_begun = False
        """Some of it has come."""
        self._num_tokens: defaultdict[int, int] = defaultdict(int)
        self._num_prompt_logprobs = 0

    @property
    def can_be_resumed(self) -> bool:
        """The stream has told how."""
        return bool(self._token)

    def take(self, chunk: pb.GenerateStreamResponse) -> None:
        """One more message."""
        self.has_begun = True
        self._token = chunk.resume_token or self._token
        self._num_tokens[chunk.index] += len(chunk.token_ids)
        self._num_prompt_logprobs += len(chunk.prompt_logprobs)

    def rest(self) -> pb.GenerateRequest:
        """The request for what has not come."""
        if not self._token:
            return self._request
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume_token = self._token
        request.resume_from.num_tokens.extend(
            self._num_tokens[choice] for choice in range(max(self._num_tokens, default=-1) + 1)
        )
        request.resume_from.num_prompt_logprobs = self._num_prompt_logprobs
        return request


class Patience:
    """Whether to try again, and when."""

    def __init__(self, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`deadline_s` is on the clock."""
        self._clock = clock
        self._deadline_s = deadline_s
        self.restore()

    def restore(self) -> None:
        """Something has come."""
        self._until_s: float | None = None
        self._next_pause_s = FIRST_PAUSE_S

    @property
    def left_s(self) -> float:
        """Until the deadline."""
        return self._deadline_s - self._clock()

    def pause_s(self, asked_s: float | None = None) -> float | None:
        """How long to wait before the next try, at least as long as the server asks; None where it is too late for one."""
        now_s = self._clock()
        if self._until_s is None:
            self._until_s = min(self._deadline_s, now_s + RESUME_WITHIN_S)
        # Clients of one gateway must not come back together.
        pause_s = max(self._next_pause_s * random.uniform(0.5, 1.0), asked_s or 0.0)
        self._next_pause_s = min(2 * self._next_pause_s, LAST_PAUSE_S)
        return pause_s if now_s + pause_s < self._until_s else None


def pushback_s(error: grpc.RpcError) -> float | None:
    """When the server says to try again; negative for never; None where no server has said anything."""
    trailers: Sequence[tuple[str, str | bytes]] = ()
    if isinstance(error, grpc.Call):
        trailers = error.trailing_metadata() or ()
    return next((int(value) / 1000 for key, value in trailers if key == "grpc-retry-pushback-ms"), None)


def is_lost(error: grpc.RpcError) -> bool:
    """The connection broke, or the server could not go on and says so. Trying again can help."""
    if not isinstance(error, grpc.Call):
        return False
    said_s = pushback_s(error)
    if said_s is None:
        return error.code() in _LOST
    return said_s >= 0 and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
