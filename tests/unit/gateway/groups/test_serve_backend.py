"""A gateway's backend and a group's leader, with what lies between them; only Serve's call is a plain one."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from ray.serve.exceptions import BackPressureError, RayServeException

from bench.support.fake_backend import card
from model_parallel.checkpoint.adapter_files import describe_adapter
from model_parallel.config import AdapterConfig, ParallelConfig
from model_parallel.engine.request import AdapterRef, EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import GroupFailedError
from serving.contracts.errors import GroupDrainingError, GroupRefusedError, GroupUnavailableError
from serving.contracts.fleet import Departure, ModelDemand
from serving.contracts.group_link import GroupCall
from serving.gateway.groups.output_receiver import OutputReceiver
from serving.gateway.groups.serve_backend import ASLEEP_FOR_S, ServeBackend
from serving.observability.tracing import Tracing
from serving.replica import deployment
from serving.replica.adapters import GroupAdapters
from serving.replica.deployment import ReplicaGroup
from tests.support.adapter_directories import MODEL as MODEL_CONFIG
from tests.support.adapter_directories import save_adapter
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output
from tests.support.waiting import PATIENCE_S, until

MODEL = "tiny"


class Leader(ReplicaGroup):
    """Python would call __del__ too, and await nothing."""

    def __init__(self) -> None:
        self.exits: list[int] = []
        self._exit = self.exits.append  # type: ignore[assignment]

    def __del__(self) -> None: ...  # type: ignore[override]


class Group:
    """A leader with an engine on fake ranks, and a handle that reaches it."""

    def __init__(self) -> None:
        self.harness = Harness(max_num_seqs=4, max_waiting_requests=4, adapters=AdapterConfig())
        self.harness.executor.during_step = lambda: time.sleep(0.001)
        self.num_cancelled = 0
        self.before_reply: Callable[[], Any] = lambda: None
        self.leader: Any = Leader()
        self.leader.__dict__.update(
            _engine_id="g1",
            _model=MODEL,
            _weights="",
            _engine=self.harness.engine,
            _adapters=GroupAdapters(self.harness.engine, MODEL_CONFIG, ParallelConfig()),
            _executor=SimpleNamespace(
                set_failure_callback=lambda fail: None,
                shutdown=lambda: None,
                health=SimpleNamespace(problem=lambda: None),
            ),
            _tracing=Tracing(),
            _drain_timeout_s=PATIENCE_S,
            _step_timeout_s=PATIENCE_S,
            _decode=msgspec.msgpack.Decoder(GroupCall).decode,
            _encode=msgspec.msgpack.encode,
        )

    @property
    def generate(self) -> Any:
        """As a Serve handle has it."""
        return SimpleNamespace(remote=lambda encoded: Response(self, encoded))

    async def end(self) -> None:
        """As Serve does."""
        await ReplicaGroup.__del__(self.leader)

    async def until_idle(self) -> None:
        await until(lambda: not (self.leader._async_engine.num_open or self.harness.engine.has_work))
        self.harness.engine.check_integrity()


class Response:
    """As Serve's."""

    def __init__(self, group: Group, encoded: bytes) -> None:
        self._group = group
        self._encoded = encoded

    def __await__(self) -> Any:
        return self._reply().__await__()

    async def _reply(self) -> bytes:
        reply: bytes = await self._group.leader.generate(self._encoded)
        await asyncio.sleep(0)
        self._group.before_reply()
        return reply

    def cancel(self) -> None:
        self._group.num_cancelled += 1


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    group = Group()
    yield group
    await group.end()


@pytest.fixture
def backend(receiver: OutputReceiver, group: Group) -> ServeBackend:
    handle: Any = group
    return ServeBackend([], {MODEL: handle}, receiver)


def request(request_id: str, max_tokens: int = 100) -> EngineRequest:
    return make_request(request_id, [1, 2, 3], max_tokens=max_tokens, seed=1)


async def outputs_of(backend: ServeBackend, *requests: EngineRequest) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    async with asyncio.timeout(PATIENCE_S):
        async for step in backend.generate(MODEL, requests, {}):
            outputs += step.outputs
    return outputs


async def test_what_the_group_makes_comes_and_is_counted_until_its_end(
    backend: ServeBackend, receiver: OutputReceiver, group: Group
) -> None:
    outputs: list[EngineOutput] = []
    async for engine, step in backend.generate(MODEL, [request("a", 50), request("b", 20)], {}):
        assert engine == "g1"
        outputs += step
        await until(lambda: receiver.loads.of("g1") == 2)
    for name, max_tokens in (("a", 50), ("b", 20)):
        tokens = [token for output in outputs if output.request_id == name for token in output.token_ids]
        assert tokens == solo_output(request(name, max_tokens))
    assert receiver.loads.of("g1") == 0
    await group.until_idle()


async def test_an_answer_is_not_a_call_that_is_held_open(backend: ServeBackend, group: Group) -> None:
    steps = backend.generate(MODEL, [request("a")], {})
    await anext(steps)
    await until(lambda: not backend._submissions)
    await steps.aclose()
    await group.until_idle()
    assert group.harness.engine.stats.num_finished_cancelled == 1


async def test_a_group_loads_the_adapter_of_a_request_that_goes_on_there(
    backend: ServeBackend, group: Group, tmp_path: Path
) -> None:
    """It has never heard of it: the request says which files it means, and which tokens another group has made."""
    save_adapter(tmp_path)
    ref = AdapterRef(describe_adapter(tmp_path, MODEL_CONFIG).digest, str(tmp_path))
    whole = solo_output(request("a", 20))
    rest = msgspec.structs.replace(request("a", 20), adapter=ref, output_token_ids=tuple(whole[:8]))
    outputs = await outputs_of(backend, rest)
    assert [token for output in outputs for token in output.token_ids] == whole[8:]
    await group.until_idle()
    assert group.harness.engine.loaded_adapters() == [ref.digest]
    save_adapter(tmp_path, lora_alpha=99)
    changed = msgspec.structs.replace(rest, adapter=AdapterRef("ab" * 32, str(tmp_path)))
    with pytest.raises(GroupRefusedError, match="could not be loaded") as caught:
        await outputs_of(backend, changed)
    assert caught.value.answered_by().reason == "ADAPTER_FAILED"


async def test_refusals_are_told_as_the_group_said_them(
    backend: ServeBackend, receiver: OutputReceiver, group: Group
) -> None:
    with pytest.raises(GroupRefusedError, match="empty"):
        await outputs_of(backend, make_request("wrong", []))
    assert not receiver.loads.is_avoided("g1"), "it was the client"
    running = [asyncio.create_task(outputs_of(backend, request(f"r{number}"))) for number in range(4)]
    await until(lambda: group.harness.engine.stats.num_running == 4)
    running += [asyncio.create_task(outputs_of(backend, request(f"w{number}"))) for number in range(4)]
    await until(lambda: group.harness.engine.stats.num_waiting == 4)
    with pytest.raises(GroupRefusedError) as refused:
        await anext(backend.generate(MODEL, [request("late")], {}))
    assert (refused.value.kind, refused.value.engine) == ("overloaded", "g1")
    await asyncio.gather(*running)
    group.leader._async_engine.fail("rank 1 is gone")
    await until(lambda: not group.harness.engine.has_work)
    with pytest.raises(GroupUnavailableError, match="was lost") as lost:
        await outputs_of(backend, request("later"))
    assert not lost.value.may_have_run
    assert receiver.loads.is_avoided("g1")


async def test_a_group_that_fails_ends_what_it_runs(
    backend: ServeBackend, receiver: OutputReceiver, group: Group
) -> None:
    running = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.stats.num_running)
    group.leader._async_engine.fail("rank 1 is gone")
    last = (await running)[-1]
    assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "unavailable")
    assert receiver.loads.is_avoided("g1"), "what it ran goes elsewhere"


@pytest.mark.parametrize("runs_something", [False, True])
async def test_the_process_of_a_lost_group_ends_when_gateways_know(
    backend: ServeBackend, group: Group, runs_something: bool
) -> None:
    """Serve would replace it only after it has said three times that it is unhealthy."""
    steps = backend.generate(MODEL, [request("a")], {})
    await anext(steps)
    if not runs_something:
        await steps.aclose()
        await group.until_idle()
    group.leader._async_engine.fail("rank 1 is gone")
    if runs_something:
        assert [step async for step in steps][-1].outputs[-1].error_kind == "unavailable"
    await until(lambda: group.leader.exits)
    assert group.leader.exits == [deployment.LOST_STATUS]
    assert not group.leader._senders._connections


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (BackPressureError(num_queued_requests=3, max_queued_requests=2), GroupRefusedError, "is full"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
        (asyncio.CancelledError(), GroupUnavailableError, "cancelled on its way"),
    ],
)
async def test_a_call_that_fails_ends_its_request(
    backend: ServeBackend, group: Group, raised: BaseException, expected: type[Exception], message: str
) -> None:
    def fail() -> None:
        raise raised

    group.before_reply = fail
    group.harness.executor.during_step = lambda: time.sleep(0.05)  # no output comes before
    with pytest.raises(expected, match=message):
        await outputs_of(backend, request("a"))


async def test_a_client_that_leaves_while_the_group_accepts_its_request(
    backend: ServeBackend, receiver: OutputReceiver, group: Group
) -> None:
    """The group has begun, and its reply does not arrive: it learns from the gateway that nobody waits."""

    class Late(Response):
        async def _reply(self) -> bytes:
            reply = await super()._reply()
            await asyncio.Event().wait()
            return reply

    handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=lambda encoded: Late(group, encoded)))
    backend._groups = {MODEL: handle}
    group.harness.executor.during_step = lambda: time.sleep(0.05)
    reader = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.has_work)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await until(lambda: not backend._submissions)
    await group.until_idle()
    assert group.num_cancelled == 1
    assert receiver.loads.of("g1") == 0


async def test_a_leader_that_ends_lets_what_it_runs_end(backend: ServeBackend, group: Group) -> None:
    running = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.stats.num_running)
    await group.end()
    assert [token for output in await running for token in output.token_ids] == solo_output(request("a"))


async def test_a_leader_that_ends_waits_only_so_long(backend: ServeBackend, group: Group) -> None:
    group.leader._drain_timeout_s = 0.02
    group.harness.executor.during_step = lambda: time.sleep(0.05)  # 5 s for its 100 tokens
    running = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.stats.num_running)
    await group.end()
    last = (await running)[-1]  # as `Resumption` takes it, which counts no loss
    assert (last.finish_reason, last.error_kind, last.was_waiting) == (FinishReason.ERROR, "unavailable", True)


async def test_a_group_that_drains_takes_nothing_new_and_hands_over_what_is_left(
    backend: ServeBackend, receiver: OutputReceiver, group: Group
) -> None:
    group.harness.executor.during_step = lambda: time.sleep(0.05)  # 5 s for its 100 tokens
    running = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.stats.num_running)
    assert not await group.leader.begin_drain("another", 0.0)
    await group.leader.check_health()
    assert await group.leader.begin_drain("g1", 0.02)
    with pytest.raises(GroupDrainingError) as refused:
        await outputs_of(backend, request("b"))
    assert not refused.value.may_have_run
    assert receiver.loads.is_avoided("g1")
    last = (await running)[-1]
    assert (last.error_kind, last.was_waiting) == ("unavailable", True)
    await group.until_idle()
    with pytest.raises(GroupFailedError, match="is to be replaced"):
        await group.leader.check_health()


async def test_a_group_that_drains_lets_what_it_runs_end(backend: ServeBackend, group: Group) -> None:
    running = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.stats.num_running)
    await group.leader.begin_drain("g1", PATIENCE_S)
    await group.leader.check_health()
    assert [token for output in await running for token in output.token_ids] == solo_output(request("a"))
    await group.leader._drain
    with pytest.raises(GroupFailedError, match="is to be replaced"):
        await group.leader.check_health()


def departure(leader: Any) -> Departure:
    told: Departure = leader._departure()
    return told


async def test_a_group_that_retires_waits_for_its_leave(backend: ServeBackend, group: Group) -> None:
    group.harness.executor.during_step = lambda: time.sleep(0.001)
    running = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.stats.num_running)
    named, others = msgspec.msgpack.encode(["g0", "g1"]), msgspec.msgpack.encode(["g0"])
    assert msgspec.msgpack.decode(await group.leader.retire(others)) == ""
    assert departure(group.leader) is Departure.NONE
    for _ in range(2):
        assert msgspec.msgpack.decode(await group.leader.retire(named)) == "g1"
    assert departure(group.leader) is Departure.RETIRING
    with pytest.raises(GroupDrainingError):
        await outputs_of(backend, request("b"))
    assert [token for output in await running for token in output.token_ids] == solo_output(request("a"))
    await until(lambda: departure(group.leader) is Departure.RETIRED)
    await group.leader.leave(others)
    await group.leader.check_health()
    await group.leader.leave(named)
    await group.leader._drain
    with pytest.raises(GroupFailedError, match="is to be replaced"):
        await group.leader.check_health()
    await group.end()


async def test_a_group_that_is_forgotten_after_it_has_retired_is_replaced(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "RELEASE_TIMEOUT_S", 0.001)
    await group.leader.retire(msgspec.msgpack.encode(["g1"]))
    await group.leader._drain
    with pytest.raises(GroupFailedError, match="is to be replaced"):
        await group.leader.check_health()


async def test_a_group_that_is_being_replaced_does_not_retire(group: Group) -> None:
    await group.leader.begin_drain("g1", 0.0)
    await group.leader._drain
    assert msgspec.msgpack.decode(await group.leader.retire(msgspec.msgpack.encode(["g1"]))) == ""


async def test_a_group_drains_when_a_node_of_any_of_its_ranks_is_to_end(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [AttributeError("another Ray"), {}, {"elsewhere": 0.0}, {"second": time.time() + 7.0}]

    def draining_nodes(timeout_s: float) -> dict[str, float]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        found: dict[str, float] = answer
        return found

    graces_s: list[float] = []
    monkeypatch.setattr(deployment, "NODE_LOOK_PERIOD_S", 0.001)
    monkeypatch.setattr(deployment, "draining_nodes", draining_nodes)
    monkeypatch.setattr(deployment, "this_node", lambda: ("first", "127.0.0.1"))
    group.leader._executor.locations = [SimpleNamespace(node_id=name) for name in ("first", "second")]
    finish = group.leader._finish_within
    monkeypatch.setattr(group.leader, "_finish_within", lambda grace_s: graces_s.append(grace_s) or finish(grace_s))
    async with asyncio.timeout(PATIENCE_S):
        await group.leader._watch_nodes()
        await group.leader._drain
    assert not answers
    assert 0 < graces_s[0] <= 2.0, "all is elsewhere some seconds before the node ends"
    with pytest.raises(GroupFailedError, match="is to be replaced"):
        await group.leader.check_health()


async def test_models_come_and_go(receiver: OutputReceiver, group: Group) -> None:
    handle: Any = group
    backend = ServeBackend([], {}, receiver)
    with pytest.raises(GroupUnavailableError, match="not served any more"):
        await outputs_of(backend, request("a"))
    backend.set_model(card(MODEL), handle, is_held=False)
    assert list(backend.models) == [MODEL]
    steps = backend.generate(MODEL, [request("a")], {})
    outputs = [*await anext(steps)]
    assert backend.num_open == {MODEL: 1}
    backend.forget_model(MODEL)
    backend.set_groups(MODEL, 3, is_asleep=True)  # from an autoscaler that has not heard of it
    assert not await backend.can_serve(MODEL)
    async for step in steps:
        outputs += step.outputs
    assert backend.num_open == {}


def submitted(backend: ServeBackend, handle: Any) -> "asyncio.Task[list[EngineOutput]]":
    backend._groups = {MODEL: handle}
    return asyncio.create_task(outputs_of(backend, request("a")))


def held_until(woken: asyncio.Event, group: Group) -> Any:
    """A handle of Serve that finds no group until then: the router knows the deployment by its name, and by no more."""

    class Held(Response):
        async def _reply(self) -> bytes:
            await woken.wait()
            return await super()._reply()

    return SimpleNamespace(generate=SimpleNamespace(remote=lambda encoded: Held(group, encoded)))


@pytest.mark.parametrize(
    ("weights", "ends"),
    [({}, True), ({MODEL: "other"}, True), ({MODEL: "old"}, False), ({MODEL: "old", "x": ""}, False)],
)
async def test_what_waits_for_a_model_that_has_gone_ends(
    receiver: OutputReceiver, group: Group, weights: dict[str, str], ends: bool
) -> None:
    backend = ServeBackend([card(MODEL, weights="old")], {}, receiver)
    group.leader._weights = "old"
    woken = asyncio.Event()
    waiting = submitted(backend, held_until(woken, group))
    await until(lambda: backend._submissions)
    backend.keep_waiting(weights)
    if ends:
        with pytest.raises(GroupUnavailableError, match="not served any more"):
            await waiting
        assert group.num_cancelled == 1
        assert not group.harness.engine.has_work
    else:
        woken.set()
        assert [token for output in await waiting for token in output.token_ids] == solo_output(request("a"))
    assert backend.num_open == {}


async def test_what_runs_goes_on_when_its_model_has_gone(backend: ServeBackend, group: Group) -> None:
    running = asyncio.create_task(outputs_of(backend, request("a")))
    await until(lambda: group.harness.engine.stats.num_running)
    backend.keep_waiting({})
    assert [token for output in await running for token in output.token_ids] == solo_output(request("a"))


async def test_nobody_waits_for_a_model_that_sleeps_and_goes(receiver: OutputReceiver, group: Group) -> None:
    backend = ServeBackend([card(MODEL)], {}, receiver)
    waiting = submitted(backend, held_until(asyncio.Event(), group))
    await until(lambda: backend._submissions)
    backend.set_groups(MODEL, 0, is_asleep=True)
    backend.forget_model(MODEL)
    with pytest.raises(GroupUnavailableError, match="not served any more"):
        await waiting


async def test_a_group_answers_for_its_own_weights_alone(receiver: OutputReceiver, group: Group) -> None:
    """A gateway that has heard of nothing has the call sent to whatever has the name now."""
    handle: Any = group
    backend = ServeBackend([card(MODEL, weights="old")], {MODEL: handle}, receiver)
    group.leader._weights = "new"
    with pytest.raises(GroupUnavailableError, match="not served any more") as refused:
        await outputs_of(backend, request("a"))
    assert not refused.value.may_have_run
    assert group.leader._async_engine is None or not group.harness.engine.has_work


async def test_a_model_whose_groups_are_replaced_can_serve_meanwhile(receiver: OutputReceiver) -> None:
    asked = []

    def nobody() -> Any:
        asked.append(1)
        raise RayServeException("there is no group")

    handle: Any = SimpleNamespace(probe=SimpleNamespace(remote=nobody))
    backend = ServeBackend([], {}, receiver)
    backend.set_model(card(MODEL), handle, is_held=True)
    assert await backend.can_serve(MODEL)
    assert not asked
    told = msgspec.structs.replace(backend.models[MODEL], kernels="cpu-avx512", deterministic=True)
    backend._models.set_base(told)
    backend.set_model(card(MODEL, max_model_len=7), handle, is_held=False)
    assert (backend.models[MODEL].kernels, backend.models[MODEL].max_model_len) == ("cpu-avx512", 7)


async def test_a_lost_group_takes_nothing_in(group: Group) -> None:
    group.leader._running_engine().fail("rank 0 is gone")
    with pytest.raises(GroupFailedError):
        group.leader._async_engine.start([request("a")], SimpleNamespace(send=print))


@pytest.mark.parametrize(
    ("problems", "expected", "num_asked"),
    [([None], True, 1), (["rank 1 is gone", None], True, 2), (["rank 1 is gone", "rank 0 is gone", None], False, 2)],
)
async def test_a_model_can_be_served_while_one_of_its_groups_can(
    receiver: OutputReceiver, problems: list[str | None], expected: bool, num_asked: int
) -> None:
    asked: list[str] = []

    async def probe() -> tuple[str, str | None, str, bool]:
        asked.append(f"g{len(asked)}")
        return asked[-1], problems[len(asked) - 1], "cpu-scalar", True

    handle: Any = SimpleNamespace(probe=SimpleNamespace(remote=probe))
    backend = ServeBackend([card(MODEL, num_groups=2)], {MODEL: handle}, receiver)
    assert await backend.can_serve(MODEL) is expected
    assert len(asked) == num_asked
    assert [receiver.loads.is_avoided(name) for name in asked] == [
        problem is not None for problem in problems[:num_asked]
    ]
    assert backend.models[MODEL].kernels == ("cpu-scalar" if expected else "reference")


def test_the_number_of_groups_follows_what_the_gateway_is_told(receiver: OutputReceiver) -> None:
    backend = ServeBackend([card(MODEL, num_groups=2)], {MODEL: SimpleNamespace()}, receiver)
    models = backend.models
    backend.set_groups(MODEL, 5, is_asleep=False)
    assert models[MODEL].num_groups == 5


async def test_requests_for_a_model_that_is_asleep_are_held_and_counted(receiver: OutputReceiver) -> None:
    now_s = 0.0
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=lambda call: answer))
    backend = ServeBackend([card(MODEL)], {MODEL: handle}, receiver, clock=lambda: now_s)
    outputs = backend.generate(MODEL, [make_request("r-0", [1, 2, 3]), make_request("r-1", [4, 5])], {})
    waiting = asyncio.ensure_future(anext(outputs))
    await asyncio.sleep(0)
    assert backend.held(MODEL) == ModelDemand(0, 0)  # a group is there, and will answer

    backend.set_groups(MODEL, 0, is_asleep=True)
    assert await backend.can_serve(MODEL)
    assert backend.held(MODEL) == ModelDemand(2, 5)

    now_s = ASLEEP_FOR_S  # the autoscaler is gone, and nobody would wake the model
    assert not backend.is_asleep(MODEL)
    assert backend.held(MODEL) == ModelDemand(0, 0)

    backend.set_groups(MODEL, 0, is_asleep=True)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await outputs.aclose()
    await asyncio.sleep(0)
    assert backend.held(MODEL) == ModelDemand(0, 0)  # its client has left
