"""The calls of packtrain.v1.Admin that change what is served. What they do is the driver's (contracts/operations.py)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import grpc

from protos import admin_pb2 as pb
from serving.admin import convert
from serving.contracts.errors import ChangeError
from serving.contracts.operations import Operations, Progress, Report

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")
_NUM_THREADS = 4
"""One change is made at a time; the others are refused, or ask for the state."""


class ModelCalls:
    """A part of AdminServicer."""

    def __init__(self, operations: Operations | None) -> None:
        """None where nothing can be changed."""
        self._operations = operations
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="operations")

    def close(self) -> None:
        """What the threads still do, they finish by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ListDeployedModels(
        self, request: pb.ListDeployedModelsRequest, context: Context
    ) -> pb.ListDeployedModelsResponse:
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._found().status)
        return pb.ListDeployedModelsResponse(models=map(convert.model_message, await running))

    async def DeployModel(self, request: pb.DeployModelRequest, context: Context) -> AsyncIterator[pb.ChangeProgress]:
        operations, most = self._found(), convert.max_unavailable(request.max_unavailable)
        async for progress in self._reported(
            lambda report: operations.deploy(request.config, most, report, only_check=request.only_check)
        ):
            yield progress

    async def UndeployModel(
        self, request: pb.UndeployModelRequest, context: Context
    ) -> AsyncIterator[pb.ChangeProgress]:
        operations = self._found()
        async for progress in self._reported(lambda report: operations.undeploy(request.name, report)):
            yield progress

    async def ScaleModel(self, request: pb.ScaleModelRequest, context: Context) -> AsyncIterator[pb.ChangeProgress]:
        operations, numbers = self._found(), convert.group_numbers(request)
        async for progress in self._reported(lambda report: operations.scale(request.name, report, **numbers)):
            yield progress

    async def RestartModel(self, request: pb.RestartModelRequest, context: Context) -> AsyncIterator[pb.ChangeProgress]:
        operations, most = self._found(), convert.max_unavailable(request.max_unavailable)
        async for progress in self._reported(lambda report: operations.restart(request.name, most, report)):
            yield progress

    async def DrainGroup(self, request: pb.DrainGroupRequest, context: Context) -> AsyncIterator[pb.ChangeProgress]:
        operations = self._found()
        grace_s = convert.duration_s(request.grace) if request.HasField("grace") else None
        async for progress in self._reported(lambda report: operations.drain(request.group, grace_s, report)):
            yield progress

    async def AddAdapter(self, request: pb.AddAdapterRequest, context: Context) -> pb.AddAdapterResponse:
        with convert.within("adapter"):
            card = await self._run(self._found().add_adapter, *convert.new_adapter(request.adapter))
        return pb.AddAdapterResponse(adapter=convert.adapter_message(card))

    async def RemoveAdapter(self, request: pb.RemoveAdapterRequest, context: Context) -> pb.RemoveAdapterResponse:
        card = await self._run(self._found().remove_adapter, request.name)
        return pb.RemoveAdapterResponse(adapter=convert.adapter_message(card))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        cards = await self._run(self._found().adapters)
        return pb.ListAdaptersResponse(adapters=map(convert.adapter_message, cards))

    async def _run(
        self, change: Callable[_Arguments, _Answer], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Answer:
        """In a thread. It is done to its end, also when the client leaves."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: change(*args, **kwargs))

    def _found(self) -> Operations:
        if self._operations is None:
            raise ChangeError("what this server serves cannot be changed")
        return self._operations

    async def _reported(self, change: Callable[[Report], None]) -> AsyncIterator[pb.ChangeProgress]:
        """Its progress, as it comes. The change goes on when nobody waits for it any more."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Progress | None] = asyncio.Queue()

        def report(progress: Progress) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(arrived.put_nowait, progress)

        def end(running: "asyncio.Future[None]") -> None:
            if not running.cancelled() and (error := running.exception()) is not None:
                logger.warning("a change was not made: %s", error)
            arrived.put_nowait(None)

        running = loop.run_in_executor(self._threads, change, report)
        running.add_done_callback(end)
        while (progress := await arrived.get()) is not None:
            yield convert.progress_message(progress)
        await running
