"""The quota authority as a service: two calls that gateways make, without knowledge of how they travel.

All of its logic and its database run in one thread, so that the event loop never waits for either. What has come in while a
transaction was in flight goes into the next one together.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import msgspec

from model_parallel.errors import ConfigError
from serving.contracts.accounts import UsageRecord
from serving.contracts.errors import StoreUnavailableError
from serving.observability.log import Trouble
from serving.tenants.authority.ledger import Ledger, SupersededError
from serving.tenants.authority.quota import Account, Gateway, QuotaAuthority, StaleExchangeError
from serving.tenants.directory import Snapshot
from serving.tenants.messages import Exchange, Reply, SyncReply, SyncRequest
from serving.tenants.records import Limits
from serving.tenants.store.database import Database
from serving.tenants.store.owner import DEAD_AFTER_S, InUseError
from serving.tenants.store.store import Store

logger = logging.getLogger(__name__)

SILENT_AFTER_S = 10.0
"""A gateway that has not called for so long is taken to be dead."""
FORGET_AFTER_S = 3600.0

_Result = TypeVar("_Result")


class _Core:
    """Authority, ledger and keys: all that is used in the one thread."""

    def __init__(self, url: str, owner: str, clock: Callable[[], float]) -> None:
        self._url = url
        self._owner = owner
        self._clock = clock
        self._store: Store | None = None
        self._ledger: Ledger | None = None
        self._authority: QuotaAuthority | None = None
        self._refused: InUseError | None = None
        self._refused_s = 0.0
        self.superseded: SupersededError | None = None
        self.generation = -1
        self.snapshot = b""

    def apply(self, messages: Sequence[Exchange]) -> tuple[list[Reply | StaleExchangeError], dict[str, set[str]]]:
        """Decide all, and make it durable in one transaction; also the recalls that follow. When it fails nothing has
        happened, and all may come again."""
        authority, ledger = self._opened()
        ids = [settlement.record.request_id for message in messages for settlement in message.settlements]
        ids += [request.begun_id for message in messages for request in message.lease_requests if request.begun_id]
        try:
            recorded = ledger.recorded(ids)
            replies = [_answer(authority, message, recorded) for message in messages]
            self._commit(authority, ledger)
        except BaseException:
            self._authority = None  # it is ahead of the database: read again what is true
            raise
        return replies, authority.take_recalls()

    def known_gateways(self) -> list[str]:
        authority, _ = self._opened()
        return list(authority.gateways)

    def tick(self, silent: Sequence[str], gone: Sequence[str]) -> None:
        """Look for changes of keys and limits, and take back what dead gateways held."""
        authority, ledger = self._opened()
        assert self._store is not None
        if self._store.generation() != self.generation:
            self._load_snapshot(authority, self._store)
        for gateway_id in silent:
            gateway = authority.gateways.get(gateway_id)
            if gateway is not None and not gateway.is_silent:
                logger.warning("gateway %s has been silent for %g s; others get its leases", gateway_id, SILENT_AFTER_S)
                authority.expire(gateway_id)
        for gateway_id in gone:
            authority.forget(gateway_id)
        try:
            self._commit(authority, ledger)
        except BaseException:
            self._authority = None
            raise

    def close(self) -> None:
        if self._store is None:
            return
        if self._ledger is not None:
            with suppress(StoreUnavailableError):
                self._ledger.release()
        self._store.database.close()

    def _opened(self) -> tuple[QuotaAuthority, Ledger]:
        if self.superseded is not None:
            raise self.superseded
        if self._store is None:
            self._store = Store(Database(self._url))
        if self._authority is None or self._ledger is None:
            self._ledger = None
            ledger = Ledger(self._store.database, self._owner)
            authority = QuotaAuthority(*self._open(ledger), self._clock)
            self._ledger = ledger
            self._load_snapshot(authority, self._store)
            self._authority = authority
        return self._authority, self._ledger

    def _open(self, ledger: Ledger) -> tuple[dict[str, Account], dict[str, Gateway]]:
        """It may take long to see whether another server is alive; so what comes meanwhile gets the answer of the last look."""
        if self._refused is not None and time.monotonic() - self._refused_s < DEAD_AFTER_S:
            raise self._refused
        try:
            return ledger.open()
        except InUseError as error:
            logger.error("%s", error)
            self._refused, self._refused_s = error, time.monotonic()
            raise

    def _load_snapshot(self, authority: QuotaAuthority, store: Store) -> None:
        snapshot = store.snapshot()
        authority.set_limits(limits_by_subject(snapshot))
        self.snapshot = msgspec.msgpack.encode(snapshot)
        self.generation = snapshot.generation

    def _commit(self, authority: QuotaAuthority, ledger: Ledger) -> None:
        changes = authority.take_changes()
        if changes.is_empty and not ledger.is_beat_due():
            return
        try:
            ledger.commit(changes, authority)
        except SupersededError as error:
            self.superseded = error
            raise


class AuthorityService:
    """What gateways call. Gone with its event loop; everything that matters is in the database by then."""

    def __init__(self, url: str, *, owner: str, refresh_s: float, clock: Callable[[], float] = time.time) -> None:
        """Never fails, and does not touch the database before the first call. `owner` is Ledger's, and `refresh_s` bounds how old
        keys get."""
        self._core = _Core(url, owner, clock)
        self._refresh_s = refresh_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quota-authority")
        self._queue: list[tuple[Exchange, asyncio.Future[Reply]]] = []
        self._queue_task: asyncio.Task[None] | None = None
        self._tick_task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._heard_s: dict[str, float] = {}
        self._recalls: dict[str, set[str]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_exchange = msgspec.msgpack.Decoder(Exchange).decode
        self._decode_sync = msgspec.msgpack.Decoder(SyncRequest).decode

    async def open(self) -> None:
        """Take the database, before a gateway calls. Raises InUseError, StoreUnavailableError."""
        if self._tick_task is None:
            await self._start_ticking()

    async def exchange(self, data: bytes) -> bytes:
        """An Exchange, for its Reply. Raises StaleExchangeError, StoreUnavailableError, SupersededError."""
        if self._is_closed:
            raise StoreUnavailableError("the quota authority is stopping")
        message = self._decode_exchange(data)
        self._heard_s[message.gateway_id] = time.monotonic()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._queue.append((message, future))
        if self._queue_task is None:
            self._queue_task = asyncio.create_task(self._work_off_queue())
        return self._encode(await future)

    async def sync(self, data: bytes) -> bytes:
        """A SyncRequest, for a SyncReply as soon as there is news, at the latest after `refresh_s`. Raises StoreUnavailableError,
        SupersededError."""
        if self._core.superseded is not None:
            raise self._core.superseded
        request = self._decode_sync(data)
        self._heard_s[request.gateway_id] = time.monotonic()
        await self.open()
        news = self._news.setdefault(request.gateway_id, asyncio.Event())
        news.clear()
        if request.generation == self._core.generation and request.gateway_id not in self._recalls:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_s):
                    await news.wait()
        recalls = self._recalls.pop(request.gateway_id, set())
        snapshot = self._core.snapshot if request.generation != self._core.generation else b""
        return self._encode(SyncReply(snapshot=snapshot, recalls=tuple(recalls)))

    async def close(self) -> None:
        """Finish what has begun, and close the database. Calls fail from now on."""
        self._is_closed = True
        if self._tick_task is not None:
            self._tick_task.cancel()
            await asyncio.wait([self._tick_task])
        if self._queue_task is not None:
            await asyncio.wait([self._queue_task])
        await self._in_thread(self._core.close)
        self._thread.shutdown()

    async def _in_thread(self, function: Callable[..., _Result], *args: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _work_off_queue(self) -> None:
        while self._queue:
            batch, self._queue = self._queue, []
            try:
                replies, recalls = await self._in_thread(self._core.apply, [message for message, _ in batch])
            except Exception as error:  # whatever it is, those who wait shall have it
                for _, future in batch:
                    _finish(future, error)
                continue
            for (_, future), reply in zip(batch, replies, strict=True):
                _finish(future, reply)
            for gateway_id, subjects in recalls.items():
                self._recalls.setdefault(gateway_id, set()).update(subjects)
                self._notify(gateway_id)
        self._queue_task = None

    async def _start_ticking(self) -> None:
        """Gateways that were there before a restart get their time to call from now on."""
        known = await self._in_thread(self._core.known_gateways)
        if self._tick_task is None and not self._is_closed:
            now_s = time.monotonic()
            self._heard_s = {gateway_id: now_s for gateway_id in known} | self._heard_s
            self._tick_task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        trouble = Trouble(logger)
        while True:
            await asyncio.sleep(self._refresh_s / 2)
            now_s, generation = time.monotonic(), self._core.generation
            silent, gone = (
                [gateway_id for gateway_id, heard_s in self._heard_s.items() if now_s - heard_s > limit_s]
                for limit_s in (SILENT_AFTER_S, FORGET_AFTER_S)
            )
            try:
                await self._in_thread(self._core.tick, silent, gone)
            except (StoreUnavailableError, ConfigError, SupersededError) as error:
                trouble.met(f"keys and limits stay as they were: {error}")
                continue
            except Exception:  # whatever it is, keys that are revoked later must not stay good
                logger.exception("keys and limits stay as they were")
                continue
            trouble.over("changes of keys and limits are followed again")
            for gateway_id in gone:
                for by_gateway in (self._heard_s, self._recalls, self._news):
                    by_gateway.pop(gateway_id, None)
            if self._core.generation != generation:
                for gateway_id in self._news:
                    self._notify(gateway_id)

    def _notify(self, gateway_id: str) -> None:
        self._news.setdefault(gateway_id, asyncio.Event()).set()


def limits_by_subject(snapshot: Snapshot) -> dict[str, Limits]:
    """Of everybody who can send requests."""
    tenants = {f"tenant:{tenant.id}": tenant.limits for tenant in snapshot.tenants}
    return tenants | {f"key:{key.quota_id}": key.limits for key in snapshot.keys}


def _answer(
    authority: QuotaAuthority, message: Exchange, recorded: dict[str, UsageRecord]
) -> Reply | StaleExchangeError:
    try:
        return authority.exchange(message, recorded)
    except StaleExchangeError as error:
        return error


def _finish(future: asyncio.Future[Reply], result: Reply | Exception) -> None:
    if future.done():  # its caller has given up
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
