"""asyncio streams on one side, the engine's thread on the other."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason

logger = logging.getLogger(__name__)

MAX_UNREAD_STEPS = 128
"""A stream that is so far behind is paused. A busy event loop never is; what the reader's connection holds comes on top."""
LOOK_AFTER_PAUSED_S = 1.0
"""Paused sequences expire about so late, when nothing else runs."""

Outputs = tuple[EngineOutput, ...]


@dataclass(slots=True, eq=False)
class _Stream:
    """One client request."""

    running: set[str]
    """Ids of its sequences whose end has not been read."""
    unread: asyncio.Queue[Outputs] = field(default_factory=asyncio.Queue)
    """By step."""
    is_behind: bool = False
    """Too much was unread, and not all of that is read yet."""
    is_held: bool = False
    """The gateway says so."""


class AsyncEngine:
    """Runs `Engine.step` in a thread of its own for as long as there is work, and hands outputs to the streams they belong to.

    One step's outputs cross into the event loop in one call, and those of one client request travel as one item. The sequences of
    a reader that falls far behind are paused until it has read what there is, and those that a gateway holds.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._streams: dict[str, _Stream] = {}
        """By the id of a sequence that has not ended."""
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
        stream = _Stream(running=set())
        try:
            self._engine.add(*requests)
            stream.running = {request.request_id for request in requests}
            self._streams.update(dict.fromkeys(stream.running, stream))
            self._wake.set()
            while stream.running:
                outputs = await stream.unread.get()
                while not stream.unread.empty():  # steps that the reader was too busy for travel together
                    outputs += stream.unread.get_nowait()
                stream.running -= {output.request_id for output in outputs if output.finish_reason}
                yield outputs
                if stream.is_behind:
                    stream.is_behind = False
                    self._pause_or_resume(stream)
        finally:
            for request_id in stream.running:
                self._streams.pop(request_id, None)  # its end may be there, unread
                self._engine.abort(request_id, FinishReason.CANCELLED)
            self._wake.set()

    def hold(self, request_ids: Sequence[str], *, is_held: bool) -> None:
        """Pause a client request until it is held no more. Nothing happens to ids that have ended or were never here."""
        for stream in {self._streams[request_id] for request_id in request_ids if request_id in self._streams}:
            stream.is_held = is_held
            self._pause_or_resume(stream)

    def _pause_or_resume(self, stream: _Stream) -> None:
        if stream.is_behind or stream.is_held:
            self._engine.pause(*stream.running)
        else:
            self._engine.resume(*stream.running)
            self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            if self._engine.has_work:
                outputs = self._step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
            else:
                self._wake.wait(LOOK_AFTER_PAUSED_S if self._engine.num_paused else None)
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
        by_stream: dict[_Stream, list[EngineOutput]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # The client has gone; its abort is on the way.
            by_stream.setdefault(stream, []).append(output)
            if output.finish_reason:
                del self._streams[output.request_id]
        for stream, belonging in by_stream.items():
            stream.unread.put_nowait(tuple(belonging))
            if stream.unread.qsize() >= MAX_UNREAD_STEPS and not stream.is_behind:
                stream.is_behind = True
                self._pause_or_resume(stream)

    def close(self, timeout_s: float) -> None:
        """End the thread; a step that is under way is waited for, up to `timeout_s`."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine thread did not end within %.0f s", timeout_s)
