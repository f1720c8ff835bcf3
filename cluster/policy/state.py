"""What the policy remembers between two decisions. Plain data, written to disk as msgpack and read again after a restart."""

import msgspec

from cluster.policy.observation import StepLine

VERSION = 1
"""Raised when an older state means something else. A state of another version is not used: the policy starts afresh."""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """What arrived for a model between two looks at its gateways, and what it held at the second."""

    at_s: float
    """When the second look was."""
    length_s: float
    num_sequences: float
    num_prompt_tokens: float
    num_open: int
    """Sequences that ran, waited or were held."""
    num_kv_tokens: float
    """Tokens of KV cache in use."""


class Block(msgspec.Struct, frozen=True, array_like=True):
    """What arrived in a longer time, for judging how far the demand wanders."""

    at_s: float
    """When it ended."""
    length_s: float
    num_sequences: float
    num_prompt_tokens: float


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """A gateway's totals when it was looked at last."""

    measured_s: float
    num_sequences: int
    num_prompt_tokens: int


class Need(msgspec.Struct, frozen=True, array_like=True):
    """How many groups were needed at a time."""

    at_s: float
    num_groups: int


class GroupTraits(msgspec.Struct, frozen=True, kw_only=True):
    """What a group of the model is like. Groups of a model are alike, so it outlives each of them."""

    line: StepLine
    mean_output_tokens: float
    num_ended_answers: int = 0
    """That the mean is known from."""
    cached_share: float
    max_num_seqs: int
    kv_cache_tokens: int


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model."""

    samples: tuple[Sample, ...] = ()
    """Oldest first."""
    blocks: tuple[Block, ...] = ()
    """Oldest first; the last one may still grow."""
    seen: dict[str, Seen] = {}
    """By gateway."""
    needs: tuple[Need, ...] = ()
    """Oldest first; only those that no later one exceeds, so the first is the most of the window."""
    traits: GroupTraits | None = None
    start_times_s: tuple[float, ...] = ()
    """Of the last few starts."""
    started: frozenset[str] = frozenset()
    """Groups whose start is counted."""
    target: int | None = None
    """The last that was observed."""
    direction: int = 0
    """Of the last change of the target: 1 up, -1 down, 0 none yet."""
    grown_s: float | None = None
    """When the target last rose."""
    reversed_s: float | None = None
    """When the direction last changed."""
    busy_s: float | None = None
    """When the model last had work."""


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """Of all models."""

    models: dict[str, ModelState] = {}
    now_s: float | None = None
    """Of the last decision."""
    version: int = VERSION


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PolicyState).decode


def encode_state(state: PolicyState) -> bytes:
    """As msgpack."""
    return _encode(state)


def decode_state(encoded: bytes) -> PolicyState | None:
    """None when it is damaged or of another version."""
    try:
        state = _decode(encoded)
    except msgspec.DecodeError:
        return None
    return state if state.version == VERSION else None
