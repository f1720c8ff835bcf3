"""From what a client asks of an answer's form to a grammar that is known to compile.

A grammar goes to a group only when it has been compiled once, in a process of the gateway's that may be killed for it. What came
of one is remembered, so that the next request with it waits for nothing.
"""

import asyncio
import hashlib
import logging
import math
import os
import re
import select
import subprocess
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import msgspec

from model_parallel.config import TokenTable
from model_parallel.python_process import module_command
from model_parallel.transport.frames import FrameReader, LinkError, encode_frame
from serving.contracts.errors import OverloadedError, ValidationError
from serving.gateway.core.admission import SharedRoom
from serving.gateway.core.constraints import GrammarText
from serving.gateway.core.grammar_worker import Setup, Trial, Verdict

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 1024
"""Grammars of a model whose verdict is kept; of each a hash, and of a wrong one what is wrong."""
MAX_WAITING = 32
"""Grammars that may wait to be tried out, of one model."""
PATIENCE = 10.0
"""A trial may take so many times its bound in processor time, on a machine that is busy otherwise."""
TOO_SLOW_FOR_S = 60.0
"""How long a grammar that took too long is not tried again."""
_POSITION = re.compile(r"^(at )?\d+\(\d+\): ")
"""Where a message of the library says that something is wrong: line and column."""

_Known = tuple[Verdict, float]
"""A verdict, and until when it counts."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A grammar whose trial has not begun."""

    grammar: GrammarText
    known: "asyncio.Future[_Known]"


class WrongSchemaError(ValidationError):
    """A JSON schema that a grammar is made of cannot be compiled."""

    def __init__(self, field: str, message: str, unsupported: tuple[int, ...]) -> None:
        """`unsupported` has the places, among the grammar's schemas, of all that are not supported and otherwise may be right."""
        super().__init__(field, message)
        self.unsupported = unsupported


class GrammarChecker:
    """Tries out grammars for one model, one at a time. Tenants take turns, so that nobody waits behind all of another's."""

    def __init__(
        self,
        table: Callable[[], TokenTable],
        max_compile_s: float,
        requests: SharedRoom,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`table` is asked for when the first grammar comes; the process starts then too. `requests` has places for those that
        wait for a trial, the same for all models of a gateway."""
        self._table = table
        self._max_compile_s = max_compile_s
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        """By hash."""
        self._requests = requests
        self._trials = SharedRoom(MAX_WAITING)
        self._futures: dict[bytes, asyncio.Future[_Known]] = {}
        self._turns: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        """By tenant; the first is the next."""
        self._is_trying = False
        self._worker: _Worker | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packtrain-grammar-trials")
        self._is_closed = False
        self.num_hits = 0
        self.num_tried = 0

    async def check(self, grammar: GrammarText, tenant: str) -> None:
        """Raises ValidationError, of which WrongSchemaError is one, and OverloadedError when too many others are being tried
        out, or the tenant has its share."""
        key = hashlib.sha256(grammar.text.encode()).digest()
        known = self._known.get(key)
        if known is not None and self._clock() < known[1]:
            self._known.move_to_end(key)
            self.num_hits += 1
            verdict = known[0]
        else:
            verdict = await self._wait(key, grammar, tenant)
        if verdict.error:
            place = grammar.field if verdict.schema is None else grammar.schemas[verdict.schema][0] + verdict.place
            error = verdict.error if grammar.is_as_sent else _POSITION.sub("", verdict.error)
            raise WrongSchemaError(place, f"{place}: {error}", verdict.unsupported_schemas)

    def close(self) -> None:
        """End the process; requests that wait for it are refused, and may come again."""
        self._is_closed = True
        for waiting in [each for of_tenant in self._turns.values() for each in of_tenant]:
            waiting.known.set_exception(OverloadedError("the model is being changed"))
        self._turns.clear()
        if (worker := self._worker) is not None:
            worker.end()  # the thread may be reading from it, and closes it
            self._thread.submit(worker.kill)
        self._thread.shutdown(wait=False)

    async def _wait(self, key: bytes, grammar: GrammarText, tenant: str) -> Verdict:
        if not self._requests.take(tenant):
            raise OverloadedError("too many requests wait for new grammars that are being tried out")
        try:
            # Others may wait for the same one: it goes on when this request does not.
            verdict, _ = await asyncio.shield(self._futures.get(key) or self._begin(key, grammar, tenant))
        finally:
            self._requests.give_back(tenant)
        return verdict

    def _begin(self, key: bytes, grammar: GrammarText, tenant: str) -> "asyncio.Future[_Known]":
        if self._is_closed or not self._trials.take(tenant):
            raise OverloadedError("too many new grammars are being tried out")
        known: asyncio.Future[_Known] = asyncio.get_running_loop().create_future()
        known.add_done_callback(partial(self._end, key, tenant))
        self._futures[key] = known
        self._turns.setdefault(tenant, deque()).append(_Waiting(grammar, known))
        self._try_next()
        return known

    def _try_next(self) -> None:
        if self._is_trying or not self._turns:
            return
        tenant, of_tenant = self._turns.popitem(last=False)
        waiting = of_tenant.popleft()
        if of_tenant:
            self._turns[tenant] = of_tenant
        self._is_trying = True
        self.num_tried += 1
        trial = asyncio.get_running_loop().run_in_executor(self._thread, self._try_out, waiting.grammar)
        trial.add_done_callback(partial(self._pass_on, waiting.known))

    def _pass_on(self, known: "asyncio.Future[_Known]", trial: "asyncio.Future[_Known]") -> None:
        self._is_trying = False
        if trial.cancelled():
            known.cancel()
        elif (error := trial.exception()) is not None:
            known.set_exception(error)
        else:
            known.set_result(trial.result())
        self._try_next()

    def _end(self, key: bytes, tenant: str, known: "asyncio.Future[_Known]") -> None:
        del self._futures[key]
        self._trials.give_back(tenant)
        if not known.cancelled() and known.exception() is None:
            self._known[key] = known.result()
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)

    def _try_out(self, grammar: GrammarText) -> _Known:
        """In the thread of trials: the verdict, and until when it counts."""
        trial = Trial(grammar.text, tuple([schema for _, schema in grammar.schemas]))
        try:
            try:
                return self._ask(trial), math.inf
            except _NotBegunError as error:
                logger.warning("%s; another process is started", error)
                return self._ask(trial), math.inf
        except _NotBegunError as error:
            raise OverloadedError("the process that tries out grammars does not start") from error
        except LinkError as error:
            logger.info("a grammar was given up: %s", error)
            error_text = f"takes more than {self._max_compile_s:g} s, or more memory than it may, to compile"
            return Verdict(error_text), self._clock() + TOO_SLOW_FOR_S

    def _ask(self, trial: Trial) -> Verdict:
        """Raises LinkError when no verdict came; the process is then gone."""
        if self._is_closed:
            raise OverloadedError("the model is being changed")
        worker = self._worker = self._worker or _Worker(self._table(), self._max_compile_s)
        try:
            return worker.ask(trial)
        except LinkError as error:
            self._worker = None
            worker.kill()
            if self._is_closed:
                raise OverloadedError("the model is being changed") from error
            raise


class _NotBegunError(LinkError):
    """The process of trials was gone or silent before it took a trial, which says nothing of the grammar."""


class _Worker:
    """The process, as one thread uses it."""

    def __init__(self, table: TokenTable, max_compile_s: float) -> None:
        """Raises _NotBegunError."""
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
        environment = dict(os.environ) | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                module_command("serving.gateway.core.grammar_worker"),
                bufsize=0,  # what a lost process has not read is not written again when the pipe is closed
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise _NotBegunError(f"the process of trials cannot be started: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        self._timeout_s = PATIENCE * (max_compile_s + 2.0)
        self._unsent = _frame(Setup(table, math.ceil(max_compile_s)))
        self._reader = FrameReader()

    def ask(self, trial: Trial) -> Verdict:
        """Raises _NotBegunError when the process has not begun with the trial in time, and LinkError when it has, and ended or
        gave no verdict in time."""
        try:
            deadline_s = time.monotonic() + self._timeout_s
            self._send(trial, deadline_s)
            self._receive(deadline_s)  # that it has begun
        except (LinkError, OSError) as error:
            raise _NotBegunError(f"the process of trials is gone: {error}") from error
        return msgspec.msgpack.decode(self._receive(time.monotonic() + self._timeout_s), type=Verdict)

    def end(self) -> None:
        """The process ends now. Any thread may call it."""
        self._process.kill()

    def kill(self) -> None:
        """End it and free what it held; bounded, because it is killed. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()

    def _send(self, trial: Trial, deadline_s: float) -> None:
        self._unsent += _frame(trial)
        while self._unsent:
            _wait(self._stdin, select.POLLOUT, deadline_s)
            del self._unsent[: os.write(self._stdin.fileno(), self._unsent)]

    def _receive(self, deadline_s: float) -> bytes:
        """The next frame."""
        while (payload := self._reader.next_payload()) is None:
            _wait(self._stdout, select.POLLIN, deadline_s)
            data = os.read(self._stdout.fileno(), 1 << 16)
            if not data:
                raise LinkError(f"it ended with status {self._process.wait()}")
            self._reader.feed(data)
        return payload


def _frame(message: Setup | Trial) -> bytearray:
    return bytearray(encode_frame(msgspec.msgpack.encode(message)))


def _wait(pipe: IO[bytes], event: int, deadline_s: float) -> None:
    """Until something can be read or written. Raises LinkError."""
    poller = select.poll()
    poller.register(pipe, event)
    if not poller.poll(max(0.0, deadline_s - time.monotonic()) * 1e3):
        raise LinkError("it did not answer in time")
