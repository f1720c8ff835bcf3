"""Outputs on their way from an engine to a gateway over a real connection."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.transport.frame_protocol import MAX_FRAME_BYTES
from serving.contracts.errors import GroupUnavailableError
from serving.contracts.group_link import Step
from serving.gateway.groups import output_receiver as output_link
from serving.gateway.groups.output_receiver import MAGIC, Inbox, OutputReceiver
from serving.replica import output_sender
from serving.replica.async_engine import AsyncEngine
from serving.replica.output_sender import OutputSenders
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output
from tests.support.link import HOST, listening, until


class Group:
    """An engine on fake ranks, and its half of the link."""

    def __init__(self, name: str) -> None:
        self.harness = Harness(max_num_seqs=8, max_waiting_requests=32)
        self.harness.executor.during_step = lambda: time.sleep(0.001)
        self.engine = AsyncEngine(self.harness.engine, asyncio.get_running_loop())
        self.senders = OutputSenders(name, self.engine)

    async def start(self, receiver: OutputReceiver, *requests: EngineRequest) -> asyncio.Event:
        """Returns what is set when they have ended here."""
        ended = asyncio.Event()
        self.engine.start(requests, await self.senders.to(receiver.address), on_end=ended.set)
        return ended

    async def run(self, receiver: OutputReceiver, *requests: EngineRequest) -> None:
        ended = await self.start(receiver, *requests)
        async with asyncio.timeout(10):
            await ended.wait()

    async def until_asleep(self) -> None:
        await until(lambda: not self.harness.engine.has_work)

    def close(self) -> None:
        self.senders.close()
        self.engine.close(5)


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
    await until(lambda: group.harness.engine.num_paused)
    inbox = receiver.open(["b"])
    sink.resume_writing()
    await run
    outputs, _ = await asyncio.gather(read(inbox), group.run(receiver, request("b")))
    assert tokens(outputs, "b") == solo_output(request("b"))


async def test_a_gateway_that_is_gone_ends_what_ran_for_it_and_a_new_one_is_found(group: Group) -> None:
    receiver = await listening()
    inbox = receiver.open(["a"])
    ended = await group.start(receiver, request("a", 100))
    await inbox.next()
    await receiver.stop()
    await until(ended.is_set)
    with pytest.raises(OSError):
        await group.run(receiver, request("b"))
    successor = await listening()
    inbox = successor.open(["c"])
    await group.run(successor, request("c", 5))
    assert tokens(await read(inbox), "c") == solo_output(request("c", 5))
    await successor.stop()
    group.harness.engine.check_integrity()


async def test_a_group_that_is_gone_ends_what_it_had_taken_in(receiver: OutputReceiver, group: Group) -> None:
    running, waiting = receiver.open(["a"]), receiver.open(["b"])
    await group.start(receiver, request("a", 100))
    await running.next()
    for inbox in (running, waiting):
        inbox.accepted("group-1")
    group.close()
    with pytest.raises(GroupUnavailableError, match="the replica group was lost"):
        await read(running)
    with pytest.raises(GroupUnavailableError, match="the replica group was lost"):
        await read(waiting)
    for inbox in (running, waiting):
        inbox.close(cancel=True)
    assert receiver.loads.of("group-1") == 0


@pytest.mark.parametrize("comes", [True, False])
async def test_the_word_that_a_group_has_a_request_may_come_before_its_connection(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setattr(output_link, "LATE_S", 0.05)
    inbox = receiver.open(["a"])
    inbox.accepted("group-1")
    if comes:
        await group.run(receiver, request("a", 50))
        assert tokens(await read(inbox), "a") == solo_output(request("a", 50))
    else:
        with pytest.raises(GroupUnavailableError, match="connection to the replica group"):
            await read(inbox)


async def test_a_request_that_is_closed_is_cancelled_in_its_group(receiver: OutputReceiver, group: Group) -> None:
    inbox = receiver.open(["a", "b"])
    ended = await group.start(receiver, request("a"), request("b"))
    await inbox.next()
    inbox.close(cancel=True)
    await until(ended.is_set)
    await group.until_asleep()
    group.harness.engine.check_integrity()


async def test_a_client_may_go_before_the_group_has_answered(receiver: OutputReceiver, group: Group) -> None:
    """Then the group is told when it answers; if its answer is lost, with the first output that nobody wants."""
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    for has_answered in (True, False):
        inbox = receiver.open(["a"])
        inbox.close(cancel=True)
        if has_answered:
            (connection,) = group.senders._connections.values()
            connection.result().pause_writing()  # no output gives it away
        ended = await group.start(receiver, request("a", 100))
        if has_answered:
            inbox.accepted("group-1")
        await until(ended.is_set)
        if has_answered:
            connection.result().resume_writing()
        await group.until_asleep()
        assert group.harness.engine.stats.num_generation_tokens < 100
        assert receiver.loads.of("group-1") == 0


async def test_gateways_know_what_a_group_does_for_all_of_them(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_sender, "TELL_LOAD_S", 0.005)
    other = await listening()
    ours = receiver.open(["a"])
    theirs = [other.open([name]) for name in ("b", "c")]
    for target, inbox, name in ((receiver, ours, "a"), (other, theirs[0], "b"), (other, theirs[1], "c")):
        (await group.senders.to(target.address)).pause_writing()
        await group.start(target, request(name))
        inbox.accepted("group-1")
    await until(lambda: (receiver.loads.of("group-1"), other.loads.of("group-1")) == (3, 3))
    theirs[0].close(cancel=True)
    await until(lambda: (receiver.loads.of("group-1"), other.loads.of("group-1")) == (2, 2))
    await other.stop()
    await until(lambda: receiver.loads.of("group-1") == 1)


async def test_a_group_that_connects_anew_has_one_connection(receiver: OutputReceiver, group: Group) -> None:
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    again = OutputSenders("group-1", group.engine)
    await again.to(receiver.address)
    await until(lambda: len(receiver.connections) == 1 and receiver.connection_of("group-1"))
    inbox = receiver.open(["a"])
    inbox.accepted("group-1")
    group.engine.start([request("a", 5)], await again.to(receiver.address))
    assert tokens(await read(inbox), "a") == solo_output(request("a", 5))
    again.close()


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


async def test_a_failure_is_told_after_what_has_come(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_link, "HOLD_AFTER_S", 0.001)
    inbox = receiver.open(["a"])
    await group.start(receiver, request("a", 100))
    assert await inbox.next()
    await until(lambda: group.harness.engine.num_paused)  # as nobody reads
    inbox.fail(GroupUnavailableError("the group was lost"))
    assert await inbox.next()
    with pytest.raises(GroupUnavailableError, match="was lost"):
        await inbox.next()


async def test_outputs_of_a_request_that_nobody_reads_any_more_are_dropped(
    receiver: OutputReceiver, group: Group
) -> None:
    inbox = receiver.open(["a"])
    inbox.close(cancel=False)
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
    await until(lambda: not receiver.connections)


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("!I", MAX_FRAME_BYTES + 1),
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
    frames = [msgspec.msgpack.encode("group-1"), msgspec.msgpack.encode(Step((output, output), 3))]
    _, writer = await asyncio.open_connection(HOST, receiver.address.port)
    for byte in MAGIC + receiver.secret + b"".join(struct.pack("!I", len(frame)) + frame for frame in frames):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert await inbox.next() == (output, output)
    assert receiver.loads.of("group-1") == 3
    writer.close()
