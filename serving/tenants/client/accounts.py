"""A gateway's Accounts: keys from the directory, quotas out of its leases, usage records to the authority's ledger.

A request that the leases cover makes no remote call. Everything else goes to the authority in one conversation, an exchange at a
time; what gathers meanwhile goes with the next one.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import msgspec

from serving.contracts.accounts import Principal, RateLimits, Reservation, UsageRecord
from serving.contracts.errors import AccountsUnavailableError, QuotaExceededError, UnauthenticatedError
from serving.tenants.client.balances import tighter
from serving.tenants.client.leases import LeaseBook
from serving.tenants.directory import INVALID_KEY_MESSAGE, KeyDirectory, Quota, Snapshot
from serving.tenants.messages import RESUMPTIONS, Amounts, Costs, Decision, Exchange, Reply, SyncReply, SyncRequest
from serving.tenants.records import Limits

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
ASK_TIMEOUT_S = 10.0
"""How long a request waits for the authority. Its restart takes a few seconds."""
RECORD_TIMEOUT_S = 20.0
"""How long an answer waits for its record."""
STOP_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 5.0
LINGER_S = 0.2
"""How long a record that nobody waits for may wait for others to go with it."""
MAX_UNRECORDED = 10_000
"""With more records than this not durable, no further request is taken."""
_RECALL_PAUSE_S = 0.01
_FIRST_RETRY_S, _LAST_RETRY_S = 0.05, 1.0

_Result = TypeVar("_Result")


class AuthorityUnreachableError(Exception):
    """The quota authority cannot be asked now. Trying again can help."""


class AuthorityLink(Protocol):
    """How calls of `authority.AuthorityService` travel. Both raise AuthorityUnreachableError."""

    async def exchange(self, data: bytes) -> bytes: ...

    async def sync(self, data: bytes) -> bytes: ...


class TenantAccounts:
    """Implements serving.contracts.accounts.Accounts. One start, one stop."""

    def __init__(self, link: AuthorityLink, *, refresh_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._gateway_id = uuid.uuid4().hex
        self._link = link
        self._refresh_s = refresh_s
        self._clock = clock
        self._book = LeaseBook(self._gateway_id)
        self._directory = KeyDirectory(Snapshot(generation=-1, tenants=(), keys=()))
        self._is_stopping = False
        self._urgent = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.num_asked = 0
        """Requests that the leases did not cover."""

    @property
    def num_unrecorded(self) -> int:
        """Records that are not known to be durable."""
        return self._book.num_unrecorded

    async def start(self) -> None:
        """Returns when the keys are there. Raises TimeoutError when nobody gives them."""
        async with asyncio.timeout(START_TIMEOUT_S):
            await self._retrying(self._sync)
        self._tasks = [asyncio.create_task(self._talk()), asyncio.create_task(self._listen())]

    async def stop(self) -> None:
        """Deliver all records and give all leases back, as far as it can be done in time. Requests must have ended."""
        self._is_stopping = True
        self._urgent.set()
        if self._tasks:
            talk, listen = self._tasks
            listen.cancel()
            _, late = await asyncio.wait([talk], timeout=STOP_TIMEOUT_S)
            if late:
                logger.error("%d usage records could not be delivered", self._book.num_unrecorded)
                talk.cancel()
            await asyncio.wait(self._tasks)

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        return self._directory.authenticate(credentials)

    async def reserve(
        self, principal: Principal, *, request_id: str, model: str, num_tokens: int, billed_id: str = ""
    ) -> Reservation:
        try:
            quotas = self._directory.quotas(principal.key_id)
        except KeyError as error:  # revoked since the request came in
            raise UnauthenticatedError(INVALID_KEY_MESSAGE) from error
        if self._book.num_unrecorded >= MAX_UNRECORDED or self._is_stopping:
            raise AccountsUnavailableError("usage cannot be recorded now")
        all_costs = ((quota.subject, reservation_cost(quota.limits, num_tokens)) for quota in quotas)
        costs = tuple((subject, cost) for subject, cost in all_costs if cost)
        is_resumed = billed_id not in ("", request_id) and any(cost.budget for _, cost in costs)
        if costs and (is_resumed or not self._book.take(costs)):
            self.num_asked += 1
            decision, costs = await self._ask(costs, billed_id if is_resumed else "")
            self._raise_quota_error(decision, quotas, num_tokens)
        return _Reservation(self, costs, (quotas[0].subject, quotas[1].subject), asyncio.Event())

    def rate_limits(self, principal: Principal) -> RateLimits:
        try:
            quotas = self._directory.quotas(principal.key_id)
        except KeyError:  # revoked since the request came in
            return RateLimits()
        now_s = self._clock()
        of_tenant, of_key = (self._book.rates(quota.subject, quota.limits, now_s) for quota in quotas)
        return tighter(of_tenant, of_key)

    def check_health(self) -> None:
        """Raises what ended the conversation with the authority, which is our own fault and which nothing here can mend."""
        for task in self._tasks:
            if task.done() and not self._is_stopping:
                task.result()

    def settle(self, costs: Costs, subjects: tuple[str, ...], record: UsageRecord, durable: asyncio.Event) -> None:
        """Of a reservation."""
        if self._book.settle(costs, record, subjects, durable.set):
            self._urgent.set()

    async def flush(self, durable: asyncio.Event) -> None:
        """Do not wait for more records to go with this one. One that is late is still delivered. Raises
        AccountsUnavailableError."""
        self._urgent.set()
        try:
            async with asyncio.timeout(RECORD_TIMEOUT_S):
                await durable.wait()
        except TimeoutError:
            raise AccountsUnavailableError("the answer is ready, but its usage cannot be recorded now") from None

    async def _ask(self, costs: Costs, begun_id: str) -> tuple[Decision, Costs]:
        """What is decided, and what is set aside if it is granted."""
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        request = self._book.ask(costs, self._clock(), answer.set_result, begun_id=begun_id)
        self._urgent.set()
        try:
            await asyncio.wait([answer], timeout=ASK_TIMEOUT_S)
        except asyncio.CancelledError:
            self._book.withdraw(request)
            raise
        if not answer.done():
            self._book.withdraw(request)
            raise AccountsUnavailableError("quotas cannot be checked now")
        return answer.result(), request.costs

    def _raise_quota_error(self, decision: Decision, quotas: tuple[Quota, Quota], num_tokens: int) -> None:
        if decision.kind == "granted":
            return
        if not decision.limit:
            raise UnauthenticatedError(INVALID_KEY_MESSAGE)
        quota = next(quota for quota in quotas if quota.subject == decision.subject)
        message = _refusal(quota, decision, num_tokens)
        limit = "token_budget" if decision.limit == RESUMPTIONS else decision.limit
        raise QuotaExceededError(message, quota=limit, retry_after_s=decision.retry_after_s)

    async def _talk(self) -> None:
        while True:
            if not (self._is_stopping or self._book.num_waiting):
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S):
                        await self._urgent.wait()
            self._urgent.clear()
            if self._is_stopping:
                self._book.return_all()
            exchange = self._book.next_exchange(self._clock())
            if exchange is not None:
                reply = await self._retrying(partial(self._exchange, exchange))
                self._book.take_reply(reply, self._clock())
                if any(decision.kind == "wait" for decision in reply.decisions):
                    await asyncio.sleep(_RECALL_PAUSE_S)
            elif self._is_stopping:
                return

    async def _exchange(self, exchange: Exchange) -> Reply:
        return msgspec.msgpack.decode(await self._link.exchange(msgspec.msgpack.encode(exchange)), type=Reply)

    async def _listen(self) -> None:
        looked_s = self._clock()
        while True:
            await self._retrying(self._sync)
            if (now_s := self._clock()) - looked_s >= self._refresh_s:
                self._book.return_idle()
                looked_s = now_s

    async def _sync(self) -> None:
        request = SyncRequest(self._gateway_id, self._directory.generation)
        reply = msgspec.msgpack.decode(await self._link.sync(msgspec.msgpack.encode(request)), type=SyncReply)
        if reply.snapshot:
            before = self._directory.limits
            self._directory = KeyDirectory(msgspec.msgpack.decode(reply.snapshot, type=Snapshot))
            limits = self._directory.limits
            self._book.change_limits(subject for subject in limits if limits[subject] != before.get(subject))
            self._urgent.set()
        if reply.recalls:
            self._book.recall(reply.recalls)
            self._urgent.set()

    async def _retrying(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Until it works. Whatever went through before and was not answered does no harm a second time."""
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S + self._refresh_s):
                    return await call()
            except (AuthorityUnreachableError, TimeoutError) as error:
                logger.warning("the quota authority does not answer: %s", str(error) or "timed out")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LAST_RETRY_S)


@dataclass(slots=True)
class _Reservation:
    accounts: TenantAccounts
    costs: Costs
    subjects: tuple[str, ...]
    durable: asyncio.Event

    def settle(self, record: UsageRecord) -> None:
        self.accounts.settle(self.costs, self.subjects, record, self.durable)

    async def recorded(self) -> None:
        await self.accounts.flush(self.durable)


def reservation_cost(limits: Limits, num_tokens: int) -> Amounts:
    """What a request takes from each limit that is set."""
    return Amounts(
        requests=0 if limits.requests_per_minute is None else 1,
        tokens=0 if limits.tokens_per_minute is None else num_tokens,
        slots=0 if limits.max_concurrent_requests is None else 1,
        budget=0 if limits.token_budget is None else num_tokens,
    )


def _refusal(quota: Quota, decision: Decision, num_tokens: int) -> str:
    """For the client to read."""
    owner = "this tenant" if quota.subject.startswith("tenant:") else "this key"
    if decision.limit == RESUMPTIONS:
        return f"{owner} has a token budget, and this stream has gone on as often as it may: send the request anew"
    limit = getattr(quota.limits, decision.limit)
    needed = f"this request may need {num_tokens}"
    match decision.limit:
        case "requests_per_minute":
            return f"{owner} may send {limit} requests a minute"
        case "tokens_per_minute" if decision.retry_after_s is None:
            return f"{owner} may use {limit} tokens a minute, and {needed}: it will never fit; lower max_tokens"
        case "tokens_per_minute":
            return f"{owner} may use {limit} tokens a minute, and {needed}"
        case "max_concurrent_requests":
            return f"{owner} may run {limit} request{'' if limit == 1 else 's'} at a time"
        case _ if decision.retry_after_s is None:
            return f"{owner} has a budget of {limit} tokens; {needed}, and less is left"
        case _:
            return f"{owner} has a budget of {limit} tokens; {needed}, and running requests have set aside what is left"
