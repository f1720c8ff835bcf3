"""Messages between gateways and the leaders of replica groups (msgpack).

gateway → leader   GroupCall, in a call of Serve, which ends with a GroupReply
leader → gateway   GroupUpdate, one frame a step, over the connection that `ReturnAddress` names
gateway → leader   Command, over the same connection
"""

from typing import Literal, NamedTuple

import msgspec

from model_parallel.engine.request import EngineOutput, EngineRequest

MAGIC = b"packtout"
"""Of the connection's handshake."""

Outputs = tuple[EngineOutput, ...]


class GroupOutputs(NamedTuple):
    """Outputs of one client request, and the group that made them. The first has none: the group has accepted the request."""

    engine: str
    """Id of the group."""
    outputs: Outputs


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
    weights: str = ""
    """Digest of those that the gateway takes the group to have (ModelCard.weights)."""


class GroupReply(msgspec.Struct, frozen=True, array_like=True):
    """Whether the group has accepted the request. If so, its outputs go to the return address."""

    engine: str
    """Id of the group."""
    error_kind: str = ""
    """A RequestError's kind, or "unavailable" when the group is lost; empty when it has accepted."""
    error: str = ""
    retry_after_s: float | None = None
    """When to try again, where the group can tell."""


HEARTBEAT_S = 0.25
"""A leader sends each gateway at least one frame in this time."""


class GroupUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What a group has made of a gateway's requests in one step; no outputs when it only reports its load, and that it lives."""

    outputs: Outputs
    num_elsewhere: int
    """Open sequences of other gateways."""


class Command(msgspec.Struct, frozen=True, array_like=True):
    """Compute no more of these requests until they are resumed, or ever."""

    request_ids: tuple[str, ...]
    kind: Literal["pause", "resume", "cancel"]
