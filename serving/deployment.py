"""The two Ray Serve deployments, and how one reaches the other.

A replica of `ReplicaGroup` is the leader of one group of ranks and lives in the first bundle of the group's placement group,
which Serve frees when the leader ends. A replica of `Gateway` is a node's front end. Between them travel bytes (msgpack), by
value: an object reference a token would cost more than the token.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.worker_group import RayExecutor
from model_parallel.config import GroupConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineOutput, EngineRequest
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import GroupFailedError, RequestError
from serving.async_engine import AsyncEngine
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.backend import GroupUnavailableError, ModelCard
from serving.gateway.server import GatewayServer
from serving.log import configure_logging
from serving.models import GroupSpec
from serving.progress import ProgressFile
from serving.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
STALE_AFTER_S = 10.0
"""How long a group that was well and answers late is taken to be well."""
Handle = DeploymentHandle[Any]


class GroupReply(msgspec.Struct, frozen=True, array_like=True):
    """One item of a group's answer: outputs, or why there are none and never will be."""

    outputs: tuple[EngineOutput, ...] = ()
    refusal_kind: str = ""
    """A RequestError's kind, or "unavailable" when the group is lost."""
    refusal: str = ""


class ReplicaGroup:
    """The leader of one replica group: the engine's thread and the sockets to its ranks."""

    _async_engine: AsyncEngine | None = None

    async def __init__(self, spec: GroupSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging()
        # A later incarnation has a higher epoch, on whatever node it comes to lie.
        epoch = time.time_ns()
        config = GroupConfig(checkpoint_path=spec.card.source, parallel=spec.parallel, cache=spec.cache, epoch=epoch)
        self._step_timeout_s = spec.parallel.step_timeout_s
        on_progress = ProgressFile(Path(spec.progress_directory)) if spec.progress_directory else None
        self._executor = await asyncio.to_thread(RayExecutor, config, on_progress=on_progress)
        self._engine = Engine(self._executor, Scheduler(spec.scheduler, spec.cache, epoch=epoch))
        self._decode = msgspec.msgpack.Decoder(tuple[EngineRequest, ...]).decode
        self._encode = msgspec.msgpack.Encoder().encode

    async def generate(self, encoded_requests: bytes) -> AsyncGenerator[bytes, None]:
        """Run the choices of one client request (msgpack, EngineRequests); yields GroupReply items (msgpack)."""
        outputs = self._running_engine().generate(self._decode(encoded_requests))
        try:
            async for batch in outputs:
                yield self._encode(GroupReply(outputs=batch))
        except RequestError as error:
            yield self._encode(GroupReply(refusal_kind=error.kind, refusal=str(error)))
        except GroupFailedError:
            logger.exception("a request reached a lost group")
            yield self._encode(GroupReply(refusal_kind="unavailable", refusal="the replica group was lost"))
        finally:
            await outputs.aclose()

    def _running_engine(self) -> AsyncEngine:
        if self._async_engine is None:
            self._async_engine = AsyncEngine(self._engine, asyncio.get_running_loop())
            self._executor.set_failure_callback(self._async_engine.fail)
        return self._async_engine

    async def probe(self) -> tuple[str | None, str, bool]:
        """(what is wrong with the group, the kernel backends in use, whether answers do not depend on what else runs)."""
        kernels = ", ".join(sorted(self._executor.kernels_names))
        return self._executor.health.problem(), kernels, self._executor.deterministic

    async def stats(self) -> dict[str, float]:
        """Load and totals of the group's scheduler."""
        stats = self._engine.stats
        return {name: float(getattr(stats, name)) for name in stats.__slots__}

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

    def __del__(self) -> None:
        """Called by Serve when the replica ends in good order."""
        if self._async_engine is not None:
            self._async_engine.close(self._step_timeout_s)
        if hasattr(self, "_executor"):  # otherwise the group never started, and has cleaned up after itself
            self._executor.shutdown()


class ServeBackend:
    """The gateway's Backend on Serve handles. See serving/gateway/backend.py."""

    def __init__(self, cards: Sequence[ModelCard], groups: Mapping[str, Handle]) -> None:
        self._models = {card.name: card for card in cards}
        self._groups = {name: handle.options(stream=True) for name, handle in groups.items()}
        self._could_serve_s: dict[str, float] = {}
        """When (monotonic) a group of each model last said that it can."""
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(GroupReply).decode

    @property
    def models(self) -> Mapping[str, ModelCard]:
        return self._models

    async def generate(
        self, model: str, requests: Sequence[EngineRequest]
    ) -> AsyncGenerator[tuple[EngineOutput, ...], None]:
        response = cast(
            DeploymentResponseGenerator[bytes], self._groups[model].generate.remote(self._encode(tuple(requests)))
        )
        open_choices = len(requests)
        try:
            async for item in response:
                reply = self._decode(item)
                if reply.refusal_kind == "unavailable":
                    raise GroupUnavailableError(reply.refusal)
                if reply.refusal_kind:
                    raise RequestError(reply.refusal, kind=reply.refusal_kind)
                open_choices -= sum(output.finish_reason is not None for output in reply.outputs)
                yield reply.outputs
        except BackPressureError as error:
            raise RequestError("every replica group of this model is full", kind="overloaded") from error
        except (RayError, RayServeException) as error:
            logger.warning("a replica group of %s was lost: %s", model, type(error).__name__)
            raise GroupUnavailableError(f"the replica group of model {model!r} was lost") from error
        finally:
            if open_choices:
                response.cancel()

    async def can_serve(self, model: str) -> bool:
        probe = self._groups[model].options(stream=False).probe.remote()
        try:
            problem, kernels, deterministic = await asyncio.wait_for(_value(probe), PROBE_TIMEOUT_S)
        except TimeoutError:
            # A busy machine is slow to answer, so the last word counts for a while.
            return time.monotonic() - self._could_serve_s.get(model, -math.inf) < STALE_AFTER_S
        except (RayError, RayServeException) as error:
            logger.warning("no replica group of %s can be reached: %s", model, type(error).__name__)
            return False
        if problem is not None:
            logger.warning("a replica group of %s is lost: %s", model, problem)
            return False
        self._could_serve_s[model] = time.monotonic()
        if self._models[model].kernels != kernels:
            card = self._models[model]
            self._models[model] = msgspec.structs.replace(card, kernels=kernels, deterministic=deterministic)
        return True


async def _value(response: Any) -> Any:
    """A Serve response as a coroutine, which is what can be waited for with a bound."""
    return await response


class Gateway:
    """A node's front end."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        cards: Sequence[ModelCard],
        groups: Mapping[str, Handle],
    ) -> None:
        configure_logging()
        tokenizers = {card.name: load_tokenizer(Path(card.source)) for card in cards}
        self._server = GatewayServer(config, limits, ServeBackend(cards, groups), tokenizers)
        self._address = (config.host, await self._server.start())

    async def ready(self) -> tuple[str, int]:
        """Host and port that the gateway listens on; its health tells by now what the groups are."""
        await self._server.refresh_health()
        return self._address

    async def drain(self) -> None:
        """Refuse new requests, let running ones finish up to gateway.drain_timeout_s."""
        await self._server.drain()

    async def __del__(self) -> None:
        """Called by Serve when the replica ends in good order."""
        await self._server.drain()
        await self._server.stop()
