"""Who is next: strict priority classes, and in each class fair shares for its tenants.

Fair is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2:

- A tenant's counter is the service that it got, divided by its weight. A prompt token costs 1 and a generated one 2. The
  prompt is charged when its sequence is first admitted, without what the prefix cache gave; a generated token when it is there.
- Next is the oldest sequence of the tenant whose counter is lowest, among the tenants with something waiting. Nobody is
  skipped: while the next one does not fit, no other is admitted.
- A tenant that had nothing waiting and comes (back) is lifted to the floor, less a burst. The floor is the lowest counter of
  those with something waiting or, when nobody has, the counter of the last one that had; it never falls.
- A tenant whose weight changes stays as many tokens ahead of the floor, or behind, as it was.

The burst is ours; without it this is the paper's algorithm. Linux' CFS places a sleeper that wakes in the same way. A tenant that
asks for little has not used its share and is below the floor, so it is next at once, even with a few requests in a row. It is
*below its fair share*, and `Scheduler` lets it pass prefills and preempt. All of it is charged, so a tenant that uses its share
is never below it.

Let L be the tokens of the longest prompt, M those, prompts and answers, that one tenant's running sequences have in the end, and
U = max(1 · L, 2 · M). The counters of tenants with something waiting lie between the floor less a burst and the floor plus U.
While two tenants have something waiting all the time, the services that they get, divided by their weights, differ by at most
2 U (the bound of the paper; weights are 1 or more), and by one burst more if that time begins with a return.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from model_parallel.engine.request import EngineRequest
from model_parallel.engine.sequence import Sequence

INPUT_PRICE = 1.0
OUTPUT_PRICE = 2.0
MAX_IDLE_TENANTS = 1024
"""Tenants of a class that are remembered although nothing of theirs waits or runs."""


@dataclass(slots=True, kw_only=True, eq=False)
class Tenant:
    """One tenant in one class."""

    counter: float = 0.0
    weight: float = 1.0
    """As its latest request says."""
    waiting: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)
    """By seq_id, in order of arrival."""
    num_waiting_tokens: int = 0
    """Prompt tokens of those."""
    num_running: int = 0

    def charge(self, price: float, num_tokens: int) -> None:
        """It got a service."""
        self.counter += price * num_tokens / self.weight

    def load_with(self, num_more: int) -> float:
        """Sequences that it would run for its weight, if it ran `num_more`."""
        return (self.num_running + num_more) / self.weight


class VirtualTokenCounter:
    """The tenants of one class. `first` and a lift look at all that have something waiting; the rest takes constant time."""

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._floor = 0.0
        """As of the latest return."""
        self.tenants: dict[str, Tenant] = {}
        self.waiting: dict[str, Tenant] = {}
        """Those with something waiting, in the order in which they began to."""
        self._idle: dict[str, Tenant] = {}
        """Those with nothing waiting and nothing running."""
        self._last = Tenant()
        """The last one that ceased to have something waiting."""
        self._forgotten = 0.0
        """The highest counter that was forgotten."""

    def first(self) -> Sequence:
        """The next one; something must be waiting."""
        tenant = min(self.waiting.values(), key=lambda tenant: tenant.counter)
        return next(iter(tenant.waiting.values()))

    def is_below_fair_share(self, tenant: Tenant) -> bool:
        """It is below the floor. While it waits the floor cannot have passed it since the latest return."""
        return tenant.counter < self._floor

    def num_tokens_ahead(self, request: EngineRequest) -> float:
        """Prompt tokens that are admitted before those of a request that comes now. Output is left out of the account."""
        tenant = self.tenants.get(request.tenant) or self._new_tenant(request)
        counter = self._counter_under(tenant, request.weight)
        counter_at_turn = counter + tenant.num_waiting_tokens / request.weight
        return tenant.num_waiting_tokens + sum(
            min(other.num_waiting_tokens, max(0.0, counter_at_turn - other.counter) * other.weight)
            for other in self.waiting.values()
            if other is not tenant
        )

    def insert(self, sequence: Sequence, *, at_front: bool) -> Tenant:
        """It waits from now on. Returns whose it is."""
        name, weight = sequence.request.tenant, sequence.request.weight
        tenant = self.tenants.setdefault(name, self._new_tenant(sequence.request))
        tenant.counter, tenant.weight = self._counter_under(tenant, weight), weight
        if not tenant.waiting:
            self._idle.pop(name, None)
            self.waiting[name] = tenant
        tenant.waiting[sequence.seq_id] = sequence
        tenant.waiting.move_to_end(sequence.seq_id, last=not at_front)
        tenant.num_waiting_tokens += sequence.num_prompt_tokens
        return tenant

    def remove(self, sequence: Sequence) -> Tenant:
        """It waits no more. Returns whose it is."""
        name = sequence.request.tenant
        tenant = self.tenants[name]
        del tenant.waiting[sequence.seq_id]
        tenant.num_waiting_tokens -= sequence.num_prompt_tokens
        if not tenant.waiting:
            del self.waiting[name]
            self._last = tenant
        return tenant

    def settle(self, name: str) -> None:
        """Something of the tenant's has ended."""
        tenant = self.tenants[name]
        if not (tenant.waiting or tenant.num_running):
            self._idle[name] = tenant
            if len(self._idle) > MAX_IDLE_TENANTS:
                self._forget_half_of_the_idle()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every tenant is where it belongs and its sums agree."""
        for name, tenant in self.tenants.items():
            is_idle = not (tenant.waiting or tenant.num_running)
            if (name in self.waiting, name in self._idle) != (bool(tenant.waiting), is_idle):
                raise RuntimeError(f"tenant {name!r} is in the wrong place: {tenant}")
            if tenant.num_waiting_tokens != sum(sequence.num_prompt_tokens for sequence in tenant.waiting.values()):
                raise RuntimeError(f"the waiting tokens of tenant {name!r} are not {tenant.num_waiting_tokens}")
        if not self.tenants.keys() >= self.waiting.keys() | self._idle.keys():
            raise RuntimeError("a tenant that was forgotten is still in the queue")

    def _new_tenant(self, request: EngineRequest) -> Tenant:
        return Tenant(counter=self._forgotten, weight=request.weight)

    def _counter_under(self, tenant: Tenant, weight: float) -> float:
        """Of a tenant that sends a request of this weight. If that is another one than before, it is as many tokens ahead of the
        floor, or behind, as it was. The one that comes back is lifted."""
        if tenant.waiting and weight == tenant.weight:
            return tenant.counter
        waiting = (other.counter for other in self.waiting.values())
        floor = max(self._floor, min(waiting, default=self._last.counter))
        counter = tenant.counter
        if weight != tenant.weight:
            counter = floor + (counter - floor) * tenant.weight / weight
        if tenant.waiting:
            return counter
        self._floor = floor
        return max(counter, floor - self._burst / weight)

    def _forget_half_of_the_idle(self) -> None:
        """Forget those that owe least. Nobody gains by it: who is not remembered begins with the highest counter forgotten."""
        names = sorted(self._idle, key=lambda name: self._idle[name].counter)
        for name in names[: len(names) // 2]:
            self._forgotten = max(self._forgotten, self._idle.pop(name).counter)
            del self.tenants[name]


class FairQueue:
    """All that waits, and the account of all that runs. A class of a lower number always comes first."""

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._classes: dict[int, VirtualTokenCounter] = {}
        self._num_waiting = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """What waits, each tenant's in order of arrival."""
        for counter in self._classes.values():
            for tenant in counter.waiting.values():
                yield from tenant.waiting.values()

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._num_tokens

    def tenant_of(self, request: EngineRequest) -> Tenant:
        """Whose it is; a new tenant when nothing is remembered."""
        counter = self._classes.get(request.priority)
        return (counter and counter.tenants.get(request.tenant)) or Tenant()

    def first(self) -> Sequence | None:
        """The one to be admitted next."""
        priorities = [priority for priority, counter in self._classes.items() if counter.waiting]
        return self._classes[min(priorities)].first() if priorities else None

    def firsts(self) -> Iterator[tuple[Sequence, bool]]:
        """Of the class that is served next, the oldest one of each tenant, and whether it would be below its fair share if it
        were admitted now."""
        priorities = [priority for priority, counter in self._classes.items() if counter.waiting]
        if priorities:
            counter = self._classes[min(priorities)]
            for tenant in counter.waiting.values():
                yield next(iter(tenant.waiting.values())), counter.is_below_fair_share(tenant)

    def is_below_fair_share(self, sequence: Sequence) -> bool:
        """It would be below its fair share if it were admitted now."""
        return self._classes[sequence.request.priority].is_below_fair_share(self.tenant_of(sequence.request))

    def num_tokens_ahead(self, request: EngineRequest) -> float:
        """Prompt tokens that are admitted before those of a request that comes now, about."""
        above = (counter for priority, counter in self._classes.items() if priority < request.priority)
        ahead = float(sum(tenant.num_waiting_tokens for counter in above for tenant in counter.waiting.values()))
        own = self._classes.get(request.priority)
        return ahead + (own.num_tokens_ahead(request) if own else 0.0)

    def add(self, sequence: Sequence) -> None:
        """It has arrived."""
        self._insert(sequence, at_front=False)

    def admit(self, sequence: Sequence, num_charged: int) -> None:
        """It runs from now on; so many tokens of input are charged."""
        sequence.is_below_fair_share = self.is_below_fair_share(sequence)
        tenant = self._remove(sequence)
        tenant.num_running += 1
        tenant.charge(INPUT_PRICE, num_charged)

    def charge_output(self, sequence: Sequence) -> None:
        """It got a token."""
        self.tenant_of(sequence.request).charge(OUTPUT_PRICE, 1)

    def put_back(self, sequence: Sequence) -> None:
        """It is preempted, and the next one of its tenant."""
        self.tenant_of(sequence.request).num_running -= 1
        self._insert(sequence, at_front=True)

    def add_in_front(self, sequence: Sequence) -> None:
        """It is back after a pause, and the next one of its tenant."""
        self._insert(sequence, at_front=True)

    def leave(self, sequence: Sequence) -> None:
        """It has ended or is paused, waiting or running until now."""
        tenant = self.tenant_of(sequence.request)
        if sequence.seq_id in tenant.waiting:
            self._remove(sequence)
        else:
            tenant.num_running -= 1
        self._classes[sequence.request.priority].settle(sequence.request.tenant)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless all sums agree."""
        for counter in self._classes.values():
            counter.check_integrity()
        waiting = list(self)
        if (self._num_waiting, self._num_tokens) != (len(waiting), sum(s.num_prompt_tokens for s in waiting)):
            raise RuntimeError(f"{self._num_waiting} sequences of {self._num_tokens} prompt tokens do not wait")

    def _insert(self, sequence: Sequence, *, at_front: bool) -> None:
        counter = self._classes.setdefault(sequence.request.priority, VirtualTokenCounter(self._burst))
        counter.insert(sequence, at_front=at_front)
        self._num_waiting += 1
        self._num_tokens += sequence.num_prompt_tokens

    def _remove(self, sequence: Sequence) -> Tenant:
        self._num_waiting -= 1
        self._num_tokens -= sequence.num_prompt_tokens
        return self._classes[sequence.request.priority].remove(sequence)
