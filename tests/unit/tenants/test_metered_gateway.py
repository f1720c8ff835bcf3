"""A gateway of both front ends with keys, quotas and records on a real SQLite file, and OpenAI's client in front of it."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy import select

from bench.support.fake_backend import ByteTokenizer, FakeBackend
from model_parallel.engine.request import EngineOutput, EngineRequest, SamplingParams
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.client.resuming import Received
from serving.config import GatewayConfig, LimitsConfig
from serving.contracts.accounts import UsageRecord
from serving.contracts.errors import GroupRefusedError, GroupUnavailableError
from serving.contracts.group_link import GroupOutputs
from serving.gateway.core import generation
from serving.gateway.core.metering import Meter
from serving.gateway.core.resume_tokens import ResumeTokens
from serving.gateway.server import GatewayServer, Ports
from serving.tenants.authority.quota import MAX_RESUMPTIONS
from serving.tenants.authority.service import AuthorityService
from serving.tenants.client import accounts as accounts_module
from serving.tenants.client.accounts import AuthorityUnreachableError, TenantAccounts
from serving.tenants.records import KeyGrant, Tenant, UsageFilter
from serving.tenants.store.schema import QuotaRow
from serving.tenants.store.store import Store
from serving.tenants.store.usage import all_usage
from tests.support.drawn_groups import DrawnGroups, answer
from tests.support.waiting import PATIENCE_S

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
PREFIX = "x-ratelimit-"


class Link:
    """Straight to the authority, unless it is cut."""

    def __init__(self, service: AuthorityService) -> None:
        self.service = service
        self.is_cut = False

    async def exchange(self, data: bytes) -> bytes:
        if self.is_cut:
            raise AuthorityUnreachableError("cut")
        return await self.service.exchange(data)

    async def sync(self, data: bytes) -> bytes:
        return await self.service.sync(data)


@asynccontextmanager
async def gateway(url: str, backend: FakeBackend | None = None) -> AsyncIterator[tuple[Ports, Link]]:
    link = Link(AuthorityService(url, owner="here", refresh_s=0.05))
    accounts = TenantAccounts(link, refresh_s=0.05)
    await accounts.start()
    backend = backend or FakeBackend()
    tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
    server = GatewayServer(GatewayConfig(port=0, http_port=0), LimitsConfig(), backend, tokenizers, accounts)
    try:
        yield await server.start(), link
    finally:
        await server.drain()  # so that what was cut is settled
        await server.stop(0)
        await accounts.stop()
        await link.service.close()


def new_key(store: Store, grant: KeyGrant | None = None, **limits: int) -> str:
    store.create_tenant(Tenant(id="t", plan="unlimited", **limits))  # type: ignore[arg-type]
    return store.create_key("t", grant or KeyGrant()).text


def client(ports: Ports, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{ports.http}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S
    )


async def test_openai_reads_what_is_left_of_the_rates(store: Store, url: str) -> None:
    """The prompt "hi" is some 30 tokens as a chat, and "Paris" 6."""
    key = new_key(store, KeyGrant(requests_per_minute=3), requests_per_minute=600, tokens_per_minute=10**6)
    async with gateway(url) as (ports, _), client(ports, key) as api:
        raw = await api.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=9)
        answer = raw.parse()
        assert answer.usage
        headers = {name: raw.headers[name] for name in raw.headers if name.startswith(PREFIX)}
        assert headers[f"{PREFIX}limit-requests"] == "3", "the key's is tighter than the tenant's"
        assert headers[f"{PREFIX}remaining-requests"] == "2"
        assert float(headers[f"{PREFIX}reset-requests"].removesuffix("s")) == pytest.approx(20, abs=10)
        assert headers[f"{PREFIX}limit-tokens"] == "1000000"
        # What was reserved and not used is back by now, and a second refills 16,667: more than was used.
        assert 10**6 - answer.usage.total_tokens <= int(headers[f"{PREFIX}remaining-tokens"]) <= 10**6
        assert headers.keys() == {
            f"{PREFIX}{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
        }
        stream = await api.completions.with_raw_response.create(model="tiny", prompt="hi", max_tokens=9, stream=True)
        assert stream.headers[f"{PREFIX}remaining-requests"] == "1"
        async for _ in stream.parse():
            pass
        await api.completions.create(model="tiny", prompt="hi", max_tokens=9)
        with pytest.raises(openai.RateLimitError) as refused:
            await api.completions.create(model="tiny", prompt="hi", max_tokens=9)
        assert refused.value.response.headers[f"{PREFIX}remaining-requests"] == "0"
        models = await api.models.with_raw_response.list()
        assert not [name for name in models.headers if name.startswith(PREFIX)]


async def test_without_a_rate_there_are_no_such_headers(store: Store, url: str) -> None:
    key = new_key(store, max_concurrent_requests=4, token_budget=10**6)
    async with gateway(url) as (ports, _), client(ports, key) as api:
        raw = await api.completions.with_raw_response.create(model="tiny", prompt="hi", max_tokens=9)
        assert not [name for name in raw.headers if name.startswith(PREFIX)]


async def test_an_answer_whose_record_is_late_is_withheld_and_recorded_once(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_module, "RECORD_TIMEOUT_S", 0.05)
    key = new_key(store)
    async with gateway(url) as (ports, link), client(ports, key) as api:
        link.is_cut = True
        with pytest.raises(openai.InternalServerError) as refused:
            await api.completions.create(model="tiny", prompt="hi", max_tokens=9)
        assert (refused.value.status_code, refused.value.code) == (503, "service_unavailable")
        assert "its usage cannot be recorded now" in str(refused.value)
        assert refused.value.response.headers["retry-after"]

        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
            stub: Any = InferenceStub(channel)
            ask = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"))
            call = stub.Generate(ask, metadata=(("authorization", f"Bearer {key}"),), timeout=PATIENCE_S)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1000
            status, info = await rpc_status.aio.from_call(call), error_details_pb2.ErrorInfo()
            assert any(detail.Unpack(info) for detail in status.details)
            assert info.reason == "NO_ACCOUNTS"
        link.is_cut = False
    records = list(all_usage(store.database, UsageFilter()))
    assert [record.num_completion_tokens for record in records] == [6, 6]


class Taken(FakeBackend):
    """A group takes the request before its script begins."""

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncIterator[GroupOutputs]:
        yield GroupOutputs("group-1", ())
        async for step in super().generate(model, requests, trace_context):
            yield step


@pytest.mark.parametrize(
    ("error", "is_taken", "outcome"),
    [
        (GroupUnavailableError("no group", may_have_run=False), False, "unavailable"),
        (GroupRefusedError("too long", kind="invalid"), False, "rejected"),
        (GroupRefusedError("too long", kind="invalid"), True, "rejected"),
        (None, False, "cancelled"),
        (None, True, "cancelled"),
    ],
    ids=["no-group", "refused", "refused-later", "left", "left-later"],
)
async def test_a_prompt_is_charged_when_a_group_has_taken_it(
    store: Store, url: str, error: Exception | None, is_taken: bool, outcome: str
) -> None:
    offered = asyncio.Event()

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        offered.set()
        if error is not None:
            raise error
        await asyncio.Event().wait()
        yield ()

    key = new_key(store)
    async with (
        gateway(url, (Taken if is_taken else FakeBackend)(script)) as (ports, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel,
    ):
        stub: Any = InferenceStub(channel)
        call = stub.Generate(
            pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi")),
            metadata=(("authorization", f"Bearer {key}"),),
            timeout=PATIENCE_S,
        )
        async with asyncio.timeout(PATIENCE_S):
            await offered.wait()
        if error is None:
            call.cancel()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call
    (record,) = all_usage(store.database, UsageFilter())
    assert (record.num_prompt_tokens, record.outcome) == (3 if is_taken else 0, outcome)


def with_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


async def test_a_grammar_is_tried_for_those_that_have_quota_and_costs_no_tokens_when_it_is_wrong(
    store: Store, url: str
) -> None:
    key = new_key(store, token_budget=100, requests_per_minute=2)
    async with gateway(url) as (ports, _), client(ports, key) as api:

        async def ask(schema: Any) -> None:
            await api.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=79, response_format=with_schema(schema)
            )

        for _ in range(2):  # with all of the budget each: nothing of it is used
            with pytest.raises(openai.BadRequestError, match="multipleOf"):
                await ask({"type": "integer", "multipleOf": "x"})
        with pytest.raises(openai.RateLimitError):
            await ask({"type": "integer", "multipleOf": "y"})
    records = list(all_usage(store.database, UsageFilter()))
    assert [(each.num_prompt_tokens, each.num_completion_tokens, each.outcome) for each in records] == [
        (0, 0, "rejected")
    ] * 2


settle, resume = Meter._settle, ResumeTokens.resume
TAKEN = 7
"""Messages of a stream before its client leaves it."""


async def resumed_elsewhere(
    store: Store, url: str, tmp_path: Path, token_budget: int = 10**6
) -> tuple[list[UsageRecord], list[int], int]:
    """A stream is left and resumed at another gateway while the first one lives, which counts what it has sent: all records, the
    tokens that came, and what the tenant is charged."""
    key, path = new_key(store, token_budget=token_budget), tmp_path / "key"
    path.write_text("k" * 32)
    link, token_ids = Link(AuthorityService(url, owner="here", refresh_s=0.05)), list[int]()
    request = pb.GenerateRequest(
        model="tiny", prompt=pb.Prompt(text="tell me"), sampling=pb.Sampling(max_tokens=30, ignore_eos=True)
    )
    received = Received(request)
    for is_first in (True, False):
        accounts = TenantAccounts(link, refresh_s=0.05)
        await accounts.start()
        backend: Any = DrawnGroups()
        tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
        config = GatewayConfig(port=0, http_port=None, resume_key_file=path)
        server = GatewayServer(config, LimitsConfig(), backend, tokenizers, accounts)
        ports = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
            stub: Any = InferenceStub(channel)
            call = stub.GenerateStream(
                received.rest(), metadata=(("authorization", f"Bearer {key}"),), timeout=PATIENCE_S
            )
            async for chunk in call:
                received.take(chunk)
                token_ids += chunk.token_ids
                if is_first and len(token_ids) == TAKEN:
                    break
            call.cancel()
        await server.drain()  # so that what was cut is settled
        await server.stop(0)
        await accounts.stop()
    await link.service.close()
    with store.database.read() as session:
        charged = session.scalars(select(QuotaRow.charged_tokens).where(QuotaRow.subject == "tenant:t")).one()
    return list(all_usage(store.database, UsageFilter())), token_ids, charged


@pytest.mark.parametrize("token_budget", [10**6, 38], ids=["budget", "no more than it needs"])
async def test_a_stream_that_is_resumed_is_billed_once(
    store: Store, url: str, tmp_path: Path, token_budget: int
) -> None:
    records, token_ids, charged = await resumed_elsewhere(store, url, tmp_path, token_budget)
    ((record),) = records
    assert (record.num_prompt_tokens, record.num_completion_tokens, record.outcome) == (8, 30, "length")
    assert len(token_ids) == 30
    assert charged == 38


async def test_a_finished_stream_is_computed_again_only_so_often_under_a_budget(store: Store, url: str) -> None:
    """Its client may have lost the end of it. It is charged once, and the token of the last one is the newest."""
    key, groups = new_key(store, token_budget=38), DrawnGroups()
    request = pb.GenerateRequest(
        model="tiny", prompt=pb.Prompt(text="tell me"), sampling=pb.Sampling(max_tokens=30, ignore_eos=True)
    )
    async with (
        gateway(url, groups) as (ports, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel,
    ):
        stub: Any = InferenceStub(channel)

        async def num_tokens() -> int:
            found = 0
            call = stub.GenerateStream(request, metadata=(("authorization", f"Bearer {key}"),), timeout=PATIENCE_S)
            async for chunk in call:
                found += len(chunk.token_ids)
                request.resume_token = chunk.resume_token or request.resume_token
            return found

        assert [await num_tokens() for _ in range(1 + MAX_RESUMPTIONS)] == [30] * (1 + MAX_RESUMPTIONS)
        with pytest.raises(grpc.aio.AioRpcError, match="send the request anew") as refused:
            await num_tokens()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert groups.num_started == 1 + MAX_RESUMPTIONS
    (record,) = all_usage(store.database, UsageFilter())
    assert (record.num_prompt_tokens, record.num_completion_tokens, record.outcome) == (8, 30, "length")


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (
            Meter,
            "_settle",
            lambda self, *given: (setattr(self, "_billed_id", self._call.request_id), settle(self, *given)),
        ),
        (ResumeTokens, "resume", lambda self, *given: replace(resume(self, *given), seed=1)),
    ],
    ids=["bills-twice", "draws-with-another-seed"],
)
async def test_a_bug_that_is_put_in_is_found(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, bug: Any
) -> None:
    monkeypatch.setattr(generation, "draw_seed", lambda: 5)
    request = EngineRequest(
        request_id="", prompt_token_ids=(1,), sampling=SamplingParams(seed=5, max_tokens=30, ignore_eos=True)
    )
    monkeypatch.setattr(owner, name, bug)
    records, token_ids, charged = await resumed_elsewhere(store, url, tmp_path)
    assert len(records) > 1 or charged > 38 or token_ids != answer(request)[0]
