"""A gateway goes by the record of what is served: models come, change and go while it answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
import msgspec
import pytest

from bench.support.fake_backend import ByteTokenizer, FakeBackend, card
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from protos import inference_pb2 as pb
from serving.contracts.fleet import Fleet, FleetGroup, FleetModel, ModelDemand
from serving.contracts.models import AdapterCard, ModelCard
from serving.contracts.served import GatewayModels, Served, ServedModel, State
from serving.gateway import deployment
from serving.gateway.core.catalogue import Catalogue
from serving.gateway.deployment import Gateway
from serving.observability.gateway import GatewayWatch
from serving.observability.tracing import Tracing
from tests.support.waiting import until
from tests.unit.gateway.conftest import Running, Serve


class Backend(FakeBackend):
    """Takes models as ServeBackend does. Each request waits until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.models: Catalogue = Catalogue(list(self.models.values()))
        self.replaced: set[str] = set()
        self.kept: list[Mapping[str, str]] = []
        self.groups: dict[str, int] = {}
        self.go_on = asyncio.Event()

    async def _answer(self, requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        name = requests[0].request_id
        yield (EngineOutput(request_id=name, token_ids=tuple(b"hel")),)
        await self.go_on.wait()
        yield (EngineOutput(request_id=name, token_ids=tuple(b"lo"), finish_reason=FinishReason.LENGTH),)

    def set_model(self, served: ModelCard, handle: object, *, is_held: bool) -> None:
        self.models.set_base(served)
        (self.replaced.add if is_held else self.replaced.discard)(served.name)

    def forget_model(self, name: str) -> None:
        self.models.forget_base(name)

    def set_groups(self, model: str, num_groups: int, *, is_asleep: bool) -> None:
        self.groups[model] = num_groups

    def held(self, model: str) -> ModelDemand:
        return ModelDemand(0, 0)

    def keep_waiting(self, weights: Mapping[str, str]) -> None:
        self.kept.append(weights)

    def set_adapters(self, adapters: Sequence[AdapterCard]) -> None:
        self.models.set_adapters(adapters)


def entry(name: str, **changes: object) -> str:
    return json.dumps({"name": name, "source": "/models/tiny", **changes})


def served(generation: int, *models: ModelCard, state: State = "serving") -> Served:
    return Served(
        generation=generation,
        models={
            known.name: ServedModel(card=known, given="{}", chosen=entry(known.name), revision=1, state=state)
            for known in models
        },
    )


class Record:
    """What is written in the control store, and which tokenizers were loaded because of it."""

    def __init__(self) -> None:
        self.served: Served | None = None
        self.loaded: list[str] = []
        self.broken: set[str] = set()

    def tokenizer_of(self, card: ModelCard) -> ByteTokenizer:
        if card.name in self.broken:
            raise FileNotFoundError("tokenizer.model")
        self.loaded.append(card.name)
        return ByteTokenizer()


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    record = Record()
    monkeypatch.setattr(deployment, "_read_served", lambda: record.served)
    monkeypatch.setattr(deployment, "_tokenizer_of", record.tokenizer_of)
    monkeypatch.setattr(deployment, "_handle", lambda model: None)
    return record


class Watched(Gateway):
    """Python would call __del__ too, and await nothing."""

    def __del__(self) -> None: ...  # type: ignore[override]


def gateway_of(running: Running) -> Any:
    """The deployment around a server that runs, without Serve."""
    gateway: Any = Watched.__new__(Watched)
    watch = GatewayWatch(running.backend.models.values(), (), Tracing())
    gateway.__dict__.update(
        _id="g",
        _backend=running.backend,
        _server=running.server,
        _served=served(1, *running.backend.models.values()),
        _scaled=frozenset(),
        _problems={},
        _looking=asyncio.Lock(),
        _watch=watch,
        metrics=watch.metrics,
    )
    return gateway


async def names(running: Running) -> list[str]:
    return [model.name for model in (await running.stub.ListModels(pb.ListModelsRequest())).models]


def question(model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt=pb.Prompt(text="x"), sampling=pb.Sampling(max_tokens=5))


async def test_models_come_and_go(serve: Serve, record: Record) -> None:
    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        record.served = served(2, *running.backend.models.values(), card("new"))
        await gateway._look()
        assert await names(running) == ["new", "plain", "tiny"]
        assert record.loaded == ["new"]
        await gateway._look()
        assert record.loaded == ["new"], "the record has not changed"

        assert running.server.demand["new"] == ModelDemand(0, 0), "nobody has asked for it yet"
        asked = asyncio.ensure_future(running.stub.Generate(question("new")))
        await running.backend.started.wait()
        assert running.server.demand["new"] == ModelDemand(1, 2)
        record.served = served(3, card("tiny"))
        await gateway._look()
        assert await names(running) == ["tiny"]
        assert running.server.demand.keys() == {"tiny"}
        call = running.stub.Generate(question("new"))
        assert await call.code() is grpc.StatusCode.NOT_FOUND
        assert "served: tiny" in await call.details()
        running.backend.go_on.set()  # type: ignore[attr-defined]
        assert (await asked).choices[0].text == "hello", "what had begun goes on"
        assert gateway.metrics.model_label("new") == "new"
        assert gateway.metrics.groups.fleet_models().keys() == {"tiny"}


async def test_a_model_changes(serve: Serve, record: Record) -> None:
    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        running.backend.go_on.set()  # type: ignore[attr-defined]
        record.served = served(2, card("tiny", num_groups=5), state="replacing")
        await gateway._look()
        assert record.loaded == [], "another number of groups is nothing that prompts depend on"
        assert running.backend.replaced == {"tiny"}  # type: ignore[attr-defined]
        record.served = served(3, card("tiny", max_model_len=3))
        await gateway._look()
        assert record.loaded == ["tiny"]
        assert running.backend.replaced == set()  # type: ignore[attr-defined]
        assert await running.stub.Generate(question("tiny")).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_model_that_cannot_be_served_here_leaves_the_others(serve: Serve, record: Record) -> None:
    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        record.broken = {"new"}
        record.served = served(2, card("tiny"), card("new"))
        gateway._backend.num_open = {"tiny": 2}
        answer = msgspec.msgpack.decode(await gateway.take_models(), type=GatewayModels)
        assert (answer.generation, answer.num_open) == (2, {"tiny": 2})
        assert answer.problems == {"new": "FileNotFoundError: tokenizer.model"}
        assert await names(running) == ["tiny"]
        record.broken = set()
        record.served = served(3, card("tiny"), card("new"))
        await gateway._look()
        assert await names(running) == ["new", "tiny"], "it was tried again"
        record.broken, record.served = {"new"}, served(4, card("tiny"))
        await gateway._look()
        assert await names(running) == ["tiny"]


async def test_models_that_are_not_shown_are_not_served(serve: Serve, record: Record) -> None:
    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        hidden = served(2, card("coming"), state="starting").models | served(2, card("plain"), state="removing").models
        record.served = Served(generation=2, models=hidden | served(2, card("tiny")).models)
        await gateway._look()
        assert await names(running) == ["tiny"]


async def test_what_waits_is_told_which_models_there_are(serve: Serve, record: Record) -> None:
    """One that is going is there until its groups have ended."""
    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        going = served(2, card("plain", weights="p"), state="removing").models
        record.served = Served(generation=2, models=going | served(2, card("tiny", weights="t")).models)
        await gateway._look()
        record.served = served(3, card("tiny", weights="other"))
        await gateway._look()
        assert running.backend.kept == [{"plain": "p", "tiny": "t"}, {"tiny": "other"}]  # type: ignore[attr-defined]


async def test_a_look_that_fails_is_made_again(serve: Serve, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([KeyError("a bug"), ValueError("another")])

    def set_adapters(adapters: object) -> None:
        if error := next(failures, None):
            raise error

    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        monkeypatch.setattr(deployment, "LOOK_PERIOD_S", 0.001)
        monkeypatch.setattr(running.backend, "set_adapters", set_adapters, raising=False)
        record.served = served(2, card("tiny"))
        looking = asyncio.create_task(gateway._look_again())
        await until(lambda: gateway._served.generation == 2 or looking.done())
        assert not looking.done()
        looking.cancel()
        assert await names(running) == ["tiny"]


async def test_a_record_that_cannot_be_read_changes_nothing(
    serve: Serve, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable() -> Served:
        raise RuntimeError("the control store is away")

    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        monkeypatch.setattr(deployment, "_read_served", unreadable)
        await gateway._look()
        record.served = None
        monkeypatch.setattr(deployment, "_read_served", lambda: None)
        await gateway._look()
        assert await names(running) == ["plain", "tiny"]


@pytest.mark.parametrize("settled", [{}, {"autoscaling": {"mode": "off", "max_groups": 3}}])
async def test_what_the_autoscaler_says_of_a_model_that_it_no_longer_looks_after(
    serve: Serve, record: Record, settled: dict[str, Any]
) -> None:
    """It may come late, and nobody would ever say something else."""
    running_group = (FleetGroup(group="g1", state="running"),)
    seen = FleetModel(mode="on", target=2, min_groups=0, max_groups=3, groups=running_group)
    told = msgspec.msgpack.encode(Fleet(at_s=1.0, shown_by="g", models={"tiny": seen, "plain": seen}))
    scaling = {"autoscaling": {"max_groups": 3}}

    def record_of(generation: int, tiny: dict[str, Any]) -> Served:
        written = served(generation, card("tiny", num_groups=3), card("plain"))
        entries = {"tiny": entry("tiny", **tiny), "plain": entry("plain", **scaling)}
        models = {name: msgspec.structs.replace(written.models[name], chosen=text) for name, text in entries.items()}
        return msgspec.structs.replace(written, models=models)

    async with serve(Backend()) as running:
        gateway = gateway_of(running)
        groups = running.backend.groups  # type: ignore[attr-defined]

        def shown(model: str) -> float | None:
            registry = gateway.metrics.registry
            found: float | None = registry.get_sample_value(
                "packtrain_groups", {"model_name": model, "state": "running"}
            )
            return found

        record.served = record_of(2, scaling)
        await gateway._look()
        await gateway.take_fleet(told)
        assert (groups["tiny"], shown("tiny"), shown("plain")) == (1, 1, 1)

        groups.clear()
        record.served = record_of(3, settled)
        await gateway._look()
        assert (shown("tiny"), shown("plain")) == (None, 1)
        await gateway.take_fleet(told)
        assert groups == {"plain": 1}
        assert (shown("tiny"), shown("plain")) == (None, 1)
