"""The adapters of one group, in its leader: what a request or an operator names becomes known to the engine here."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from model_parallel.checkpoint.adapter_files import adapter_bytes, describe_adapter
from model_parallel.config import ModelConfig, ParallelConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import AdapterRef
from model_parallel.errors import CheckpointError, GroupFailedError, RequestError
from serving.contracts.models import AdapterCard

logger = logging.getLogger(__name__)

_LOOK_S = 0.01
LOAD_TIMEOUT_S = 100.0
"""A rank reads hundreds of megabytes in it."""
FAILED = "the adapter could not be loaded; the server's log says why"


class GroupAdapters:
    """Describes an adapter once, before its first request. A gateway says where it lies and what it must be."""

    def __init__(
        self, engine: Engine, model: ModelConfig, parallel: ParallelConfig, wake: Callable[[], None] = lambda: None
    ) -> None:
        """`wake` has the engine look for work."""
        self._engine = engine
        self._wake = wake
        self._unloading: set[asyncio.Task[None]] = set()
        self._model = model
        self._parallel = parallel
        self._described: dict[str, asyncio.Task[None]] = {}
        """By digest, while it goes on: many requests wait for one."""

    async def know(self, ref: AdapterRef | None) -> None:
        """Returns when the engine knows it. Raises RequestError when its files are not, or no longer, what it is said to be."""
        if ref is None or self._engine.knows_adapter(ref.digest):
            return
        task = self._described.get(ref.digest)
        if task is None:
            task = self._described[ref.digest] = asyncio.create_task(self._describe(ref))
            task.add_done_callback(lambda _: self._described.pop(ref.digest, None))
        await asyncio.shield(task)

    async def load(self, card: AdapterCard) -> str:
        """Have every rank load it. Returns why that cannot be, for operators to read; "" when all have it."""
        digest = card.ref.digest
        try:
            await self.know(card.ref)
        except RequestError as error:
            return str(error)
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                self._engine.load_adapter(digest)
                while not (state := self._engine.adapter_state(digest)).is_loaded:
                    if state.error:
                        self._engine.drop_adapter(digest)
                        return state.error
                    if self._engine.failure is not None:
                        return "the group is lost"
                    if not state.is_loading:  # there was no room, and may be now
                        self._engine.load_adapter(digest)
                    self._wake()
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            self._engine.drop_adapter(digest)
            return f"there was no room within {LOAD_TIMEOUT_S:g} s: all adapters that are loaded are in use"
        return ""

    def unload(self, digest: str) -> None:
        """Have the ranks drop it as soon as no request needs it."""
        task = asyncio.create_task(self._unload(digest))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload(self, digest: str) -> None:
        while self._engine.failure is None and not self._engine.drop_adapter(digest):
            await asyncio.sleep(_LOOK_S)
        self._wake()

    async def _describe(self, ref: AdapterRef) -> None:
        try:
            info = await asyncio.to_thread(describe_adapter, Path(ref.path), self._model)
            if info.digest != ref.digest:
                raise CheckpointError(f"{ref.path} holds another adapter than when it was added; add it again")
        except CheckpointError as error:
            logger.error("an adapter could not be loaded: %s", error)
            raise RequestError(FAILED, kind="adapter_failed") from error
        num_bytes = adapter_bytes(info, self._model, self._parallel.tp_size, dtype=self._parallel.dtype)
        self._engine.know_adapter(ref, num_bytes)


def load_at_start(engine: Engine, refs: list[tuple[AdapterRef, int]], max_loaded: int, timeout_s: float) -> None:
    """Load known adapters, each with its bytes on a rank, as far as they fit, before the group serves. Drives the engine.

    Raises CheckpointError for one that cannot be loaded, GroupFailedError, and TimeoutError.
    """
    deadline_s = time.monotonic() + timeout_s
    for index, (ref, num_bytes) in enumerate(refs):
        engine.know_adapter(ref, num_bytes)
        if index >= max_loaded:
            continue
        engine.load_adapter(ref.digest)
        while engine.has_work:
            engine.step()
            if engine.failure is not None:
                raise GroupFailedError(engine.failure)
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the adapter at {ref.path} was not loaded within {timeout_s:g} s")
        if error := engine.adapter_state(ref.digest).error:
            raise CheckpointError(error)
