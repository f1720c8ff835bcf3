"""`packtrain chaos`: its faults happen to real processes and connections, and what is wrong is found."""

import asyncio
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import psutil
import pytest
from typer.testing import CliRunner

from bench.chaos import faults
from bench.chaos.campaign import Campaign, Outcome, Plan
from bench.chaos.faults import FAULTS
from bench.chaos.processes import Group, LocalStack
from bench.chaos.proxy import Proxy
from bench.support.fake_backend import FakeBackend
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import ConfigError
from serving.cli.main import app
from tests.support.waiting import wait_until
from tests.unit.gateway.conftest import Serve, serve

__all__ = ["serve"]

NUM_TOKENS = 40


@contextmanager
def processes(num: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(["sleep", "1000"])) for _ in range(num)]
        try:
            yield started
        finally:
            for process in started:
                process.kill()


class FakeStack:
    """One group, whose processes end together unless it is said otherwise."""

    def __init__(self, *, dies_as_a_whole: bool = True) -> None:
        self._children = ExitStack()
        self._dies_as_a_whole = dies_as_a_whole
        self._start()

    def _start(self) -> None:
        self._started = self._children.enter_context(processes(2))
        leader, rank = (process.pid for process in self._started)
        self._group = Group(leader=leader, ranks=(rank,))
        if self._dies_as_a_whole:
            threading.Thread(target=self._end_together, args=(list(self._started),), daemon=True).start()

    def _end_together(self, started: Sequence[subprocess.Popen[bytes]]) -> None:
        while all(_runs(process.pid) for process in started):
            threading.Event().wait(0.01)
        threading.Event().wait(0.3)  # nobody gives a group up sooner than the fault can be seen
        for process in started:
            process.kill()

    def groups(self) -> list[Group]:
        return [self._group]

    def await_groups(self, sizes: Sequence[int], timeout_s: float, without: Sequence[int] = ()) -> list[Group]:
        if without:
            self._start()
        return [self._group]

    def close(self) -> None:
        self._children.close()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def backend(*, bug_after: int | None = None) -> FakeBackend:
    """Tokens are a function of seed and position. From answer `bug_after` on, each lacks one in the middle."""
    num_answers = 0

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        nonlocal num_answers
        num_answers += 1
        has_bug = bug_after is not None and num_answers > bug_after
        (request,) = requests
        for position in range(request.sampling.max_tokens):
            await asyncio.sleep(0.005)
            place = position + (has_bug and position > 20)
            is_last = position == request.sampling.max_tokens - 1
            yield (
                EngineOutput(
                    request_id=request.request_id,
                    token_ids=(97 + (request.sampling.seed + place * place) % 26,),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                ),
            )

    return FakeBackend(script)


async def campaign(serve: Serve, plan: Plan, stack: FakeStack, *, bug_after: int | None = None) -> Outcome:
    lines: list[str] = []
    async with serve(backend(bug_after=bug_after)) as gateway:
        host, _, port = gateway.target.rpartition(":")
        with Proxy(host, int(port)) as proxy:
            try:
                return await asyncio.to_thread(Campaign(plan, stack, proxy, lines.append).run)
            finally:
                stack.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SLOW_S", 0.4), ("SHORT_STOP_S", 0.1), ("PARTITION_S", 0.1)):
        monkeypatch.setattr(faults, name, seconds)


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_happens_and_streams_that_are_whole_are_found_whole(serve: Serve, fault: str) -> None:
    stack = FakeStack(dies_as_a_whole=fault in ("kill", "stop"))
    plan = Plan(faults=(fault,), num_turns=2, num_streams=3, num_tokens=NUM_TOKENS, model="tiny")
    outcome = await campaign(serve, plan, stack)
    assert outcome.found == []
    assert outcome.planned == outcome.observed == {fault: 2}
    assert len(outcome.pauses_s[fault]) == 6


@pytest.mark.parametrize("name", ["short-stop", "slow", "stop"])
def test_ctrl_c_leaves_no_process_standing_still(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()

    def interrupt(*_: object, **__: object) -> None:
        assert wait_until(lambda: psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED)
        seen.append("stopped")
        raise KeyboardInterrupt

    monkeypatch.setattr(faults, "_lost", interrupt)
    monkeypatch.setattr(faults, "time", SimpleNamespace(sleep=interrupt))
    with processes(1) as (victim,), Proxy("127.0.0.1", 1) as proxy:
        with pytest.raises(KeyboardInterrupt):
            FAULTS[name](Group(leader=victim.pid, ranks=()), victim.pid, proxy)
        assert seen == ["stopped"]
        assert wait_until(lambda: psutil.Process(victim.pid).status() != psutil.STATUS_STOPPED)


async def test_a_token_that_is_lost_is_found(serve: Serve) -> None:
    """The negative control: references are right, and the streams that follow are not."""
    plan = Plan(faults=("short-stop",), num_turns=1, num_streams=3, num_tokens=NUM_TOKENS, model="tiny")
    outcome = await campaign(serve, plan, FakeStack(dies_as_a_whole=False), bug_after=3)
    assert [line for line in outcome.found if "lacks 1 tokens" in line]


async def test_a_group_that_does_not_end_as_a_whole_is_found(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PROOF_TIMEOUT_S", 0.3)  # must expire
    plan = Plan(faults=("kill",), num_turns=1, num_streams=1, num_tokens=NUM_TOKENS, model="tiny")
    outcome = await campaign(serve, plan, FakeStack(dies_as_a_whole=False))
    assert outcome.found == ["1 faults of kill were planned and 0 happened"]


def test_a_partition_swallows_what_is_sent_and_cuts_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(*server.getsockname()[:2]) as proxy:
        host, _, port = proxy.address.rpartition(":")
        with socket.create_connection((host, int(port))) as client:
            inner, _ = server.accept()
            with inner:
                client.sendall(b"before")
                assert inner.recv(100) == b"before"
                proxy.part()
                client.sendall(b"lost")
                assert wait_until(lambda: proxy.observed.num_bytes == 4)
                proxy.join()
                assert inner.recv(100) == client.recv(100) == b""
        assert proxy.observed.num_connections == 1
        with socket.create_connection((host, int(port))) as client:
            inner, _ = server.accept()
            with inner:
                inner.sendall(b"after")
                assert client.recv(100) == b"after"


def test_groups_are_told_apart_by_the_connections_between_their_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = {
        1: "ray::ServeReplica:packtrain:Gateway",
        2: "ray::ServeReplica:packtrain-model-m:ReplicaGroup-m",
        3: "ray::ServeReplica:packtrain-model-m:ReplicaGroup-m",
        4: "ray::ServeReplica:packtrain-model-m:ReplicaGroup-m.initialize_and_get_metadata",
        5: "ray::RankActor.serve",
        6: "ray::RankActor.serve",
        7: "ray::RankActor.serve",
        8: "ray::IDLE",
    }
    ends = {1: set(), 2: {(("h", 2), ("h", 5))}, 3: {(("h", 3), ("h", 6))}, 4: {(("h", 4), ("h", 7))}, 8: set()}
    ends |= {pid: {(("h", pid), ("h", pid - 3))} for pid in (5, 6, 7)}
    monkeypatch.setattr("bench.chaos.processes._raylet_of", lambda port: 0)
    monkeypatch.setattr("bench.chaos.processes._title", lambda process: titles[process.pid])
    monkeypatch.setattr("bench.chaos.processes._ends", ends.__getitem__)
    monkeypatch.setattr(
        LocalStack, "_workers", lambda self: [type("Process", (), {"pid": pid})() for pid in sorted(titles)]
    )
    assert LocalStack(1).groups() == [Group(leader=2, ranks=(5,)), Group(leader=3, ranks=(6,))]


def test_a_port_at_which_no_gateway_listens_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ConfigError, match="is no gateway"):
        LocalStack(server.getsockname()[1])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=f"no gateway on this machine listens at port {port}"):
        LocalStack(port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "203.0.113.5:50051"], "--yes-i-own-this allows it"),
        (["--address", "https://127.0.0.1:50051"], "without TLS"),
        (["--faults", "kill,flood"], "--faults has 'flood'; allowed: kill, stop, short-stop, slow, partition"),
        (["--faults", ","], "--faults names none"),
        (["--at", "noon"], "--at is 'noon'; allowed: start, middle, end, random"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["chaos", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
