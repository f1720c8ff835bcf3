"""An adapter is a model of its own name: to those who see it, to keys, to the ledger; and served by its model's groups."""

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, card, say
from model_parallel.engine.request import AdapterRef, EngineOutput, EngineRequest, FinishReason
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serving.contracts.accounts import Principal
from serving.contracts.models import AdapterCard
from serving.gateway.core.catalogue import Catalogue
from tests.support.waiting import PATIENCE_S
from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.http_client import client
from tests.unit.gateway.test_http_server import FakeAccounts, keyed

SQL = AdapterCard(name="tiny-sql", parent="tiny", ref=AdapterRef("ab" * 32, "/secret/sql"), num_bytes=10, rank=8)
SECRET = AdapterCard(
    name="acme/secret",
    parent="tiny",
    ref=AdapterRef("cd" * 32, "/secret/acme"),
    num_bytes=10,
    rank=8,
    tenants=("acme",),
)


def backend(adapters: Sequence[AdapterCard] = (SQL, SECRET)) -> FakeBackend:
    made = FakeBackend(say("Paris"), [card()])
    made.models = Catalogue([card()], adapters)
    return made


class Tenant(FakeAccounts):
    """One key, of a tenant, for some models."""

    def __init__(self, tenant_id: str, models: frozenset[str] | None = None) -> None:
        super().__init__()
        self.principal = Principal(tenant_id=tenant_id, models=models, cache_salt=b"salt")

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        return self.principal


def ask(model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, prompt=pb.Prompt(text="hi"))


async def names_seen(target: str) -> list[str]:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        return [each.name for each in (await stub.ListModels(pb.ListModelsRequest(), timeout=PATIENCE_S)).models]


async def test_both_front_ends_list_an_adapter_under_its_model(serve: Serve) -> None:
    async with serve(backend([SQL]), http_port=0) as gateway, client(gateway) as http:
        listed = (await gateway.stub.ListModels(pb.ListModelsRequest())).models
        assert [(each.name, each.parent) for each in listed] == [("tiny", ""), ("tiny-sql", "tiny")]
        assert listed[1].max_model_len == listed[0].max_model_len == 100
        assert "secret" not in str(listed)
        data = (await http.get("/v1/models")).json()["data"]
        assert [(each["id"], each["root"], each["parent"]) for each in data] == [
            ("tiny", "tiny", None),
            ("tiny-sql", "tiny", "tiny"),
        ]
        one = (await http.get("/v1/models/tiny-sql")).json()
        assert (one["id"], one["parent"]) == ("tiny-sql", "tiny")


async def test_a_request_names_it_as_its_model() -> None:
    accounts = Tenant("acme")
    async with keyed(accounts, backend()) as gateway, grpc.aio.insecure_channel(gateway.target) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        assert (await stub.Generate(ask("tiny-sql"), timeout=PATIENCE_S)).choices[0].text == "Paris"
        (request,) = gateway.backend.requests
        assert request.adapter == SQL.ref
        assert (request.cache_salt, request.tenant) == (b"salt", "acme")
        await stub.Generate(ask("tiny"), timeout=PATIENCE_S)
        assert gateway.backend.requests[0].adapter is None
        await stub.Generate(ask(""), timeout=PATIENCE_S)
        assert gateway.backend.requests[0].adapter is None, "no name is that of the model"
    assert [record.model for record in accounts.records] == ["tiny-sql", "tiny", "tiny"]


async def test_answers_over_http_carry_its_name(serve: Serve) -> None:
    async with serve(backend([SQL]), http_port=0) as gateway, client(gateway) as http:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        own = (await http.post("/v1/chat/completions", json={"model": "tiny-sql", **body})).json()
        base = (await http.post("/v1/chat/completions", json={"model": "tiny", **body})).json()
        assert (own["model"], own["choices"][0]["message"]["content"]) == ("tiny-sql", "Paris")
        assert own["system_fingerprint"] != base["system_fingerprint"]
        tokens = (await http.post("/tokenize", json={"model": "tiny-sql", "prompt": "hi"})).json()
        assert tokens == (await http.post("/tokenize", json={"model": "tiny", "prompt": "hi"})).json()


async def test_an_adapter_exists_to_its_tenants_alone() -> None:
    async with keyed(Tenant("acme"), backend()) as gateway:
        assert await names_seen(gateway.target) == ["acme/secret", "tiny", "tiny-sql"]
    async with keyed(Tenant("other"), backend()) as gateway, grpc.aio.insecure_channel(gateway.target) as channel:
        assert await names_seen(gateway.target) == ["tiny", "tiny-sql"]
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        for request in (ask("acme/secret"), ask("acme/unknown")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request, timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert caught.value.details() == f"model {request.model!r} is not served; served: tiny, tiny-sql"


@pytest.mark.parametrize(
    ("models", "listed"),
    [
        (frozenset({"tiny", "tiny-sql"}), "served: tiny, tiny-sql"),
        (frozenset({"tiny-sql"}), "served: tiny-sql"),
        (frozenset({"gone"}), "served: nothing that you may use"),
        (frozenset(), "served: nothing that you may use"),
    ],
)
async def test_errors_list_what_the_key_allows(models: frozenset[str], listed: str) -> None:
    async with keyed(Tenant("acme", models), backend()) as gateway, client(gateway) as http:
        async with grpc.aio.insecure_channel(gateway.target) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(ask("unknown"), timeout=PATIENCE_S)
        assert caught.value.details() == f"model 'unknown' is not served; {listed}"
        answer = await http.get("/v1/models/unknown")
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, caught.value.details())


@pytest.mark.parametrize(
    ("models", "listed"),
    [
        ({"tiny-sql", "acme/secret"}, "acme/secret, tiny-sql"),
        ({"gone"}, "nothing that you may use"),
        ((), "nothing that you may use"),
    ],
)
async def test_without_a_name_the_error_lists_what_the_key_allows(models: Iterable[str], listed: str) -> None:
    async with keyed(Tenant("acme", frozenset(models)), backend()) as gateway, client(gateway) as http:
        for path in ("/v1/completions", "/tokenize"):
            answer = await http.post(path, json={"prompt": "hi"})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == f"model is missing; served: {listed}"


async def test_a_key_for_the_model_is_none_for_its_adapters() -> None:
    accounts = Tenant("acme", frozenset({"tiny"}))
    async with keyed(accounts, backend()) as gateway, grpc.aio.insecure_channel(gateway.target) as channel:
        assert await names_seen(gateway.target) == ["tiny"]
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ask("tiny-sql"), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    accounts = Tenant("acme", frozenset({"acme/secret"}))
    async with keyed(accounts, backend()) as gateway, grpc.aio.insecure_channel(gateway.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        await stub.Generate(ask(""), timeout=PATIENCE_S)
        assert gateway.backend.requests[0].adapter == SECRET.ref, "the only one that the key allows"


async def test_files_that_have_gone_are_no_fault_of_the_client(serve: Serve) -> None:
    async def gone(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield tuple(
            EngineOutput(
                request_id=request.request_id,
                finish_reason=FinishReason.ERROR,
                error="the adapter could not be loaded",
                error_kind="adapter_failed",
            )
            for request in requests
        )

    made = FakeBackend(gone, [card()])
    made.models = Catalogue([card()], [SQL])
    async with serve(made, http_port=0) as gateway, client(gateway) as http:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Generate(ask("tiny-sql"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        answer = await http.post("/v1/completions", json={"model": "tiny-sql", "prompt": "hi"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "adapter_failed")


async def test_what_is_served_can_change(serve: Serve) -> None:
    made = backend([])
    async with serve(made) as gateway:
        with pytest.raises(grpc.aio.AioRpcError, match="is not served"):
            await gateway.stub.Generate(ask("tiny-sql"))
        assert isinstance(made.models, Catalogue)
        made.models.set_adapters([SQL])
        await gateway.stub.Generate(ask("tiny-sql"))
        made.models.set_adapters([])
        with pytest.raises(grpc.aio.AioRpcError, match="is not served"):
            await gateway.stub.Generate(ask("tiny-sql"))


def test_a_catalogue_follows_its_models() -> None:
    orphan = AdapterCard(name="orphan", parent="gone", ref=SQL.ref, num_bytes=1, rank=1)
    double = AdapterCard(name="tiny", parent="tiny", ref=SQL.ref, num_bytes=1, rank=1)
    catalogue = Catalogue([card()], [SQL, orphan, double])
    assert list(catalogue) == ["tiny", "tiny-sql"]
    assert catalogue["tiny"].adapter is None
    catalogue.set_base(card(kernels="cpu-avx2", num_groups=3))
    assert (catalogue["tiny-sql"].kernels, catalogue["tiny-sql"].num_groups) == ("cpu-avx2", 3)
    assert "orphan" not in catalogue and catalogue.get("orphan") is None
