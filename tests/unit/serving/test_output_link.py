"""Outputs on their way from an engine to a gateway over a real connection."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from serving import output_link
from serving.async_engine import AsyncEngine, SinkLostError
from serving.gateway.backend import GroupUnavailableError
from serving.output_link import MAGIC, Inbox, OutputReceiver, OutputSenders
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output

HOST = "127.0.0.1"


class Group:
    """An engine on fake ranks, and its half of the link."""

    def __init__(self, name: str) -> None:
        self.harness = Harness(max_num_seqs=8, max_waiting_requests=32)
        self.harness.executor.during_step = lambda: time.sleep(0.001)
        self.engine = AsyncEngine(self.harness.engine, asyncio.get_running_loop())
        self.senders = OutputSenders(name, self.engine)

    async def run(self, receiver: OutputReceiver, *requests: EngineRequest) -> None:
        await self.engine.run(requests, await self.senders.to(receiver.address))

    async def until_asleep(self) -> None:
        async with asyncio.timeout(5):
            while self.harness.engine.has_work:
                await asyncio.sleep(0.005)

    def close(self) -> None:
        self.senders.close()
        self.engine.close(5)


@pytest.fixture
async def receiver() -> AsyncIterator[OutputReceiver]:
    receiver = OutputReceiver()
    await receiver.start(HOST)
    yield receiver
    await receiver.stop()


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    group = Group("group-1")
    yield group
    group.close()


def request(request_id: str, max_tokens: int = 90) -> EngineRequest:
    return make_request(request_id, [1, 2, 3], max_tokens=max_tokens, seed=1)


async def read(inbox: Inbox, num_choices: int = 1) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    async with asyncio.timeout(10):
        while sum(output.finish_reason is not None for output in outputs) < num_choices:
            outputs += await inbox.next()
    return outputs


def tokens(outputs: list[EngineOutput], request_id: str) -> list[int]:
    return [token for output in outputs if output.request_id == request_id for token in output.token_ids]


async def test_every_request_gets_its_own_outputs_from_whichever_group_runs_it(receiver: OutputReceiver) -> None:
    groups = [Group("group-1"), Group("group-2")]
    names = [f"r{number}" for number in range(12)]
    inboxes = {name: receiver.open([name]) for name in names}
    runs = [groups[number % 2].run(receiver, request(name)) for number, name in enumerate(names)]
    results = await asyncio.gather(*(read(inbox) for inbox in inboxes.values()), *runs)
    for number, name in enumerate(names):
        assert tokens(results[number] or [], name) == solo_output(request(name))
        assert inboxes[name].engine == f"group-{number % 2 + 1}"
    assert len(receiver.connections) == 2, "one connection a group"
    for each in groups:
        each.close()


async def test_choices_travel_to_one_inbox(receiver: OutputReceiver, group: Group) -> None:
    inbox = receiver.open(["a", "b"])
    run = asyncio.create_task(group.run(receiver, request("a", 5), request("b", 50)))
    outputs = await read(inbox, num_choices=2)
    await run
    assert tokens(outputs, "a") == solo_output(request("a", 5))
    assert tokens(outputs, "b") == solo_output(request("b", 50))


async def test_an_inbox_that_is_not_read_holds_its_request_until_it_is_read(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_link, "MAX_UNREAD_STEPS", 5)
    monkeypatch.setattr(output_link, "HOLD_AFTER_S", 0.001)
    slow, fast = receiver.open(["slow"]), receiver.open(["fast"])
    runs = [asyncio.create_task(group.run(receiver, request(name))) for name in ("slow", "fast")]
    assert tokens(await read(fast), "fast") == solo_output(request("fast"))
    await group.until_asleep()
    stats = group.harness.engine.stats
    assert (stats.num_paused, stats.kv_usage) == (1, 0)
    assert len(await slow.next()) < 60
    assert group.harness.engine.num_paused == 1, "what was handed out is not dealt with yet"
    await read(slow)
    await asyncio.gather(*runs)


async def test_a_gateway_that_takes_nothing_pauses_all_that_runs_for_it(receiver: OutputReceiver, group: Group) -> None:
    sink = await group.senders.to(receiver.address)
    run = asyncio.create_task(group.run(receiver, request("a")))
    sink.pause_writing()
    async with asyncio.timeout(5):
        while not group.harness.engine.num_paused:
            await asyncio.sleep(0.005)
    inbox = receiver.open(["b"])
    sink.resume_writing()
    await run
    outputs, _ = await asyncio.gather(read(inbox), group.run(receiver, request("b")))
    assert tokens(outputs, "b") == solo_output(request("b"))


async def test_a_gateway_that_is_gone_ends_what_ran_for_it_and_a_new_one_is_found(group: Group) -> None:
    receiver = OutputReceiver()
    await receiver.start(HOST)
    inbox = receiver.open(["a"])
    run = asyncio.create_task(group.run(receiver, request("a", 100)))
    await inbox.next()
    await receiver.stop()
    with pytest.raises(SinkLostError):
        await run
    with pytest.raises(OSError):
        await group.run(receiver, request("b"))
    successor = OutputReceiver()
    await successor.start(HOST)
    inbox = successor.open(["c"])
    await group.run(successor, request("c", 5))
    assert tokens(await read(inbox), "c") == solo_output(request("c", 5))
    await successor.stop()
    group.harness.engine.check_integrity()


async def test_the_end_of_a_call_may_come_before_its_last_outputs(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = receiver.open(["a"])
    inbox.end(None)
    reading = asyncio.create_task(read(inbox))
    await group.run(receiver, request("a", 5))
    assert tokens(await reading, "a") == solo_output(request("a", 5))
    monkeypatch.setattr(output_link, "LATE_S", 0.02)
    inbox = receiver.open(["lost"])
    inbox.end(None)
    with pytest.raises(GroupUnavailableError, match="lost"):
        await inbox.next()


async def test_what_comes_at_once_to_a_busy_event_loop_is_not_held(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_link, "MAX_UNREAD_STEPS", 5)
    inbox = receiver.open(["a"])
    run = asyncio.create_task(group.run(receiver, request("a")))
    reading = asyncio.create_task(read(inbox))
    while not reading.done():
        time.sleep(0.02)  # in the event loop
        await asyncio.sleep(0)
    await run
    assert tokens(reading.result(), "a") == solo_output(request("a"))
    assert group.harness.engine.stats.num_pauses == 0


async def test_a_failed_call_ends_its_inbox_after_what_has_come(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_link, "HOLD_AFTER_S", 0.001)
    inbox = receiver.open(["a"])
    run = asyncio.create_task(group.run(receiver, request("a", 100)))
    assert await inbox.next()
    async with asyncio.timeout(5):
        while not group.harness.engine.num_paused:  # as nobody reads
            await asyncio.sleep(0.005)
    inbox.end(GroupUnavailableError("the group was lost"))
    assert await inbox.next()
    with pytest.raises(GroupUnavailableError, match="was lost"):
        await inbox.next()
    run.cancel()


async def test_outputs_of_a_request_that_nobody_reads_any_more_are_dropped(
    receiver: OutputReceiver, group: Group
) -> None:
    inbox = receiver.open(["a"])
    inbox.close()
    await group.run(receiver, request("a", 5))
    other = receiver.open(["b"])
    await group.run(receiver, request("b", 5))
    assert tokens(await read(other), "b") == solo_output(request("b", 5))


async def _is_closed(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(5):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


@pytest.mark.parametrize(
    "sent",
    [
        MAGIC + b"x" * 100,
        b"GET / HTTP/1.1\r\nhost: gateway\r\nuser-agent: a browser that has lost its way\r\n\r\n",
        b"\x80\x04\x95" + b"pickle" * 20,
    ],
)
async def test_a_stranger_is_turned_away_and_nothing_of_it_is_parsed(receiver: OutputReceiver, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(HOST, receiver.address.port)
    writer.write(sent)
    assert await _is_closed(reader)
    writer.close()


async def test_strangers_that_say_nothing_are_closed_and_never_too_many(
    receiver: OutputReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_link, "CONNECT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(output_link, "MAX_STRANGERS", 4)
    strangers = [await asyncio.open_connection(HOST, receiver.address.port) for _ in range(10)]
    for reader, writer in strangers:
        assert await _is_closed(reader)
        writer.close()
    async with asyncio.timeout(5):
        while receiver.connections:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("!I", output_link.MAX_FRAME_BYTES + 1),
        struct.pack("!I", 3) + b"\xc1\xc1\xc1",
        struct.pack("!I", 5) + msgspec.msgpack.encode("text"),
    ],
)
async def test_what_is_no_output_ends_the_connection(receiver: OutputReceiver, frame: bytes) -> None:
    reader, writer = await asyncio.open_connection(HOST, receiver.address.port)
    name = msgspec.msgpack.encode("group-1")
    writer.write(MAGIC + receiver.secret + struct.pack("!I", len(name)) + name + frame)
    assert await _is_closed(reader)
    writer.close()


async def test_frames_may_arrive_in_any_pieces(receiver: OutputReceiver) -> None:
    inbox = receiver.open(["a"])
    output = EngineOutput(request_id="a", token_ids=(7,), finish_reason=FinishReason.LENGTH)
    frames = [msgspec.msgpack.encode("group-1"), msgspec.msgpack.encode((output, output))]
    _, writer = await asyncio.open_connection(HOST, receiver.address.port)
    for byte in MAGIC + receiver.secret + b"".join(struct.pack("!I", len(frame)) + frame for frame in frames):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert await inbox.next() == (output, output)
    writer.close()
