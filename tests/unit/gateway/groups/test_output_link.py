"""Outputs on their way from an engine to a gateway over a real connection."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.transport import frame_protocol
from model_parallel.transport.authentication import CHALLENGE_BYTES
from model_parallel.transport.frame_protocol import ConnectingProtocol
from model_parallel.transport.frames import MAX_FRAME_BYTES, encode_frame
from serving.contracts.errors import GroupSilentError, GroupUnavailableError
from serving.contracts.group_link import MAGIC, Command, GroupUpdate
from serving.gateway.groups import output_receiver as output_link
from serving.gateway.groups.loads import PROMPT_TOKENS_A_SEQUENCE
from serving.gateway.groups.output_receiver import GroupConnection, Inbox, OutputReceiver
from serving.replica import output_sender
from serving.replica.async_engine import AsyncEngine
from serving.replica.output_sender import OutputSenders
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output
from tests.support.link import HOST, listening
from tests.support.waiting import PATIENCE_S, until

HURRY = 5
"""Times as often as elsewhere groups say here that they live, and so many times sooner they are taken to be silent."""


@pytest.fixture(autouse=True)
def _quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends run in one event loop, so a machine that is slow holds up what is sent as long as who looks for it."""
    for module in (output_link, output_sender):
        monkeypatch.setattr(module, "HEARTBEAT_S", module.HEARTBEAT_S / HURRY)
    for name in ("SILENT_AFTER_S", "UNANSWERED_AFTER_S"):
        monkeypatch.setattr(output_link, name, getattr(output_link, name) / HURRY)


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
        async with asyncio.timeout(PATIENCE_S):
            await ended.wait()

    async def until_asleep(self) -> None:
        await until(lambda: not self.harness.engine.has_work)

    def close(self) -> None:
        self.senders.close()
        self.engine.close(PATIENCE_S)


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    group = Group("group-1")
    yield group
    group.close()


def request(request_id: str, max_tokens: int = 90) -> EngineRequest:
    return make_request(request_id, [1, 2, 3], max_tokens=max_tokens, seed=1)


async def read(inbox: Inbox, num_choices: int = 1) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    async with asyncio.timeout(PATIENCE_S):
        while sum(output.finish_reason is not None for output in outputs) < num_choices:
            outputs += (await inbox.next()).outputs
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
        inbox.accepted(receiver.connection_of("group-1"))
    group.close()
    with pytest.raises(GroupUnavailableError, match="the replica group was lost"):
        await read(running)
    with pytest.raises(GroupUnavailableError, match="the replica group was lost"):
        await read(waiting)
    for inbox in (running, waiting):
        inbox.close(cancel=True)
    assert receiver.loads.of("group-1") == 0


async def test_the_first_item_tells_which_group_has_accepted(receiver: OutputReceiver, group: Group) -> None:
    inbox = receiver.open(["a"])
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    inbox.accepted(receiver.connection_of("group-1"))
    assert await inbox.next() == ("group-1", ())
    assert receiver.loads.of("group-1") == 1
    await group.run(receiver, request("a", 5))
    assert tokens(await read(inbox), "a") == solo_output(request("a", 5))


async def test_outputs_may_overtake_the_reply_that_a_group_has_accepted(receiver: OutputReceiver, group: Group) -> None:
    inbox = receiver.open(["a"])
    run = asyncio.create_task(group.run(receiver, request("a", 50)))
    engine, _ = await inbox.next()
    inbox.accepted(receiver.connection_of("group-1"))
    assert (engine, receiver.loads.of("group-1")) == ("group-1", 1), "counted once"
    await read(inbox)
    await run


async def test_a_prompt_counts_until_the_first_output(receiver: OutputReceiver, group: Group) -> None:
    inbox = receiver.open(["a"], 3 * PROMPT_TOKENS_A_SEQUENCE)
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    inbox.accepted(receiver.connection_of("group-1"))
    assert receiver.loads.load("group-1") == 4
    run = asyncio.create_task(group.run(receiver, request("a", 50)))
    assert await inbox.next() == ("group-1", ())
    await inbox.next()
    assert receiver.loads.load("group-1") == 1
    await read(inbox)
    await run
    inbox.close(cancel=False)
    assert receiver.loads.load("group-1") == 0


async def test_a_prompt_that_will_never_be_computed_counts_no_more(receiver: OutputReceiver, group: Group) -> None:
    inbox = receiver.open(["a", "b"], 3 * PROMPT_TOKENS_A_SEQUENCE)
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    inbox.accepted(receiver.connection_of("group-1"))
    assert receiver.loads.load("group-1") == 5, "two sequences of one prompt"
    inbox.close(cancel=True)
    assert receiver.loads.load("group-1") == 0


async def test_a_reply_from_a_group_whose_connection_is_lost_fails_the_request(receiver: OutputReceiver) -> None:
    inbox = receiver.open(["a"])
    inbox.accepted(receiver.connection_of("group-1"))
    with pytest.raises(GroupUnavailableError, match="connection to the replica group"):
        await inbox.next()


async def test_a_request_that_is_closed_is_cancelled_in_its_group(receiver: OutputReceiver, group: Group) -> None:
    inbox = receiver.open(["a", "b"])
    ended = await group.start(receiver, request("a"), request("b"))
    await inbox.next()
    inbox.close(cancel=True)
    await until(ended.is_set)
    await group.until_asleep()
    group.harness.engine.check_integrity()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_client_may_go_before_the_group_has_answered(
    receiver: OutputReceiver, group: Group, has_begun: bool
) -> None:
    """A group that has begun is told at once; one that begins later, with the first output that nobody wants."""
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    inbox = receiver.open(["a"])
    if has_begun:
        (connection,) = group.senders._connections.values()
        connection.result().pause_writing()  # no output gives it away
        ended = await group.start(receiver, request("a", 100))
        inbox.close(cancel=True)
        await until(ended.is_set)
        connection.result().resume_writing()
    else:
        inbox.close(cancel=True)
        ended = await group.start(receiver, request("a", 100))
        await until(ended.is_set)
    await group.until_asleep()
    assert group.harness.engine.stats.num_generation_tokens < 100
    assert receiver.loads.of("group-1") == 0


async def test_gateways_know_what_a_group_does_for_all_of_them(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_sender, "HEARTBEAT_S", 0.005)
    other = await listening()
    ours = receiver.open(["a"])
    theirs = [other.open([name]) for name in ("b", "c")]
    for target, inbox, name in ((receiver, ours, "a"), (other, theirs[0], "b"), (other, theirs[1], "c")):
        (await group.senders.to(target.address)).pause_writing()
        await group.start(target, request(name))
        inbox.accepted(target.connection_of("group-1"))
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
    inbox.accepted(receiver.connection_of("group-1"))
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
    inbox = receiver.open(["a"])
    await group.start(receiver, request("a", 100))
    assert await inbox.next()
    await until(lambda: group.harness.engine.num_paused)  # as nobody reads
    inbox.fail(GroupUnavailableError("the group was lost"))
    assert (await inbox.next()).outputs
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
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


class Leader(ConnectingProtocol):
    """A group's end that sends what a test wants."""

    def __init__(self, magic: bytes, secret: bytes) -> None:
        super().__init__(magic, secret)
        self._commands: asyncio.Queue[Command] = asyncio.Queue()

    def frame_received(self, payload: bytes) -> None:
        self._commands.put_nowait(msgspec.msgpack.decode(payload, type=Command))

    async def received(self) -> Command:
        async with asyncio.timeout(PATIENCE_S):
            return await self._commands.get()


async def connect(receiver: OutputReceiver, secret: bytes | None = None) -> Leader:
    _, leader = await asyncio.get_running_loop().create_connection(
        lambda: Leader(MAGIC, receiver.secret if secret is None else secret), HOST, receiver.address.port
    )
    async with asyncio.timeout(30):
        await leader.established()
    return leader


async def silent_group(receiver: OutputReceiver, name: str) -> Leader:
    """It tells who it is, and then hangs."""
    leader = await connect(receiver)
    leader.send_frame(msgspec.msgpack.encode(name))
    await until(lambda: receiver.connection_of(name))
    return leader


async def test_a_group_that_has_nothing_to_say_says_that_it_lives(receiver: OutputReceiver, group: Group) -> None:
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    num_looks = 2 * output_link.SILENT_AFTER_S / output_link.HEARTBEAT_S
    await until(lambda: receiver.num_looks > num_looks)
    assert receiver.connection_of("group-1")
    assert not receiver.loads.is_avoided("group-1")


async def test_a_group_that_hangs_loses_its_requests_and_is_avoided(receiver: OutputReceiver, group: Group) -> None:
    """And so do requests that are not answered then or soon after: it may have been asked. Those of another group go on."""
    await silent_group(receiver, "group-2")
    ran, asked = receiver.open(["a"]), receiver.open(["b"])
    ran.accepted(receiver.connection_of("group-2"))
    assert (await ran.next()).engine == "group-2"
    other = receiver.open(["c"])
    running = asyncio.create_task(group.run(receiver, request("c")))
    assert tokens(await read(other), "c") == solo_output(request("c"))
    await running
    for inbox, error in ((ran, GroupUnavailableError), (asked, GroupSilentError)):
        with pytest.raises(error):
            async with asyncio.timeout(PATIENCE_S):
                await inbox.next()
    asked.close(cancel=True)
    asked_later = receiver.open(["d"])
    with pytest.raises(GroupSilentError):
        async with asyncio.timeout(PATIENCE_S):
            await asked_later.next()
    assert receiver.loads.is_avoided("group-2")
    assert receiver.connection_of("group-2") is None
    assert receiver.connection_of("group-1")


async def test_a_gateway_that_was_held_up_itself_blames_no_group(
    receiver: OutputReceiver, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    num_looks = receiver.num_looks
    time.sleep(1.5 * output_link.SILENT_AFTER_S)
    await until(lambda: receiver.num_looks > num_looks + 2)
    assert receiver.connection_of("group-1")


async def test_what_a_revived_group_sends_reaches_no_request(receiver: OutputReceiver, group: Group) -> None:
    """It connects anew and goes on with what it had; the request runs elsewhere by now, under whatever id."""
    await silent_group(receiver, "group-2")
    old = receiver.open(["a"])
    old.accepted(receiver.connection_of("group-2"))
    await old.next()
    with pytest.raises(GroupUnavailableError):
        async with asyncio.timeout(PATIENCE_S):
            await old.next()
    old.close(cancel=True)
    new = receiver.open(["a"])
    new.accepted(await connected(receiver, group))
    revived = await silent_group(receiver, "group-2")
    late = GroupUpdate((EngineOutput(request_id="a", token_ids=(7, 7, 7)),), 0)
    revived.send_frame(msgspec.msgpack.encode(late))
    command = await revived.received()
    assert (command.kind, command.request_ids) == ("cancel", ("a",))
    running = asyncio.create_task(group.run(receiver, request("a")))
    assert tokens(await read(new), "a") == solo_output(request("a"))
    await running


async def connected(receiver: OutputReceiver, group: Group) -> GroupConnection:
    await group.senders.to(receiver.address)
    await until(lambda: receiver.connection_of("group-1"))
    connection = receiver.connection_of("group-1")
    assert connection is not None
    return connection


@pytest.mark.parametrize(
    "sent",
    [
        MAGIC + b"x" * 100,
        b"GET / HTTP/1.1\r\nhost: gateway\r\nuser-agent: a browser that has lost its way\r\n\r\n",
        b"\x80\x04\x95" + b"pickle" * 20,
    ],
)
async def test_what_is_no_handshake_is_closed_and_nothing_of_it_is_parsed(
    receiver: OutputReceiver, sent: bytes
) -> None:
    reader, writer = await asyncio.open_connection(HOST, receiver.address.port)
    writer.write(sent)
    if sent.startswith(MAGIC):
        await reader.readexactly(CHALLENGE_BYTES)
    assert await _is_closed(reader)
    writer.close()


async def test_another_secret_is_refused_by_both_ends(receiver: OutputReceiver) -> None:
    with pytest.raises(ConnectionResetError):
        await connect(receiver, secret=bytes(32))
    await until(lambda: not receiver.connections)


async def test_silent_connections_are_closed_and_never_too_many(
    receiver: OutputReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_protocol, "HANDSHAKE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(output_link, "MAX_UNAUTHENTICATED", 4)
    silent = [await asyncio.open_connection(HOST, receiver.address.port) for _ in range(10)]
    for reader, writer in silent:
        assert await _is_closed(reader)
        writer.close()
    await until(lambda: not receiver.connections)


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("!II", MAX_FRAME_BYTES + 1, 0),
        encode_frame(b"\xc1\xc1\xc1"),
        encode_frame(msgspec.msgpack.encode("text")),
        encode_frame(b"")[:-1] + b"\x7f",
    ],
)
async def test_what_is_no_update_ends_the_connection(receiver: OutputReceiver, frame: bytes) -> None:
    leader = await connect(receiver)
    leader.send_frame(msgspec.msgpack.encode("group-1"))
    await until(lambda: receiver.connection_of("group-1"))
    leader.transport.write(frame)
    await until(lambda: not receiver.connections)


async def test_frames_may_arrive_in_any_pieces(receiver: OutputReceiver) -> None:
    inbox = receiver.open(["a"])
    output = EngineOutput(request_id="a", token_ids=(7,), finish_reason=FinishReason.LENGTH)
    leader = await connect(receiver)
    frames = [msgspec.msgpack.encode("group-1"), msgspec.msgpack.encode(GroupUpdate((output, output), 3))]
    for byte in b"".join(map(encode_frame, frames)):
        leader.transport.write(bytes([byte]))
        await asyncio.sleep(0)
    assert await inbox.next() == ("group-1", (output, output))
    assert receiver.loads.of("group-1") == 4, "this one, and three of other gateways"
    leader.transport.close()
