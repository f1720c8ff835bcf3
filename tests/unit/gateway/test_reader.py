"""A client that does not read: its group is told to pause, and told again when the client goes on."""

import asyncio
from contextlib import aclosing

import pytest

from serving.config import LimitsConfig
from serving.gateway import reader
from serving.gateway.backend import GroupUnavailableError
from serving.gateway.call import Call
from serving.gateway.generation import Generator
from serving.gateway.reader import ReaderWatch
from serving.gateway.validate import GenerateQuery, TextPrompt
from tests.unit.gateway.fakes import ByteTokenizer, FakeBackend, say


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "HOLD_AFTER_S", 0.05)
    monkeypatch.setattr(reader, "_RETRY_S", 0.01)


class Group:
    """Hears what it is told, but not the first `num_lost` times."""

    def __init__(self, num_lost: int = 0) -> None:
        self.num_lost = num_lost
        self.heard: asyncio.Queue[bool] = asyncio.Queue()

    async def hold(self, is_held: bool) -> None:
        if self.num_lost:
            self.num_lost -= 1
            raise GroupUnavailableError("it does not answer")
        self.heard.put_nowait(is_held)

    async def next(self) -> bool:
        async with asyncio.timeout(5):
            return await self.heard.get()


async def test_a_generator_that_is_left_alone_pauses_its_request_and_goes_on_later() -> None:
    backend = FakeBackend(say("Paris"))
    generator = Generator(backend, {name: ByteTokenizer() for name in backend.models}, LimitsConfig())
    query = GenerateQuery(model="tiny", prompt=TextPrompt("hi"), max_tokens=20)
    call = Call(request_id="r", arrived_s=generator.clock(), timeout_s=None)
    async with aclosing(generator.generate(query, call, 1)) as chunks:
        await anext(chunks)
        async with asyncio.timeout(5):
            assert await backend.holds.get() == ("tiny", ("r-0",), True)
            await anext(chunks)
            assert await backend.holds.get() == ("tiny", ("r-0",), False)
        assert "".join([chunk.text async for chunk in chunks])
    assert backend.holds.empty()


async def test_a_reader_that_keeps_up_costs_the_group_nothing() -> None:
    group = Group()
    watch = ReaderWatch(group.hold)
    for _ in range(20):
        with watch:
            await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    assert group.heard.empty()


async def test_a_group_that_does_not_answer_is_told_again_and_hears_the_latest_alone() -> None:
    group = Group(num_lost=2)
    watch = ReaderWatch(group.hold)
    with watch:
        assert await group.next() is True
    assert await group.next() is False

    group.num_lost = 3
    with watch:
        async with asyncio.timeout(5):
            while group.num_lost == 3:
                await asyncio.sleep(0.001)
    await asyncio.sleep(0.1)
    assert group.heard.empty(), "it goes on already"
    watch.close()


async def test_nothing_is_told_of_a_request_that_has_ended() -> None:
    group = Group(num_lost=1000)
    watch = ReaderWatch(group.hold)
    with watch:
        async with asyncio.timeout(5):
            while group.num_lost == 1000:
                await asyncio.sleep(0.001)
    watch.close()
    await asyncio.sleep(0.05)
    num_lost = group.num_lost
    await asyncio.sleep(0.05)
    assert group.num_lost == num_lost
