"""Gateway processes are killed at random tokens of streams; our client goes on at another, and in all the whole answer comes."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from model_parallel.engine.request import EngineRequest, SamplingParams
from protos import inference_pb2 as pb
from serving.client.client import Client
from serving.tenants.records import KeyGrant, Tenant, UsageFilter
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store
from serving.tenants.store.usage import all_usage
from tests.support.drawn_groups import answer
from tests.support.effort import by_day
from tests.support.gateway_process import serve_authority
from tests.support.waiting import PATIENCE_S, wait_until

NUM_KILLS = by_day(3, by_night=100)
NUM_STREAMS = 6
NUM_TOKENS = 60
TIMEOUT_S = 4 * PATIENCE_S


@dataclass
class GatewayProcess:
    """One address and the process that is behind it now."""

    arguments: Sequence[str]
    port: int = 0
    process: "subprocess.Popen[str]" = field(init=False)

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.support.gateway_process", str(self.port), *self.arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def await_ready(self) -> None:
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(PATIENCE_S) == -signal.SIGKILL
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def gateways(key: Path, authority: str) -> Iterator[list[GatewayProcess]]:
    with ExitStack() as stack:
        found = [GatewayProcess((str(key), authority)) for _ in range(2)]
        for gateway in found:
            gateway.start()
            stack.callback(gateway.kill)
        for gateway in found:
            gateway.await_ready()
        yield found


def request(number: int, turn: int) -> pb.GenerateRequest:
    """Every third has several choices."""
    sampling = pb.Sampling(
        max_tokens=NUM_TOKENS,
        seed=100 * turn + number,
        n=1 + 2 * (number % 3 == 0),
        ignore_eos=number % 2 == 0,
        logprobs=0,
    )
    return pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text=f"prompt {number}"), sampling=sampling)


@dataclass
class Read:
    """What a client has of one stream."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    num_logprobs: int = 0
    request_ids: set[str] = field(default_factory=set)
    usage: tuple[int, int] = (0, 0)
    num_resumed: int = 0
    error: Exception | None = None


class Reader(threading.Thread):
    """Reads one stream, and tells when it has so many tokens."""

    def __init__(self, client: Client, asked: pb.GenerateRequest, tell_at: int) -> None:
        super().__init__(daemon=True)
        self.read = Read()
        self.has_come = threading.Event()
        self._client, self._asked, self._tell_at = client, asked, tell_at

    def run(self) -> None:
        try:
            chunks, times = self._client.stream(self._asked, timeout_s=TIMEOUT_S)
            for chunk in chunks:
                self._take(chunk)
            self.read.num_resumed = times.num_resumed
        except Exception as error:
            self.read.error = error
        finally:
            self.has_come.set()

    def _take(self, chunk: Any) -> None:
        read = self.read
        read.token_ids.setdefault(chunk.index, []).extend(chunk.token_ids)
        read.num_logprobs += len(chunk.logprobs)
        if chunk.HasField("request"):
            read.request_ids.add(chunk.request.request_id)
        if chunk.HasField("usage"):
            read.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        if sum(map(len, read.token_ids.values())) >= self._tell_at:
            self.has_come.set()


def violations(asked: pb.GenerateRequest, read: Read) -> list[str]:
    """In what a stream differs from the whole answer."""
    if read.error is not None:
        return [f"ended with {read.error}"]
    sampling = SamplingParams(
        seed=asked.sampling.seed, max_tokens=asked.sampling.max_tokens, ignore_eos=asked.sampling.ignore_eos
    )
    expected = {
        choice: answer(EngineRequest(request_id="", prompt_token_ids=(1,), sampling=sampling, choice=choice))[0]
        for choice in range(asked.sampling.n)
    }
    found = [
        f"choice {choice} has {read.token_ids.get(choice)} instead of {token_ids}"
        for choice, token_ids in expected.items()
        if read.token_ids.get(choice) != token_ids
    ]
    num_tokens = sum(map(len, expected.values()))
    if read.num_logprobs != num_tokens:
        found.append(f"{read.num_logprobs} log-probabilities of {num_tokens} tokens")
    if read.usage != (1 + len(asked.prompt.text), num_tokens):
        found.append(f"usage is {read.usage}")
    if len(read.request_ids) != 1:
        found.append(f"ids {read.request_ids}")
    return found


def run_kill(turn: int, both: Sequence[GatewayProcess], api_key: str, draw: random.Random) -> list[Read]:
    """One kill while streams run, and the gateway is there again. All streams begin at the gateway that is killed."""
    victim, other = both if draw.random() < 0.5 else both[::-1]
    asked = [request(number, turn) for number in range(NUM_STREAMS)]
    with ExitStack() as stack:
        addresses = [f"127.0.0.1:{gateway.port}" for gateway in (victim, other)]
        # Half of the clients know one address alone, and wait until somebody is there again.
        clients = [
            stack.enter_context(Client(*addresses[: 1 + number % 2], api_key=api_key)) for number in range(NUM_STREAMS)
        ]
        for client in clients:
            client.wait_until_connected(PATIENCE_S)
        tell_at = draw.randrange(1, NUM_TOKENS // 2)
        readers = [Reader(client, each, tell_at) for client, each in zip(clients, asked, strict=True)]
        for reader in readers:
            reader.start()
        assert readers[draw.randrange(NUM_STREAMS)].has_come.wait(PATIENCE_S)
        victim.kill()
        victim.start()
        victim.await_ready()
        for reader in readers:
            reader.join(TIMEOUT_S)
    wrong = [
        f"kill {turn}, stream {number}: {what}"
        for number, (each, reader) in enumerate(zip(asked, readers, strict=True))
        for what in violations(each, reader.read)
    ]
    assert wrong == []
    return [reader.read for reader in readers]


async def test_no_token_is_lost_or_repeated_or_billed_twice(tmp_path: Path) -> None:
    key, url = tmp_path / "key", f"sqlite:///{tmp_path / 'tenants.db'}"
    key.write_text("k" * 32)
    store = Store(Database(url))
    store.create_tenant(Tenant(id="t", plan="unlimited", token_budget=10**9))
    api_key = store.create_key("t", KeyGrant()).text

    def kill_all(authority: str) -> list[Read]:
        draw, reads = random.Random(1), list[Read]()
        with gateways(key, authority) as both:
            for turn in range(NUM_KILLS):
                reads += run_kill(turn, both, api_key, draw)
                assert wait_until(partial(_all_are_billed, store, reads)), "what was resumed has its record"
        return reads

    async with serve_authority(url) as authority:
        reads = await asyncio.to_thread(kill_all, authority)
    assert sum(read.num_resumed for read in reads) >= NUM_KILLS, "kills have met streams"
    told = {name: read.usage for read in reads for name in read.request_ids}
    billed = _billed(store)
    assert billed == {name: told[name] for name in billed}, "each stream is billed once, and whole"
    store.database.close()


def _billed(store: Store) -> dict[str, tuple[int, int]]:
    """Prompt and completion tokens of each record. The ledger has one of an id."""
    records = all_usage(store.database, UsageFilter())
    return {record.request_id: (record.num_prompt_tokens, record.num_completion_tokens) for record in records}


def _all_are_billed(store: Store, reads: Sequence[Read]) -> bool:
    """All that were resumed. What ended at the gateway a moment before it was killed may have no record: a streamed answer's is
    on its way for up to a second."""
    return {name for read in reads if read.num_resumed for name in read.request_ids} <= _billed(store).keys()
