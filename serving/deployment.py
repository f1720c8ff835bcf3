"""The two Ray Serve deployments, and how one reaches the other.

A replica of `ReplicaGroup` is the leader of one group of ranks and lives in the first bundle of the group's placement group,
which Serve frees when the leader ends. A replica of `Gateway` is a node's front end. It hands a request to a group through Serve
(bytes, msgpack, by value), to the group that `routing` chooses. All that follows goes over `output_link`.
"""

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.ray_api import this_node
from cluster.worker_group import RayExecutor
from model_parallel.config import GroupConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineOutput, EngineRequest
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import GroupFailedError, RequestError
from serving.async_engine import AsyncEngine
from serving.config import AdminConfig, GatewayConfig, LimitsConfig, TenancyConfig
from serving.gateway.backend import GroupUnavailableError, ModelCard, Passage
from serving.gateway.server import METHODS, GatewayServer, Ports
from serving.group_loads import loads_of_this_process
from serving.log import configure_logging, request_id
from serving.models import GroupSpec
from serving.observability.gateway import GatewayWatch
from serving.observability.groups import GroupReport, IterationTokens, ReaderLease
from serving.observability.tracing import GroupSpan, open_tracing
from serving.output_link import Inbox, OutputReceiver, OutputSenders, ReturnAddress
from serving.progress import ProgressFile
from serving.tenants.accounts import TenantAccounts
from serving.tenants.link import ActorLink
from serving.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
DRAIN_POLL_S = 0.1
HAND_OVER_S = 1.0
"""How long a request whose client has gone may still be on its way to a group."""
PROBE_TIMEOUT_S = 2.0
STALE_AFTER_S = 10.0
"""How long a group that was well and answers late is taken to be well."""
Handle = DeploymentHandle[Any]


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


class ReplicaGroup:
    """The leader of one replica group: the engine's thread and the sockets to its ranks."""

    _async_engine: AsyncEngine | None = None

    async def __init__(self, spec: GroupSpec, drain_timeout_s: float) -> None:  # type: ignore[misc]  # Serve awaits it
        self._drain_timeout_s = drain_timeout_s
        self._engine_id = serve.get_replica_context().replica_id.unique_id
        configure_logging(f"group {spec.card.name} {self._engine_id}")
        # The engine's thread has a step to send while the event loop works on calls, and would wait so long for Python's lock.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._tracing = open_tracing()
        self._reader = ReaderLease()
        self._model = spec.card.name
        self._cache = spec.cache
        # A later incarnation has a higher epoch, on whatever node it comes to lie.
        epoch = time.time_ns()
        config = GroupConfig(
            checkpoint_path=spec.card.source,
            parallel=spec.parallel,
            cache=spec.cache,
            scheduler=spec.scheduler,
            epoch=epoch,
        )
        self._step_timeout_s = spec.parallel.step_timeout_s
        on_progress = ProgressFile(Path(spec.progress_directory)) if spec.progress_directory else None
        self._executor = await asyncio.to_thread(
            RayExecutor, config, on_progress=on_progress, configure_logging=configure_logging
        )
        self._iterations = IterationTokens()
        scheduler = Scheduler(spec.scheduler, spec.cache, epoch=epoch)
        self._engine = Engine(self._executor, scheduler, on_step=self._iterations.observe)
        self._decode = msgspec.msgpack.Decoder(GroupCall).decode
        self._encode = msgspec.msgpack.Encoder().encode

    async def generate(self, encoded_call: bytes) -> bytes:
        """Take in the choices of one client request (msgpack, GroupCall). Returns a GroupReply (msgpack)."""
        call = self._decode(encoded_call)
        request_id.set(call.requests[0].request_id)
        span = GroupSpan(self._tracing, self._model, self._engine_id, call.trace_context)
        reply = GroupReply(self._engine_id)
        try:
            engine = self._running_engine()
            sink = await self._senders.to(call.return_address)
            engine.start(call.requests, sink, span.received, span.end)
        except RequestError as error:
            reply = GroupReply(self._engine_id, error.kind, str(error), error.retry_after_s)
        except GroupFailedError:
            logger.exception("a request reached a lost group")
            reply = GroupReply(self._engine_id, "unavailable", "the replica group was lost")
        except (OSError, TimeoutError) as error:
            logger.warning("no outputs can be sent to a gateway at %s: %s", call.return_address.host, error)
            reply = GroupReply(self._engine_id, "unavailable", "the replica group could not send its answer")
        except BaseException as error:  # a bug, or the call was cancelled
            span.failed("" if isinstance(error, asyncio.CancelledError) else type(error).__name__)
            span.end()
            raise
        if reply.refusal_kind:
            span.failed(reply.refusal_kind)
            span.end()
        return self._encode(reply)

    def _running_engine(self) -> AsyncEngine:
        if self._async_engine is None:
            self._async_engine = AsyncEngine(self._engine, asyncio.get_running_loop())
            self._senders = OutputSenders(self._engine_id, self._async_engine)
            self._executor.set_failure_callback(self._async_engine.fail)
        return self._async_engine

    async def probe(self) -> tuple[str, str | None, str, bool]:
        """(the group's id, what is wrong with it, its kernel backends, whether answers do not depend on what else runs)."""
        kernels = ", ".join(sorted(self._executor.kernels_names))
        return self._engine_id, self._executor.health.problem(), kernels, self._executor.deterministic

    async def stats(self) -> dict[str, float]:
        """Load and totals of the group's scheduler."""
        return {name: float(value) for name, value in asdict(self._engine.stats).items()}

    async def report(self, reader: str) -> bytes:
        """GroupReport (msgpack) for the gateway `reader`, with the numbers if the group counts with that one."""
        report = GroupReport(engine=self._engine_id, is_well=self._executor.health.problem() is None)
        if self._reader.is_held_by(reader):
            report = msgspec.structs.replace(
                report,
                stats=await self.stats(),
                iteration_counts=tuple(self._iterations.counts),
                num_iteration_tokens=self._iterations.total,
                cache_config={
                    "block_size": str(self._cache.block_size),
                    "num_gpu_blocks": str(self._cache.num_blocks),
                    "enable_prefix_caching": str(self._cache.enable_prefix_caching),
                },
            )
        return self._encode(report)

    async def check_integrity(self) -> None:
        """Raise RuntimeError unless every KV block is accounted for."""
        self._engine.check_integrity()

    async def pids(self) -> tuple[int, ...]:
        """Process ids of the leader and then of its ranks, in rank order."""
        return (os.getpid(), *self._executor.pids)

    async def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica and free its placement group."""
        self._running_engine()
        problem = self._executor.health.problem()
        if problem is not None:
            raise GroupFailedError(problem)

    async def __del__(self) -> None:
        """Called by Serve when the replica ends in good order: what it has taken in runs to its end, in bounded time."""
        if self._async_engine is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._drain_timeout_s):
                    while self._async_engine.num_open:
                        await asyncio.sleep(DRAIN_POLL_S)
            await asyncio.to_thread(self._async_engine.close, self._step_timeout_s)
            self._senders.close()
        if hasattr(self, "_executor"):  # otherwise the group never started, and has cleaned up after itself
            self._executor.shutdown()
            self._tracing.close()


class ServeBackend:
    """The gateway's Backend on Serve handles. See serving/gateway/backend.py."""

    def __init__(self, cards: Sequence[ModelCard], groups: Mapping[str, Handle], receiver: OutputReceiver) -> None:
        """`receiver` must have started before the first request."""
        self._models = {card.name: card for card in cards}
        self._groups = groups
        self._receiver = receiver
        self._could_serve_s: dict[str, float] = {}
        """When (monotonic) a group of each model last said that it can."""
        self._calls: set[asyncio.Task[bytes]] = set()
        """Of requests that no group has answered for yet."""
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(GroupReply).decode
        self._decode_report = msgspec.msgpack.Decoder(GroupReport).decode

    @property
    def models(self) -> Mapping[str, ModelCard]:
        return self._models

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], passage: Passage
    ) -> AsyncGenerator[tuple[EngineOutput, ...], None]:
        num_open = len(requests)
        inbox = self._receiver.open([request.request_id for request in requests])
        call = GroupCall(tuple(requests), passage.trace_context, self._receiver.address)
        # Serve's response is not held here: with it, an answer that waits for its client would take 30 KiB more.
        hand_over = asyncio.create_task(_value(self._groups[model].generate.remote(self._encode(call))))
        del call
        self._calls.add(hand_over)
        hand_over.add_done_callback(partial(self._take_reply, model, inbox))
        try:
            while num_open:
                outputs = await inbox.next()
                num_open -= sum(output.finish_reason is not None for output in outputs)
                passage.engine = inbox.engine
                yield outputs
        finally:
            passage.engine = inbox.engine
            inbox.close(cancel=num_open > 0)
            if not hand_over.done():
                # A group may be taking it in. It is told to drop it when it answers, if that is soon.
                asyncio.get_running_loop().call_later(HAND_OVER_S, hand_over.cancel)

    def _take_reply(self, model: str, inbox: Inbox, call: asyncio.Task[bytes]) -> None:
        """A group has answered for a request, or none can."""
        self._calls.discard(call)
        error: Exception
        try:
            reply = self._decode(call.result())
            if not reply.refusal_kind:
                inbox.accepted(reply.engine)
                return
            inbox.engine = reply.engine
            if reply.refusal_kind in ("overloaded", "unavailable"):
                self._receiver.loads.refused(reply.engine)
            if reply.refusal_kind == "unavailable":
                error = GroupUnavailableError(reply.refusal, may_have_run=False)
            else:
                error = RequestError(reply.refusal, kind=reply.refusal_kind, retry_after_s=reply.retry_after_s)
        except BackPressureError:
            error = RequestError("every replica group of this model is full", kind="overloaded")
        except (RequestCancelledError, asyncio.CancelledError):
            error = GroupUnavailableError("the request was cancelled on its way to a replica group")
        except (RayError, RayServeException) as lost:
            logger.warning("a replica group of %s was lost: %s", model, type(lost).__name__)
            error = GroupUnavailableError(f"the replica group of model {model!r} was lost")
        except Exception as bug:
            error = bug
        inbox.fail(error)

    async def can_serve(self, model: str) -> bool:
        for _ in range(self._models[model].num_groups):
            probe = self._groups[model].probe.remote()
            try:
                engine, problem, kernels, deterministic = await asyncio.wait_for(_value(probe), PROBE_TIMEOUT_S)
            except TimeoutError:
                # A busy machine is slow to answer, so the last word counts for a while.
                return time.monotonic() - self._could_serve_s.get(model, -math.inf) < STALE_AFTER_S
            except (RayError, RayServeException) as error:
                logger.warning("no replica group of %s can be reached: %s", model, type(error).__name__)
                return False
            if problem is None:
                self._could_serve_s[model] = time.monotonic()
                card = self._models[model]
                if card.kernels != kernels:
                    self._models[model] = msgspec.structs.replace(card, kernels=kernels, deterministic=deterministic)
                return True
            logger.warning("a replica group of %s is lost: %s", model, problem)
            self._receiver.loads.refused(engine)  # so that another one is asked next
        return False

    async def reports(self, reader: str) -> dict[str, list[GroupReport]]:
        """What every group of every model tells the gateway `reader`; a group that does not answer in time is left out."""
        answers = await asyncio.gather(*(self._reports(handle, reader) for handle in self._groups.values()))
        return dict(zip(self._groups, answers, strict=True))

    async def _reports(self, handle: Handle, reader: str) -> list[GroupReport]:
        broadcast = handle.broadcast("report", reader)
        try:
            items = await broadcast.results_async(timeout_s=PROBE_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return []
        return [self._decode_report(item) for item in items if isinstance(item, bytes)]


async def _value(response: Any) -> Any:
    """A Serve response as a coroutine, which is what can be waited for with a bound. Cancelling it cancels the call."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class Gateway:
    """A node's front end."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        cards: Sequence[ModelCard],
        groups: Mapping[str, Handle],
        admin: AdminConfig,
        tenancy: TenancyConfig | None,
    ) -> None:
        configure_logging("gateway", error_messages=False)
        tokenizers = {card.name: load_tokenizer(Path(card.source)) for card in cards}
        self._receiver = OutputReceiver(loads_of_this_process())
        await self._receiver.start(this_node()[1])
        backend = ServeBackend(cards, groups, self._receiver)
        self._watch = GatewayWatch(cards, METHODS, open_tracing())
        self._accounts: TenantAccounts | None = None
        if tenancy is not None:
            accounts = self._accounts = TenantAccounts(ActorLink(), refresh_s=tenancy.refresh_s)
            self._watch.metrics.watch_pending_records(lambda: accounts.num_unrecorded)
            await accounts.start()
        observe = self._watch.telemetry.observe
        self._server = GatewayServer(config, limits, backend, tokenizers, self._accounts, observe=observe)
        self._ports = await self._server.start()
        self._metrics_port = self._watch.start(admin, backend.reports)

    async def ready(self) -> Ports:
        """Where the gateway listens; its health tells by now what the groups are."""
        await self._server.refresh_health()
        return self._ports

    async def metrics_port(self) -> int | None:
        """Port of /metrics; None when it is turned off."""
        return self._metrics_port

    async def drain(self) -> None:
        """Refuse new requests, let running ones finish up to gateway.drain_timeout_s, deliver their usage records."""
        await self._server.drain()
        if self._accounts is not None:
            await self._accounts.stop()

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        if self._accounts is not None:
            self._accounts.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica ends in good order."""
        await self.drain()
        await self._server.stop()
        await self._receiver.stop()
        await self._watch.stop()
