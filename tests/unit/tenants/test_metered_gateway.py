"""A gateway of both front ends with keys, quotas and records on a real SQLite file, and OpenAI's client in front of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.support.fake_backend import ByteTokenizer, FakeBackend
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.config import GatewayConfig, LimitsConfig
from serving.gateway.server import GatewayServer, Ports
from serving.tenants.authority.service import AuthorityService
from serving.tenants.client import accounts as accounts_module
from serving.tenants.client.accounts import AuthorityUnreachableError, TenantAccounts
from serving.tenants.records import KeyGrant, Tenant, UsageFilter
from serving.tenants.store.store import Store
from serving.tenants.store.usage import all_usage
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
async def gateway(url: str) -> AsyncIterator[tuple[Ports, Link]]:
    link = Link(AuthorityService(url, refresh_s=0.05))
    accounts = TenantAccounts(link, refresh_s=0.05)
    await accounts.start()
    backend = FakeBackend()
    tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
    server = GatewayServer(GatewayConfig(port=0, http_port=0), LimitsConfig(), backend, tokenizers, accounts)
    try:
        yield await server.start(), link
    finally:
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
