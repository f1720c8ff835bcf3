"""What gateways and the quota authority say to each other (msgpack)."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from serving.contracts.accounts import UsageRecord


class Amounts(msgspec.Struct, frozen=True, array_like=True):
    """As much of each of the four limits, in the order of `records.LIMITS`. Zero where a limit is not set."""

    requests: int = 0
    tokens: int = 0
    """Of the rate."""
    slots: int = 0
    """Requests that may run at the same time."""
    budget: int = 0
    """Tokens of the budget."""

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.slots + other.slots,
            self.budget + other.budget,
        )

    def __sub__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.requests - other.requests,
            self.tokens - other.tokens,
            self.slots - other.slots,
            self.budget - other.budget,
        )

    def __mul__(self, factor: int) -> "Amounts":
        return Amounts(self.requests * factor, self.tokens * factor, self.slots * factor, self.budget * factor)

    def __iter__(self) -> Iterator[int]:
        return iter((self.requests, self.tokens, self.slots, self.budget))

    def __bool__(self) -> bool:
        return any(self)

    def without_budget(self, num_tokens: int) -> "Amounts":
        """Of the budget so much less, and nothing at the least."""
        return Amounts(self.requests, self.tokens, self.slots, max(0, self.budget - num_tokens))

    def covers(self, cost: "Amounts") -> bool:
        return (
            cost.requests <= self.requests
            and cost.tokens <= self.tokens
            and cost.slots <= self.slots
            and cost.budget <= self.budget
        )


NOTHING = Amounts()

Costs = tuple[tuple[str, Amounts], ...]
"""What a request takes from each subject that has limits."""


def uncounted(costs: Costs, num_counted: int) -> Costs:
    """What is left to be taken when a record has counted so many tokens of the request."""
    return tuple((subject, cost.without_budget(num_counted)) for subject, cost in costs) if num_counted else costs


class Settlement(msgspec.Struct, frozen=True, array_like=True):
    """A request that has ended."""

    record: UsageRecord
    subjects: tuple[str, ...]
    """Tenant and key, charged with the record's tokens whether they have limits or not."""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a gateway has of a subject after the settlements that go with it."""

    subject: str
    held: Amounts
    """In all: reserved and free."""
    free: Amounts
    returned: Amounts
    """Of the rates: no longer held, and not used."""


class LeaseRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request that the gateway's leases do not cover."""

    costs: Costs
    waited_s: float
    begun_id: str = ""
    """The request goes on with the stream of this one, of which a record may have counted a part. No lease serves it."""


class Exchange(msgspec.Struct, frozen=True, array_like=True):
    """From a gateway to the authority."""

    gateway_id: str
    number: int
    """One more each time."""
    settlements: tuple[Settlement, ...]
    reports: tuple[Report, ...]
    lease_requests: tuple[LeaseRequest, ...]


RESUMPTIONS = "resumptions"
"""Named as the limit of a stream that counts against a budget and has gone on too often."""


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a LeaseRequest."""

    kind: Literal["granted", "refused", "wait"]
    """"wait": ask again; others have been told to give back what they do not use."""
    subject: str = ""
    limit: str = ""
    """Of a refusal: whose limit, and which. No limit is named when the tenant or the key is no longer there."""
    retry_after_s: float | None = None
    """None when waiting does not help."""
    num_counted: int = 0
    """So many tokens of the budget were not set aside for a granted request, as a record has counted them already."""


GRANTED = Decision(kind="granted")
WAIT = Decision(kind="wait")


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """Given ahead of need."""

    subject: str
    amounts: Amounts


class Balance(msgspec.Struct, frozen=True, array_like=True):
    """What is left of a subject's rates after the exchange, whether in the bucket or unused on lease; endless without a limit."""

    subject: str
    requests: float
    tokens: float


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """From the authority. All that it says, and the settlements that it answers, are durable."""

    number: int
    decisions: tuple[Decision, ...]
    """One for each lease request."""
    leases: tuple[Lease, ...]
    balances: tuple[Balance, ...] = ()
    """Of the subjects of the exchange that have a rate."""


class SyncRequest(msgspec.Struct, frozen=True, array_like=True):
    """A gateway listens."""

    gateway_id: str
    generation: int
    """Of the keys that it has."""


class SyncReply(msgspec.Struct, frozen=True, array_like=True):
    """News, or none after a while."""

    snapshot: bytes
    """Of keys and limits (msgpack, directory.Snapshot); empty when the gateway has the newest."""
    recalls: tuple[str, ...]
    """Subjects of which it shall give back what it does not use."""
