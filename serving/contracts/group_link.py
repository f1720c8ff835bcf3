"""Messages between gateways and the leaders of replica groups (msgpack)."""

from typing import Literal

import msgspec

from model_parallel.engine.request import EngineOutput, EngineRequest

MAGIC = b"packtout"
SECRET_BYTES = 32
CONNECT_TIMEOUT_S = 5.0
"""A connection that has not proved itself by then is closed."""

Outputs = tuple[EngineOutput, ...]


class ReturnAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the outputs of a request are wanted."""

    host: str
    port: int
    secret: bytes


class GroupCall(msgspec.Struct, frozen=True, array_like=True):
    """What a gateway sends to a group: the choices of one client request."""

    requests: tuple[EngineRequest, ...]
    trace_context: dict[str, str]
    """Of the gateway's span."""
    return_address: ReturnAddress


class GroupReply(msgspec.Struct, frozen=True, array_like=True):
    """Whether the group has taken the request in. If so, its outputs go to the return address."""

    engine: str
    """Id of the group."""
    refusal_kind: str = ""
    """A RequestError's kind, or "unavailable" when the group is lost."""
    refusal: str = ""
    retry_after_s: float | None = None
    """When to try again, where the group can tell."""


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What a group has made of a gateway's requests in one step; nothing, when it only tells how busy it is."""

    outputs: Outputs
    num_elsewhere: int
    """Open sequences of other gateways."""


class Order(msgspec.Struct, frozen=True, array_like=True):
    """What shall become of requests: no more is computed while they are held, or ever."""

    request_ids: tuple[str, ...]
    kind: Literal["hold", "resume", "cancel"]
