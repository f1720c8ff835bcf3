"""asyncio streams on one side, the engine's thread on the other."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Sequence

from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason

logger = logging.getLogger(__name__)

Outputs = tuple[EngineOutput, ...]


class AsyncEngine:
    """Runs `Engine.step` in a thread of its own for as long as there is work, and hands outputs to the streams they belong to.

    One step's outputs cross into the event loop in one call, and those of one client request travel as one item.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._streams: dict[str, asyncio.Queue[Outputs]] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Sequences whose stream is open."""
        return len(self._streams)

    async def generate(self, requests: Sequence[EngineRequest]) -> AsyncGenerator[Outputs, None]:
        """Run the choices of one client request; ends when each had its finish_reason.

        Closing it aborts what still runs. Raises RequestError when the engine refuses, GroupFailedError when it has failed.
        """
        queue: asyncio.Queue[Outputs] = asyncio.Queue()
        running: set[str] = set()
        try:
            self._engine.add(*requests)
            running = {request.request_id for request in requests}
            self._streams.update(dict.fromkeys(running, queue))
            self._wake.set()
            while running:
                outputs = await queue.get()
                while not queue.empty():  # steps that the reader was too busy for travel together
                    outputs += queue.get_nowait()
                running -= {output.request_id for output in outputs if output.finish_reason}
                yield outputs
        finally:
            for request_id in running:
                del self._streams[request_id]
                self._engine.abort(request_id, FinishReason.CANCELLED)
            self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            if self._engine.has_work:
                outputs = self._step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
            else:
                self._wake.wait()
                self._wake.clear()

    def _step(self) -> list[EngineOutput]:
        try:
            return self._engine.step()
        except Exception:  # a bug; whatever it is, no stream may wait for ever
            logger.exception("the engine's step raised; the group is given up")
            self._engine.fail("the engine failed")
            return self._engine.step()

    def fail(self, reason: str) -> None:
        """The executor has lost a rank between steps: end all requests. May be called from any thread."""
        logger.error("the group is lost: %s", reason)
        self._engine.fail(reason)
        self._wake.set()

    def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        """In the event loop: group a step's outputs by the stream they belong to."""
        by_stream: dict[int, tuple[asyncio.Queue[Outputs], list[EngineOutput]]] = {}
        for output in outputs:
            queue = self._streams.get(output.request_id)
            if queue is None:
                continue  # The client has gone; its abort is on the way.
            by_stream.setdefault(id(queue), (queue, []))[1].append(output)
            if output.finish_reason:
                del self._streams[output.request_id]
        for queue, belonging in by_stream.values():
            queue.put_nowait(tuple(belonging))

    def close(self, timeout_s: float) -> None:
        """End the thread; a step that is under way is waited for, up to `timeout_s`."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine thread did not end within %.0f s", timeout_s)
