"""The engine's thread on one side; on the other an event loop, which takes requests in and hands their outputs on."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason

logger = logging.getLogger(__name__)

LOOK_AFTER_PAUSED_S = 1.0
"""Paused sequences expire about so late, when nothing else runs."""


class OutputSink(Protocol):
    """Takes the outputs of some client requests."""

    def send(self, outputs: Sequence[EngineOutput]) -> None:
        """One step's, in the event loop. Neither waits nor raises."""
        ...


@dataclass(slots=True, eq=False)
class _Run:
    """One client request."""

    sink: OutputSink
    observe: Callable[[Sequence[EngineOutput]], Any]
    on_end: Callable[[], Any]
    running: set[str]
    """Ids of its sequences that have not ended."""
    is_paused: bool = False


class AsyncEngine:
    """Runs `Engine.step` in a thread of its own for as long as there is work, and hands outputs to the sinks of their requests.

    One step's outputs cross into the event loop in one call, and reach each sink in one.
    """

    def __init__(
        self, engine: Engine, loop: asyncio.AbstractEventLoop, on_lost: Callable[[], Any] = lambda: None
    ) -> None:
        """`on_lost` is called once in the event loop, when the group is lost and the sinks have been told."""
        self._engine = engine
        self._loop = loop
        self._on_lost = on_lost
        self._runs: dict[str, _Run] = {}
        """By the id of a sequence that has not ended."""
        self._full_sinks: set[OutputSink] = set()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop_steps, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Sequences whose end has not been delivered."""
        return len(self._runs)

    def num_open_of(self, sink: OutputSink) -> int:
        """The same, of one sink."""
        return sum(run.sink is sink for run in self._runs.values())

    def start(
        self,
        requests: Sequence[EngineRequest],
        sink: OutputSink,
        observe: Callable[[Sequence[EngineOutput]], Any] = lambda _: None,
        on_end: Callable[[], Any] = lambda: None,
    ) -> None:
        """Run the choices of one client request; `sink` gets all outputs, and `observe` is told of them too.

        `on_end` is called once: after the last output, or when the request is cancelled or its sink is gone.
        Raises RequestError when the engine refuses and GroupFailedError when it has failed; then nothing has started.
        """
        self._engine.add(*requests)
        run = _Run(sink, observe, on_end, {request.request_id for request in requests})
        self._runs.update(dict.fromkeys(run.running, run))
        if sink in self._full_sinks:
            self._pause_or_resume(run)
        self._wake.set()

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End the client requests that these belong to, without another output. Nothing happens to ids that are not here."""
        for run in self._runs_with(request_ids):
            self._end(run)

    def set_paused(self, request_ids: Sequence[str], *, is_paused: bool) -> None:
        """Pause a client request, or go on with it. Nothing happens to ids that have ended or were never here."""
        for run in self._runs_with(request_ids):
            run.is_paused = is_paused
            self._pause_or_resume(run)

    def set_sink_paused(self, sink: OutputSink, *, is_paused: bool) -> None:
        """The same for all requests of a sink that cannot take more."""
        (self._full_sinks.add if is_paused else self._full_sinks.discard)(sink)
        for run in self._runs_of(sink):
            self._pause_or_resume(run)

    def drop(self, sink: OutputSink) -> None:
        """End all requests of a sink that is gone."""
        self._full_sinks.discard(sink)
        for run in self._runs_of(sink):
            self._end(run)

    def hand_over(self, reason: str) -> None:
        """End all requests here, and have their gateways give what is left of them to other groups. Nothing is wrong with the
        group, and so with none of them."""
        for run in set(self._runs.values()):
            last = [
                EngineOutput(
                    request_id=request_id,
                    finish_reason=FinishReason.ERROR,
                    error=reason,
                    error_kind="unavailable",
                    was_waiting=True,
                )
                for request_id in run.running
            ]
            self._end(run)
            run.sink.send(last)

    def wake(self) -> None:
        """Somebody has given the engine work that is no request."""
        self._wake.set()

    def fail(self, reason: str) -> None:
        """The executor has lost a rank between steps: end all requests. May be called from any thread."""
        logger.error("the group is lost: %s", reason)
        self._engine.fail(reason)
        self._wake.set()

    def close(self, timeout_s: float) -> None:
        """End the thread; a step that is in flight is waited for, up to `timeout_s`."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine thread did not end within %.0f s", timeout_s)

    def _runs_with(self, request_ids: Sequence[str]) -> set[_Run]:
        return {self._runs[request_id] for request_id in request_ids if request_id in self._runs}

    def _end(self, run: _Run) -> None:
        for request_id in run.running:
            del self._runs[request_id]
            self._engine.abort(request_id, FinishReason.CANCELLED)
        self._wake.set()
        run.on_end()

    def _runs_of(self, sink: OutputSink) -> set[_Run]:
        return {run for run in self._runs.values() if run.sink is sink}

    def _pause_or_resume(self, run: _Run) -> None:
        if run.is_paused or run.sink in self._full_sinks:
            self._engine.pause(*run.running)
        else:
            self._engine.resume(*run.running)
            self._wake.set()

    def _loop_steps(self) -> None:
        has_told = False
        while not self._stopping:
            if self._engine.has_work:
                outputs = self._step()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
            elif self._engine.failure is not None and not has_told:
                has_told = True
                self._loop.call_soon_threadsafe(self._on_lost)
            else:
                self._wake.wait(LOOK_AFTER_PAUSED_S if self._engine.num_paused else None)
                self._wake.clear()

    def _step(self) -> list[EngineOutput]:
        try:
            return self._engine.step()
        except Exception:  # a bug; whatever it is, nobody may wait for ever
            logger.exception("the engine's step raised; the group is given up")
            self._engine.fail("the engine failed")
            return self._engine.step()

    def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        """In the event loop: hand a step's outputs to the sinks, and then end the requests that have ended."""
        by_sink: dict[OutputSink, list[EngineOutput]] = {}
        ended: list[_Run] = []
        for output in outputs:
            run = self._runs.get(output.request_id)
            if run is None:
                continue  # The client has gone; its abort is on the way.
            by_sink.setdefault(run.sink, []).append(output)
            run.observe((output,))
            if output.finish_reason:
                del self._runs[output.request_id]
                run.running.remove(output.request_id)
                if not run.running:
                    ended.append(run)
        for sink, belonging in by_sink.items():
            sink.send(belonging)
        for run in ended:
            run.on_end()
