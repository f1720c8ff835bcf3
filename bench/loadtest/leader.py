"""Leads a load test: starts the processes that send, waits for machines that join, begins the run, takes what was measured."""

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from bench.loadtest.records import Health, Record
from bench.loadtest.runner import Resolved
from bench.loadtest.scenario import Scenario
from bench.loadtest.sender import SENDERS_GROUP, command
from bench.loadtest.wire import (
    Begin,
    Connected,
    Done,
    Failed,
    FromSender,
    Halt,
    Peer,
    Plan,
    Progress,
    Records,
    accept,
)
from model_parallel.errors import ConfigError
from model_parallel.transport.frames import MAX_FRAME_BYTES, LinkError
from serving.client.tls import ClientTls
from serving.config import LOAD_SECRET_VARIABLE

START_TIMEOUT_S = 120.0
"""Within which local processes are there, and within which connections are open, besides what warm-up takes."""
JOIN_POLL_S = 0.1
BEGIN_AFTER_S = 0.5
RESULT_TIMEOUT_S = 120.0
"""Between two messages of a sender after the run."""
STOP_TIMEOUT_S = 5.0
_STDERR_TAIL = 2000
MIN_SECRET_CHARACTERS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Senders:
    """Who sends."""

    num_processes: int = 1
    """On this machine."""
    num_joined: int = 0
    """Processes of other machines that are waited for."""
    listen_host: str = "127.0.0.1"
    listen_port: int = 0
    join_timeout_s: float = 600.0
    secret: str = ""
    """Of the run. Made up when nobody joins."""
    owns_targets: bool = False
    """Somebody said that targets beyond loopback are theirs."""

    def __post_init__(self) -> None:
        if self.num_joined and len(self.secret) < MIN_SECRET_CHARACTERS:
            raise ConfigError(
                f"${LOAD_SECRET_VARIABLE} has {len(self.secret)} characters; for others to join it must have at least "
                f"{MIN_SECRET_CHARACTERS}, the same on every machine"
            )


@dataclass(slots=True)
class Run:
    """What was measured."""

    records: list[Record] = field(default_factory=list)
    healths: list[Health] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Senders that went away, and why."""
    was_interrupted: bool = False


class Interrupt:
    """Ctrl-C, as the event loop sees it: it ends a run, which keeps what was measured; without a run, or twice, it ends all."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.is_running = False
        """There is a run that can be asked to stop."""
        self._task = asyncio.current_task()

    def __call__(self) -> None:
        if self._task is not None and (self.stop.is_set() or not self.is_running):
            self._task.cancel()
        self.stop.set()


OnProgress = Callable[[int, Progress], None]


@contextlib.asynccontextmanager
async def crew(
    senders: Senders, tls: ClientTls | None, report: Callable[[str], None] = lambda line: None
) -> "AsyncIterator[Crew]":
    """The processes that send, for as long as the block. Raises ConnectionError when not all come, LinkError when one dies."""
    count = senders.num_processes + senders.num_joined
    secret = (senders.secret if senders.num_joined else secrets.token_hex(32)).encode()
    peers: list[Peer[FromSender]] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = await accept(reader, writer, secret)
        except LinkError:
            writer.close()
            return
        if len(peers) < count:
            peers.append(peer)
        else:
            peer.close()  # the sender tells that there is nothing for it to do

    def part() -> None:
        for peer in peers:
            peer.close()

    host = senders.listen_host if senders.num_joined else "127.0.0.1"
    try:
        server = await asyncio.start_server(greet, host, senders.listen_port if senders.num_joined else 0)
    except OSError as error:
        raise ConfigError(f"--listen: cannot listen at {host}:{senders.listen_port}: {error}") from error
    port = server.sockets[0].getsockname()[1]
    async with contextlib.AsyncExitStack() as stack:
        local_host = "127.0.0.1" if host in ("0.0.0.0", "127.0.0.1") else host
        processes = _Processes(local_host, port, secret.decode(), tls, senders.owns_targets)
        stack.push_async_callback(processes.stop)
        stack.callback(server.close)
        await processes.start(senders.num_processes)
        if senders.num_joined:
            report(f"waiting for {senders.num_joined} processes to join at {host}:{port}")
        timeout_s = senders.join_timeout_s if senders.num_joined else START_TIMEOUT_S
        stack.callback(part)
        await _await_peers(peers, count, timeout_s, processes, report)
        yield Crew(peers, processes)


class Crew:
    """Processes that are ready to send, run after run."""

    def __init__(self, peers: Sequence[Peer[FromSender]], processes: "_Processes") -> None:
        self._peers, self._processes = peers, processes

    async def run(
        self,
        scenario: Scenario,
        resolved: Sequence[Resolved],
        stop: asyncio.Event,
        *,
        on_begin: Callable[[], None] = lambda: None,
        on_progress: OnProgress = lambda index, progress: None,
    ) -> Run:
        """Raises ConfigError, ConnectionError; LinkError when a sender is lost before the run, or all are in it."""
        _check_count(scenario, len(self._peers))
        conductor = _Conductor(self._peers, scenario, on_progress)
        try:
            await conductor.prepare(resolved)
            on_begin()
            return await conductor.run(stop)
        except LinkError as error:
            raise LinkError(f"{error}. {await self._processes.complaint()}".strip()) from error


def _check_count(scenario: Scenario, count: int) -> None:
    for tenant in scenario.tenants:
        if tenant.max_concurrency is not None and tenant.max_concurrency < count:
            raise ConfigError(
                f"tenants.{tenant.name}.max_concurrency is {tenant.max_concurrency}; it must be at least the {count} "
                "processes that share it"
            )


async def _await_peers(
    peers: list[Peer[FromSender]], count: int, timeout_s: float, processes: "_Processes", report: Callable[[str], None]
) -> None:
    """Until so many are there. One that leaves before that makes room for another. Raises ConnectionError, LinkError."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        await processes.check()
        for peer in [peer for peer in peers if peer.has_left]:
            peers.remove(peer)
            peer.close()
            report(f"a process that had joined has left; {len(peers)} of {count} are there")
        if len(peers) == count:
            return
        if asyncio.get_running_loop().time() > deadline_s:
            raise ConnectionError(f"{len(peers)} of {count} processes joined within {timeout_s:g} s")
        await asyncio.sleep(JOIN_POLL_S)


class _Processes:
    """The senders of this machine."""

    def __init__(self, host: str, port: int, secret: str, tls: ClientTls | None, owns_targets: bool) -> None:
        self._command = command(host, port, tls, owns_targets=owns_targets)
        self._environment = os.environ | {LOAD_SECRET_VARIABLE: secret}
        self._started: list[asyncio.subprocess.Process] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop()

    async def start(self, count: int) -> None:
        for _ in range(count):
            process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=self._errors,
                process_group=SENDERS_GROUP,
            )
            self._started.append(process)

    async def check(self) -> None:
        """Raises LinkError when one has ended."""
        for process in self._started:
            if process.returncode is not None:
                raise LinkError(f"a sending process ended with status {process.returncode}: {await self.complaint()}")

    async def complaint(self) -> str:
        """The last that they wrote to standard error, once those that are ending have ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(process.wait() for process in self._started))
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _STDERR_TAIL))
        return self._errors.read().decode(errors="replace").strip()

    async def stop(self) -> None:
        for process in self._started:
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._errors.close()


class _Conductor:
    """The messages between leader and senders, in their order."""

    def __init__(self, peers: Sequence[Peer[FromSender]], scenario: Scenario, on_progress: OnProgress) -> None:
        self._peers, self._scenario, self._on_progress = peers, scenario, on_progress
        self._result = Run()

    async def prepare(self, resolved: Sequence[Resolved]) -> None:
        """Every sender has its part and its connections. Raises ConfigError, ConnectionError, LinkError."""
        size = len(msgspec.msgpack.encode(list(resolved)))
        if size > MAX_FRAME_BYTES // 2:
            raise ConfigError(f"the entries of the scenario's files take {size} bytes; lower max_entries")
        text = self._scenario.model_dump_json(exclude_unset=True)
        warm_up_s = self._scenario.warmup_requests * len(self._scenario.tenants) * self._scenario.timeout_s
        try:
            async with asyncio.timeout(START_TIMEOUT_S + warm_up_s):
                for index, peer in enumerate(self._peers):
                    await peer.send(Plan(text, list(resolved), index, len(self._peers)))
                for peer in self._peers:
                    await self._expect(peer, Connected)
        except TimeoutError:
            raise ConnectionError(f"not all senders were ready within {START_TIMEOUT_S + warm_up_s:g} s") from None

    async def _expect(self, peer: Peer[FromSender], kind: type) -> None:
        message = await peer.receive()
        if isinstance(message, Failed):
            raise (ConnectionError if message.is_connection else ConfigError)(message.message)
        if not isinstance(message, kind):
            raise LinkError(f"a sender sent {type(message).__name__} instead of {kind.__name__}")

    async def run(self, stop: asyncio.Event) -> Run:
        """Raises LinkError when no sender is left."""
        for peer in self._peers:
            await peer.send(Begin(BEGIN_AFTER_S))
        halting = asyncio.create_task(self._halt_on(stop))
        limit_s = BEGIN_AFTER_S + self._scenario.duration_s + self._scenario.drain_s + RESULT_TIMEOUT_S
        try:
            await asyncio.gather(*(self._collect(index, peer, limit_s) for index, peer in enumerate(self._peers)))
        finally:
            halting.cancel()
        if not self._result.healths:
            raise LinkError(f"no sender is left: {'; '.join(self._result.lost)}")
        self._result.records.sort(key=lambda record: (record.intended_s, record.tenant, record.session, record.turn))
        self._result.healths.sort(key=lambda health: health.process)
        return self._result

    async def _halt_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._result.was_interrupted = True
        for peer in self._peers:
            with contextlib.suppress(LinkError):  # it has ended already
                await peer.send(Halt())

    async def _collect(self, index: int, peer: Peer[FromSender], limit_s: float) -> None:
        records: list[Record] = []
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    message = await peer.receive()
                    if isinstance(message, Progress):
                        self._on_progress(index, message)
                    elif isinstance(message, Records):
                        records += message.records
                    elif isinstance(message, Done):
                        self._result.records += records
                        self._result.healths.append(message.health)
                        return
                    elif isinstance(message, Failed):
                        raise LinkError(message.message)
        except (LinkError, TimeoutError) as error:
            self._result.lost.append(f"sender {index}: {str(error) or 'it did not end in time'}")
