"""The leader's side of a group whose ranks are processes of their own, whoever started them.

A step costs one send a rank and one blocking read of rank 0's answer, in the thread that submits and collects. A second
thread sleeps until some connection hangs up, so that a rank lost between steps, or while rank 0 waits for it inside a
collective, is known; one more for each rank of this host sleeps until that dies, which is known sooner (life_locks.py).
Acknowledgements of the other ranks are read when they are there and never waited for: a rank that hangs stops rank 0's next
collective, and so the step.
"""

import contextlib
import logging
import os
import secrets
import select
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.collectives.shared_memory import library
from model_parallel.config import GroupConfig, ParallelConfig
from model_parallel.engine.messages import StepPlan, StepResult
from model_parallel.errors import CheckpointError, ConfigError, EngineError, GroupFailedError
from model_parallel.native import NativeBuildError
from model_parallel.runtime.health import GroupHealth
from model_parallel.runtime.life_locks import LifeLocks
from model_parallel.runtime.rank_link import (
    Ack,
    Connection,
    Failed,
    Listener,
    Moved,
    Progress,
    RankMessage,
    Ready,
    Result,
    Start,
    Step,
    Stop,
)
from model_parallel.runtime.silence import SilenceLimits
from model_parallel.runtime.starvation import Starvation
from model_parallel.transport.authentication import SECRET_BYTES
from model_parallel.transport.frames import LinkError

logger = logging.getLogger(__name__)

RANK_CLASS = "model_parallel.runtime.rank:Rank"
LOOPBACK = "127.0.0.1"
OnProgress = Callable[[int, int, int], None]
"""(rank, bytes loaded, bytes in all), called while ranks load."""
STOP_TIMEOUT_S = 2.0
"""Bound on each stage of ending ranks: being asked, being told, being killed."""
_LOOK_S = 0.2
"""Between two looks at whether something has moved, while a step is waited for."""
_LAST_WORDS_TIMEOUT_S = 0.2
_READING_TIMEOUT_S = 0.01
"""To read what has come of a rank that is dead already."""
_START_ERRORS: dict[str, type[EngineError]] = {"ConfigError": ConfigError, "CheckpointError": CheckpointError}


class _RankLink:
    """What the leader knows of one connected rank."""

    def __init__(self, rank: int, connection: Connection[RankMessage]) -> None:
        self.rank = rank
        self.connection = connection
        self.reading = threading.Lock()
        self.pid = 0
        self.last_step_id = 0

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" (pid {self.pid})" if self.pid else "")

    def receive(self, timeout_s: float) -> RankMessage:
        """The next message. Raises LinkError that says why this rank is lost; TimeoutError."""
        try:
            message = self.connection.receive(timeout_s)
        except LinkError as error:
            raise LinkError(self.last_words(error)) from error
        if isinstance(message, Failed):
            raise LinkError(self.failed(message))
        return message

    def receive_present(self) -> list[RankMessage]:
        """What has come; to be called when there is something. Raises LinkError that says why this rank is lost."""
        try:
            self.connection.read_once()
            messages = []
            while (message := self.connection.receive_buffered()) is not None:
                messages.append(message)
        except LinkError as error:
            raise LinkError(self.last_words(error)) from error
        return messages

    def receive_acks(self, epoch: int) -> bool:
        """Take in acknowledgements; whether the rank compiles. Raises LinkError for any other message than those two."""
        is_compiling = False
        for message in self.receive_present():
            if isinstance(message, Failed):
                raise LinkError(self.failed(message))
            if isinstance(message, Moved):
                is_compiling |= message.is_compiling
            elif message == Ack(epoch, self.last_step_id + 1):
                self.last_step_id += 1
            else:
                raise LinkError(f"{self.name} answered {message!r:.200} after step {self.last_step_id}")
        return is_compiling

    def failed(self, message: Failed) -> str:
        return f"{self.name} failed: {message.kind}: {message.message}"

    def last_words(self, error: LinkError, timeout_s: float = _LAST_WORDS_TIMEOUT_S) -> str:
        """Why a broken link ended, from what the rank may have sent before it did."""
        self.connection.sock.settimeout(timeout_s)
        with contextlib.suppress(LinkError, TimeoutError):
            while True:
                while (message := self.connection.receive_buffered()) is not None:
                    if isinstance(message, Failed):
                        return self.failed(message)
                self.connection.read_once()
        return f"{self.name} is lost: {error}"


@contextlib.contextmanager
def store_file() -> Iterator[str]:
    """Path of a file that the ranks of this host share. It lies in memory, without a name: nothing is left behind."""
    fd = os.memfd_create("packtrain-store")
    try:
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)


def local_rendezvous(parallel: ParallelConfig, path: str) -> Rendezvous:
    """For ranks that are all on this host and share the file at `path`: as memory if they can, otherwise as a store.

    The leader decides, so that no two ranks can come to different conclusions; and it compiles, not each of them.
    """
    if parallel.device == "cpu" and parallel.tp_size > 1:
        try:
            library.load()
            return Rendezvous(bind_host=LOOPBACK, memory_path=path)
        except NativeBuildError as error:
            logger.warning("ranks will exchange through Gloo, which is slower than shared memory: %s", error)
    return Rendezvous(bind_host=LOOPBACK, store_path=path)


class SocketExecutor(ABC):
    """Executor over links. A subclass starts and ends the rank processes, and calls `_start` when it is constructed."""

    def __init__(self, config: GroupConfig) -> None:
        self.config = config
        self.kernels_names: set[str] = set()
        """Backends that the ranks compute with; one, unless their hosts differ."""
        self.deterministic = True
        """Every rank's rows do not depend on the rest of the step."""
        self._links: list[_RankLink] = []
        self._lock = threading.Lock()
        self._shutting_down = threading.Lock()
        self.health = GroupHealth(config.parallel.step_timeout_s)
        self._limits = SilenceLimits(config.parallel.step_timeout_s)
        self._starvation = Starvation(())
        self._began_s = 0.0
        """When the oldest step in flight began."""
        self._is_compiling = False
        """Some rank has compiled in that step."""
        self._on_failure: Callable[[str], None] | None = None
        self._link_of: dict[int, _RankLink] = {}
        self._in_flight: deque[StepPlan] = deque()
        self._reported = False
        self._closing = False
        self._closed = False
        self._answers = select.poll()
        self._monitor: threading.Thread | None = None
        self._life: LifeLocks | None = None
        self._life_threads: list[threading.Thread] = []

    @property
    def _life_path(self) -> str:
        """For ranks of this host, while they start."""
        assert self._life is not None
        return self._life.path

    @abstractmethod
    def _launch(self, host: str, port: int, secret: bytes) -> None:
        """Begin all rank processes; each is to `connect` to host:port. Returns without waiting for that."""

    @abstractmethod
    def _check_launched(self) -> None:
        """Raise GroupFailedError when a rank process has ended before it connected."""

    @abstractmethod
    def _kill_ranks(self) -> None:
        """End all rank processes at once, without waiting. Safe to call twice and while starting."""

    @abstractmethod
    def _reap_ranks(self) -> None:
        """Make sure that every rank process has ended and free what it held; bounded waits."""

    def beat(self) -> None:
        """The leader's process goes on. From the first call on the ranks of its host kill it when it says so no more
        (leader_watch.py). Safe to call from any thread and after `shutdown`."""
        if (life := self._life) is not None:
            life.beat()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank, each as its own host numbers it."""
        return tuple(link.pid for link in self._links)

    @property
    def _pids_here(self) -> tuple[int, ...]:
        """Those on this host."""
        return self.pids

    def _start(
        self, host: str, rendezvous: Sequence[Rendezvous], on_progress: OnProgress | None, deadline: float
    ) -> None:
        """Bring the group up; ranks reach the leader at `host`. Raises what stopped it, after cleaning up."""
        parallel = self.config.parallel
        secret = secrets.token_bytes(SECRET_BYTES)
        life = self._life = LifeLocks(parallel.tp_size)
        try:
            listener = Listener(host, secret=secret, epoch=self.config.epoch, num_ranks=parallel.tp_size)
            with contextlib.closing(listener):
                self._launch(host, listener.port, secret)
                connections = listener.accept_all(deadline - time.monotonic(), self._check_launched)
            self._links = [_RankLink(rank, connection) for rank, connection in enumerate(connections)]
            for link, where in zip(self._links, rendezvous, strict=True):
                link.connection.sock.settimeout(max(deadline - time.monotonic(), 1e-6))
                link.connection.send(Start(self.config, where))
            self._await_ready(deadline, on_progress)
        except (LinkError, TimeoutError) as error:
            self.shutdown()
            raise GroupFailedError(f"the group did not start: {error}") from error
        except BaseException:
            self.shutdown()
            raise
        finally:
            life.close()
        self._link_of = {link.connection.sock.fileno(): link for link in self._links}
        self._starvation = Starvation(self._pids_here)
        for link in self._links[1:]:
            self._answers.register(link.connection.sock, select.POLLIN)
        self._monitor = threading.Thread(target=self._watch, name="packtrain-ranks", daemon=True)
        self._monitor.start()
        for link in self._links:
            thread = threading.Thread(target=self._await_death, args=(link, life), name="packtrain-life", daemon=True)
            thread.start()
            self._life_threads.append(thread)

    def _await_ready(self, deadline: float, on_progress: OnProgress | None) -> None:
        poller = select.poll()
        waiting = {link.connection.sock.fileno(): link for link in self._links}
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        while waiting:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                late = ", ".join(link.name for link in waiting.values())
                raise TimeoutError(f"{late} did not load within {self.config.parallel.start_timeout_s:g} s")
            for fd, _ in poller.poll(remaining_s * 1e3):
                link = waiting[fd]
                for message in link.receive_present():
                    match message:
                        case Progress(done_bytes, total_bytes):
                            if on_progress is not None:
                                on_progress(link.rank, done_bytes, total_bytes)
                        case Ready(pid, kernels, deterministic) if link.pid == 0:
                            link.pid = pid
                            self.kernels_names.add(kernels)
                            self.deterministic &= deterministic
                            poller.unregister(fd)
                            del waiting[fd]
                        case Failed(kind, text):
                            if kind in _START_ERRORS:
                                raise _START_ERRORS[kind](f"{link.name} failed to start: {text}")
                            raise LinkError(link.failed(message))
                        case _:
                            raise LinkError(f"{link.name} sent {type(message).__name__} while it was loading")

    def submit(self, plan: StepPlan) -> None:
        with self._lock:
            self._raise_if_lost()
            if not self._in_flight:
                self._begin_step()
            self._in_flight.append(plan)
        with self._blame():
            self._send(plan)

    def collect(self) -> StepResult:
        with self._blame():
            result = self._receive()
        with self._lock:
            self._raise_if_lost()
            plan = self._in_flight.popleft()
            if not self._is_compiling:
                self._limits.learn(plan, time.monotonic() - self._began_s)
            # The next one could begin when this one was answered.
            if self._in_flight:
                self._begin_step()
            else:
                self.health.step_ended()
        return result

    def _begin_step(self) -> None:
        self._began_s = time.monotonic()
        self._is_compiling = False
        self.health.moved()
        self._starvation.forget()

    def _raise_if_lost(self) -> None:
        """The lock is held."""
        if self.health.failure is not None or self._closing:
            self._in_flight.clear()
            self.health.step_ended()
            self._reported = True
            raise GroupFailedError(self.health.failure or "the group was shut down")

    @contextlib.contextmanager
    def _blame(self) -> Iterator[None]:
        """Give the group up when a rank is lost in the body."""
        try:
            yield
        except TimeoutError as error:
            step_id = self._in_flight[0].step_id
            silent = ", ".join(link.name for link in self._links if link.last_step_id < step_id)
            self._fail(f"{error}; no answer from {silent}")
        except LinkError as error:
            self._fail(str(error))
        else:
            return
        with self._lock:
            self._raise_if_lost()

    def _send(self, plan: StepPlan) -> None:
        frame = self._links[0].connection.encode(Step(plan))
        for link in self._links:
            link.connection.sock.settimeout(self.config.parallel.step_timeout_s)
            try:
                link.connection.send_frame(frame)
            except TimeoutError:
                timeout_s = self.config.parallel.step_timeout_s
                raise TimeoutError(f"{link.name} did not take step {plan.step_id} within {timeout_s:g} s") from None
            except LinkError as error:
                with link.reading:
                    raise LinkError(link.last_words(error)) from error

    def _receive(self) -> StepResult:
        plan, first = self._in_flight[0], self._links[0]
        while (answer := self._next_of(first)) is None:
            self._receive_acks()
            self._check_silence(plan)
        if not isinstance(answer, Result) or (answer.result.epoch, answer.result.step_id) != (plan.epoch, plan.step_id):
            raise LinkError(f"{first.name} answered step {plan.step_id} of epoch {plan.epoch} with {answer!r:.200}")
        first.last_step_id = plan.step_id
        self._receive_acks()
        return answer.result

    def _next_of(self, link: _RankLink) -> RankMessage | None:
        """What it says within a moment; None when that is nothing, or that it moves."""
        try:
            with link.reading:
                message = link.receive(_LOOK_S)
        except TimeoutError:
            return None
        if isinstance(message, Moved):
            self._take_movement(is_compiling=message.is_compiling)
            return None
        return message

    def _receive_acks(self) -> None:
        for fd, _ in self._answers.poll(0):
            link = self._link_of[fd]
            with link.reading:
                self._take_movement(is_compiling=link.receive_acks(self.config.epoch))

    def _take_movement(self, *, is_compiling: bool) -> None:
        """Some rank has got further."""
        self._is_compiling |= is_compiling
        self.health.moved()
        self._starvation.forget()

    def _check_silence(self, plan: StepPlan) -> None:
        """Raises TimeoutError when nothing has moved in the oldest step, `plan`, for longer than it may. Time for which other
        work has the ranks' processors counts for the longest limit alone."""
        longest_s = self.config.parallel.step_timeout_s
        limit_s = longest_s if self._is_compiling else self._limits.of(plan)
        silent_s, starved_s = self.health.look(), self.health.starved(self._starvation.look())
        if silent_s > longest_s or silent_s - starved_s > limit_s:
            raise TimeoutError(f"nothing has moved in step {plan.step_id} for {min(silent_s, limit_s):.3g} s")

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        with self._lock:
            self._on_failure = callback
        self._report()

    def _watch(self) -> None:
        """Sleep until a link hangs up; ends when all have, as they do after `shutdown`."""
        poller = select.poll()
        links = dict(self._link_of)
        for fd in links:
            poller.register(fd, select.POLLRDHUP)
        while links:
            for fd, _ in poller.poll():
                if self._closed:  # the failure callback has shut the group down, in this thread
                    return
                link = links.pop(fd)
                poller.unregister(fd)
                with link.reading:
                    reason = link.last_words(LinkError("the connection was closed"))
                self._fail(reason)

    def _await_death(self, link: _RankLink, life: LifeLocks) -> None:
        """Sleep until a rank ends. Its connection is read if nobody does so: a rank that has failed by itself has said why."""
        if not life.await_end(link.rank):
            return
        died = LinkError("its process died")
        reason = f"{link.name} is lost: {died}"
        if link.reading.acquire(timeout=_READING_TIMEOUT_S):
            try:
                reason = link.last_words(died, _READING_TIMEOUT_S)
            finally:
                link.reading.release()
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        """The group is lost: the first reason counts. Wakes the thread that waits in `collect` and ends all ranks."""
        with self._lock:
            if self._closing or not self.health.fail(reason):
                return
        for link in self._links:
            link.connection.shutdown()
        self._kill_ranks()
        self._report()

    def _report(self) -> None:
        """Tell the owner of a failure that no step can tell it of; once."""
        with self._lock:
            callback, reason = self._on_failure, self.health.failure
            if callback is None or reason is None or self._in_flight or self._reported:
                return
            self._reported = True
        callback(reason)

    def shutdown(self) -> None:
        with self._shutting_down:
            if self._closed:
                return
            with self._lock:
                running = self._monitor is not None and self.health.failure is None and not self._in_flight
                self._closing = True
            if running:
                self._ask_to_stop()
            else:
                self._kill_ranks()
            for link in self._links:
                link.connection.shutdown()
            if self._monitor is not None and self._monitor is not threading.current_thread():
                self._monitor.join(STOP_TIMEOUT_S)
            self._reap_ranks()
            self._end_life_threads()
            for link in self._links:
                link.connection.close()
            self._closed = True

    def _end_life_threads(self) -> None:
        """They end with their ranks. This may be one of them: the callback that it has called of a failure."""
        others = [thread for thread in self._life_threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(STOP_TIMEOUT_S)
        if self._life is not None and not any(thread.is_alive() for thread in others):
            self._life.unmap()
            self._life = None

    def _ask_to_stop(self) -> None:
        """Send Stop and wait, bounded, until every rank has hung up."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        poller = select.poll()
        for link in self._links:
            link.connection.sock.settimeout(STOP_TIMEOUT_S)
            with contextlib.suppress(LinkError, TimeoutError):
                link.connection.send(Stop())
            poller.register(link.connection.sock, select.POLLRDHUP)
        num_left = len(self._links)
        while num_left and (remaining_s := deadline - time.monotonic()) > 0:
            for fd, _ in poller.poll(remaining_s * 1e3):
                poller.unregister(fd)
                num_left -= 1
