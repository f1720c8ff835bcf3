"""The leader process of one replica group: a Ray Serve deployment, one replica a group.

The leader lives in the first bundle of the group's placement group, which Serve frees when the leader ends.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import msgspec
from ray import serve

from cluster.ray_api import RayError, draining_nodes, keep_serve_to_this_node, this_node
from cluster.spares import keep_spares
from cluster.worker_group import RayExecutor
from model_parallel.config import GroupConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.scheduler import Scheduler
from model_parallel.engine.speculation import settle_speculation
from model_parallel.engine.step_times import TimedExecutor
from model_parallel.errors import GroupFailedError, RequestError
from model_parallel.runtime.leader_watch import BEAT_PERIOD_S
from serving.contracts.fleet import Departure
from serving.contracts.group_link import GroupCall, GroupReply
from serving.contracts.group_report import GroupReport
from serving.contracts.models import AdapterCard
from serving.contracts.start_failure import telling_start_failures
from serving.contracts.step_report import GroupShape, StepReport
from serving.models.group_spec import GroupSpec
from serving.observability.log import configure_logging, request_id
from serving.observability.tracing import GroupSpan, open_tracing
from serving.replica.adapters import GroupAdapters, load_at_start
from serving.replica.async_engine import AsyncEngine
from serving.replica.load import LoadMeter
from serving.replica.output_sender import OutputSenders
from serving.replica.progress import ProgressFile
from serving.replica.reports import IterationTokens, ReaderLease

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
DRAIN_POLL_S = 0.1
NODE_LOOK_PERIOD_S = 2.0
"""How often a leader looks whether a node of its group is to end."""
NODE_LOOK_TIMEOUT_S = 5.0
FAREWELL_S = 0.2
"""Of a lost group: for answers that are on their way to gateways."""
LOST_STATUS = 70
"""Of its leader's process."""
SPARES_AFTER_S = 2.0
"""When a group has started, requests that waited for it come first."""
LEADER_MODULES = ("ray.serve._private.replica", "serving.replica.deployment")
RANK_MODULES = ("model_parallel.runtime.rank_process", "model_parallel.runtime.rank")
"""What their processes import for most of the time that they take to start."""
MARGIN_S = 5.0
"""Before the end of a node that is to end: by then all is elsewhere."""
RELEASE_TIMEOUT_S = 60.0
"""A group that has retired waits so long for its leave, and then is replaced: nobody has taken it out of the number of groups."""


class _DrainingError(Exception):
    """The group takes nothing new."""


class _OtherModelError(Exception):
    """The call has waited since another model was served under this name."""


class ReplicaGroup:
    """The leader of one replica group: the engine's thread and the sockets to its ranks."""

    _async_engine: AsyncEngine | None = None
    _drain: "asyncio.Task[None] | None" = None
    """Takes nothing new any more: ends when nothing runs either, and nothing else is waited for."""
    _released: asyncio.Event | None = None
    """There is to be one group fewer, and it is this one: set when it may end."""
    _has_drained = False
    _beating: "asyncio.Task[None] | None" = None
    _node_watch: "asyncio.Task[None] | None" = None
    _spares: "asyncio.Task[None] | None" = None
    _end: "asyncio.Task[None] | None" = None
    _exit = staticmethod(os._exit)

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: GroupSpec, drain_timeout_s: float, keeps_spares: bool
    ) -> None:
        keep_serve_to_this_node()
        self._drain_timeout_s = drain_timeout_s
        self._engine_id = serve.get_replica_context().replica_id.unique_id
        configure_logging(f"group {spec.card.name} {self._engine_id}")
        # The engine's thread has a step to send while the event loop works on calls, and would wait so long for Python's lock.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._tracing = open_tracing()
        self._reader = ReaderLease()
        self._model, self._weights = spec.card.name, spec.card.weights
        self._cache = spec.cache
        self._shape = GroupShape(
            group=self._engine_id,
            model=spec.card.name,
            tensor_parallel_size=spec.parallel.tp_size,
            dtype=spec.parallel.dtype,
            quantization=spec.parallel.quantization,
            max_position=spec.scheduler.max_model_len,
        )
        # A later incarnation has a higher epoch, on whatever node it comes to lie.
        epoch = time.time_ns()
        config = GroupConfig(
            checkpoint_path=spec.card.source,
            weights=spec.card.weights,
            parallel=spec.parallel,
            cache=spec.cache,
            scheduler=spec.scheduler,
            epoch=epoch,
            tokens=spec.tokens,
            adapters=spec.adapter_config,
            draft=spec.draft,
        )
        self._step_timeout_s = spec.parallel.step_timeout_s
        on_progress = ProgressFile(Path(spec.progress_directory)) if spec.progress_directory else None
        with telling_start_failures():
            self._executor = await asyncio.to_thread(
                RayExecutor, config, on_progress=on_progress, configure_logging=configure_logging
            )
        self._iterations = IterationTokens()
        limits = settle_speculation(spec.scheduler, is_deterministic=self._executor.deterministic)
        draft = " with a draft model" if spec.draft is not None and limits.speculation != "off" else ""
        logger.info("speculation: %s%s", limits.speculation, draft)
        scheduler = Scheduler(limits, spec.cache, epoch=epoch, adapters=spec.adapter_config, draft=spec.draft)
        self._timed = TimedExecutor(self._executor)
        self._load_meter = LoadMeter(spec.scheduler, spec.cache)
        self._engine = Engine(self._timed, scheduler, on_step=self._iterations.observe)
        self._adapters = GroupAdapters(self._engine, spec.model, spec.parallel, lambda: self._running_engine().wake())
        with telling_start_failures():
            await self._load_adapters(spec)
        self._decode = msgspec.msgpack.Decoder(GroupCall).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._beating = asyncio.create_task(self._beat())
        self._node_watch = asyncio.create_task(self._watch_nodes())
        if keeps_spares:
            self._spares = asyncio.create_task(self._keep_spares())

    async def _load_adapters(self, spec: GroupSpec) -> None:
        """Those that are known from the start. The executor is ended when that fails."""
        if spec.adapter_config is None:
            return
        refs = [(adapter.ref, adapter.num_bytes) for adapter in spec.adapters]
        most = spec.adapter_config.max_loaded
        try:
            await asyncio.to_thread(load_at_start, self._engine, refs, most, spec.parallel.start_timeout_s)
        except BaseException:
            self._executor.shutdown()
            raise

    async def generate(self, encoded_call: bytes) -> bytes:
        """Take in the choices of one client request (msgpack, GroupCall). Returns a GroupReply (msgpack)."""
        call = self._decode(encoded_call)
        request_id.set(call.requests[0].request_id)
        span = GroupSpan(self._tracing, self._model, self._engine_id, call.trace_context)
        reply = GroupReply(self._engine_id)
        try:
            if self._drain is not None:
                raise _DrainingError
            if call.weights != self._weights:
                raise _OtherModelError
            engine = self._running_engine()
            await self._adapters.know(call.requests[0].adapter)
            sink = await self._senders.to(call.return_address)
            engine.start(call.requests, sink, span.received, span.end)
        except RequestError as error:
            reply = GroupReply(self._engine_id, error.kind, str(error), error.retry_after_s)
        except _DrainingError:
            reply = GroupReply(self._engine_id, "draining", "the replica group drains")
        except _OtherModelError:
            reply = GroupReply(self._engine_id, "unavailable", "the model that was asked is not served any more")
        except GroupFailedError as lost:
            logger.warning("a request reached a lost group: %s", lost)
            reply = GroupReply(self._engine_id, "unavailable", "the replica group was lost")
        except (OSError, TimeoutError) as error:
            logger.warning("no outputs can be sent to a gateway at %s: %s", call.return_address.host, error)
            reply = GroupReply(self._engine_id, "unavailable", "the replica group could not send its answer")
        except BaseException as error:  # a bug, or the call was cancelled
            span.failed("" if isinstance(error, asyncio.CancelledError) else type(error).__name__)
            span.end()
            raise
        if reply.error_kind:
            span.failed(reply.error_kind)
            span.end()
        return self._encode(reply)

    def _running_engine(self) -> AsyncEngine:
        if self._async_engine is None:
            self._async_engine = AsyncEngine(self._engine, asyncio.get_running_loop(), self._begin_end)
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
        report = GroupReport(engine=self._engine_id, is_healthy=self._executor.health.problem() is None)
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

    async def load(self) -> bytes:
        """(the group's id, GroupLoad, its Departure) for the autoscaler (msgpack); without the load when the group is lost."""
        load = None
        if self._executor.health.problem() is None:
            load = self._load_meter.load(
                self._engine.stats, self._engine.answer_lengths, list(self._timed.samples.copy())
            )
        return self._encode((self._engine_id, load, self._departure()))

    async def steps(self) -> bytes:
        """StepReport (msgpack) of the last steps."""
        return self._encode(StepReport(shape=self._shape, samples=tuple(self._timed.samples.copy())))

    async def load_adapter(self, encoded: bytes) -> str:
        """Have every rank load an AdapterCard (msgpack). Returns why that cannot be; "" when all have it."""
        self._running_engine()
        return await self._adapters.load(msgspec.msgpack.decode(encoded, type=AdapterCard))

    async def unload_adapter(self, encoded: bytes) -> str:
        """Have the ranks drop it as soon as no request needs it."""
        self._running_engine()
        self._adapters.unload(msgspec.msgpack.decode(encoded, type=AdapterCard).ref.digest)
        return ""

    async def loaded_adapters(self) -> list[str]:
        """Digests of those that all ranks have."""
        return self._engine.loaded_adapters()

    async def check_integrity(self) -> None:
        """Raise RuntimeError unless every KV block is accounted for."""
        self._engine.check_integrity()

    async def pids(self) -> tuple[int, ...]:
        """Process ids of the leader and then of its ranks, in rank order."""
        return (os.getpid(), *self._executor.pids)

    async def begin_drain(self, group: str, grace_s: float) -> bool:
        """Take nothing new, finish what runs within the grace, give the rest to other groups, and be replaced. Of all groups that
        are asked only the one of this id does; whether this is the one."""
        if group == self._engine_id:
            self._drain_within(grace_s, "an operator has asked for it")
        return group == self._engine_id

    async def retire(self, groups: bytes) -> bytes:
        """Of these groups (msgpack, ids) each drains, and then waits for its leave. Returns its id (msgpack); "" when it is not
        one of them, or when Serve is replacing it already."""
        is_meant = self._engine_id in msgspec.msgpack.decode(groups, type=list[str])
        if is_meant and self._released is None and not (self._drain is not None and self._drain.done()):
            self._released = asyncio.Event()
            self._drain_within(self._drain_timeout_s, "there are to be fewer groups")
        return self._encode(self._engine_id if is_meant and self._released is not None else "")

    async def leave(self, groups: bytes) -> None:
        """Of these groups (msgpack, ids) each that has retired lets Serve end it."""
        if self._released is not None and self._engine_id in msgspec.msgpack.decode(groups, type=list[str]):
            self._released.set()

    def _departure(self) -> Departure:
        if self._released is None:
            return Departure.NONE
        return Departure.RETIRED if self._has_drained else Departure.RETIRING

    def _drain_within(self, grace_s: float, reason: str) -> None:
        if self._drain is None:
            logger.info("draining for %.0f s at most: %s", grace_s, reason)
            self._drain = asyncio.create_task(self._depart_within(grace_s))

    async def _depart_within(self, grace_s: float) -> None:
        """Serve replaces the group when this has ended."""
        await self._finish_within(grace_s)
        self._has_drained = True
        if self._released is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), RELEASE_TIMEOUT_S)

    async def _finish_within(self, timeout_s: float) -> None:
        """Until nothing runs; what is left by then goes on in other groups."""
        if self._async_engine is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._async_engine.num_open:
                    await asyncio.sleep(DRAIN_POLL_S)
        self._async_engine.hand_over("the replica group that served this request was stopped")

    def _begin_end(self) -> None:
        """The group is lost, and gateways have been told on the link."""
        self._end = asyncio.create_task(self._end_process())

    async def _end_process(self) -> None:
        """Serve replaces a group whose process is gone at its next look. One that says that it is unhealthy has to say so three
        times."""
        await asyncio.sleep(FAREWELL_S)
        self._senders.close()
        await asyncio.to_thread(self._executor.shutdown)
        self._tracing.close()
        logger.error("the leader ends, and Serve starts the group anew: %s", self._engine.failure)
        self._exit(LOST_STATUS)

    async def _beat(self) -> None:
        """The ranks on this host kill a leader whose event loop stands still: it keeps Serve from replacing the group."""
        while True:
            self._executor.beat()
            await asyncio.sleep(BEAT_PERIOD_S)

    async def _keep_spares(self) -> None:
        """For the next incarnation of this group, or of another one."""
        await asyncio.sleep(SPARES_AFTER_S)
        try:
            await keep_spares(1 + self._shape.tensor_parallel_size, (*LEADER_MODULES, *RANK_MODULES))
        except (RayError, TimeoutError) as error:
            logger.warning("there are no spare processes: %s: %s", type(error).__name__, error)

    async def _watch_nodes(self) -> None:
        """Drain as soon as a node with a rank of this group is to end. Serve looks at the leader's alone."""
        nodes = {at.node_id for at in self._executor.locations} | {this_node()[0]}
        while self._drain is None:
            await asyncio.sleep(NODE_LOOK_PERIOD_S)
            try:
                ending = await asyncio.to_thread(draining_nodes, NODE_LOOK_TIMEOUT_S)
            except Exception as error:  # the watch must outlive whatever the control store answers
                logger.warning("it cannot be told which nodes are to end: %s: %s", type(error).__name__, error)
                continue
            if found := nodes & ending.keys():
                left_s = min(ending[node] for node in found) - time.time() - MARGIN_S
                self._drain_within(
                    max(0.0, min(self._drain_timeout_s, left_s)), f"Ray is to end the node {', '.join(sorted(found))}"
                )

    async def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica and free its placement group."""
        self._running_engine()
        problem = self._executor.health.problem()
        if problem is not None:
            raise GroupFailedError(problem)
        if self._drain is not None and self._drain.done():
            raise GroupFailedError("the group has drained, and is to be replaced")

    async def __del__(self) -> None:
        """Called by Serve when the replica ends in good order: what it has taken in runs to its end, in bounded time."""
        for task in (self._node_watch, self._spares):
            if task is not None:
                task.cancel()
        if self._async_engine is not None:
            await self._finish_within(0.0 if self._drain is not None and self._drain.done() else self._drain_timeout_s)
            await asyncio.to_thread(self._async_engine.close, self._step_timeout_s)
            self._senders.close()
        if hasattr(self, "_executor"):  # otherwise the group never started, and has cleaned up after itself
            await asyncio.to_thread(self._executor.shutdown)
            self._tracing.close()
        if self._beating is not None:
            self._beating.cancel()
