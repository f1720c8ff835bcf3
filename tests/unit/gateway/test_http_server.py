"""Around the endpoints: credentials, ids, statuses, deadlines, errors in the middle of a stream, drain, health."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from bench.support.fake_backend import ByteTokenizer, FakeBackend, for_ever, say
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from model_parallel.errors import ConfigError, RequestError
from serving.config import GatewayConfig, LimitsConfig
from serving.contracts.accounts import OpenAccounts, Principal, RateLimits, Reservation, UsageRecord
from serving.contracts.errors import GroupRefusedError, GroupUnavailableError, QuotaExceededError, UnauthenticatedError
from serving.gateway.server import GatewayServer, check_listening
from tests.support.waiting import until
from tests.unit.gateway.conftest import Running, Serve, running
from tests.unit.gateway.http_client import CHAT, COMPLETION, answer_to, client, events, post, raw_request

STREAM = COMPLETION | {"stream": True}


class FakeAccounts:
    """One key; keeps what is settled, and refuses what it is told to."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.refusal: Exception | None = None

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        if list(credentials) != ["Bearer good"]:
            raise UnauthenticatedError("a valid key is needed: authorization: Bearer KEY")
        return Principal(tenant_id="acme", models=frozenset({"tiny"}), cache_salt=b"s", weight=2.0)

    async def reserve(
        self, principal: Principal, *, request_id: str, model: str, num_tokens: int, billed_id: str = ""
    ) -> Reservation:
        if self.refusal is not None:
            raise self.refusal
        return self

    def rate_limits(self, principal: Principal) -> RateLimits:
        return RateLimits()

    def settle(self, record: UsageRecord) -> None:
        self.records.append(record)

    async def recorded(self) -> None:
        pass


def keyed(accounts: FakeAccounts, backend: FakeBackend | None = None) -> AbstractAsyncContextManager[Running]:
    """A gateway with keys."""
    return running(backend, accounts=accounts, http_port=0)


ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/openapi.json"), ("GET", "/docs"), ("POST", "/v1/responses"),
    ("GET", "/tokenizer_info"), ("GET", "/version"), ("GET", "/v1/models/"), ("POST", "/v1/chat/completions/"),
]  # fmt: skip
MUTATIONS = [
    "//v1/models", "/v1//models", "/v1/models/../models", "/v1/%2e%2e/v1/models", "/healthz/../v1/models", "/healthz//",
    "/healthz%2f..%2fv1/models", "/healthz;/v1/models", "/HEALTHZ", "/metrics", "/v1", "/", "/nope", "/readyz%00", "*",
]  # fmt: skip


async def test_nothing_but_health_is_there_without_a_key() -> None:
    async with keyed(FakeAccounts()) as gateway:
        bodies = set()
        for method, path in [
            *ROUTES,
            *(("GET", path) for path in MUTATIONS),
            ("DELETE", "/healthz/x"),
            ("OPTIONS", "/v1"),
        ]:
            answer = await answer_to(gateway, raw_request(method=method, path=path, headers=("connection: close",)))
            assert answer.startswith(b"HTTP/1.1 401 "), (path, answer)
            assert b"www-authenticate: Bearer" in answer
            bodies.add(answer.partition(b"\r\n\r\n")[2])
        assert len(bodies) == 1
        for path in ("/healthz", "/readyz", "/health", "/ping", "/ping/"):
            answer = await answer_to(gateway, raw_request(method="GET", path=path, headers=("connection: close",)))
            assert answer.startswith(b"HTTP/1.1 200 ")


async def test_every_wrong_key_is_answered_alike() -> None:
    async with keyed(FakeAccounts()) as gateway:
        wrong: list[tuple[bytes, ...]] = [
            (b"Bearer bad",), (b"Bearer",), (b"good",), (b"Basic Z29vZA==",), (b"Bearer good", b"Bearer good"),
            (b"Bearer ' OR 1=1 --",), (b"Bearer \xc3\xa9",), (b"Bearer " + b"k" * 20_000,), (b"bearer good ",),
        ]  # fmt: skip
        bodies = set()
        for keys in wrong:
            lines = b"".join(b"authorization: " + key + b"\r\n" for key in keys)
            request = b"GET /v1/models HTTP/1.1\r\nhost: x/?#\r\nconnection: close\r\n" + lines + b"\r\n"
            answer = await answer_to(gateway, request)
            assert answer.startswith(b"HTTP/1.1 401 "), keys
            bodies.add(answer.partition(b"\r\n\r\n")[2])
        assert len(bodies) == 1


async def test_a_key_opens_what_it_may_use_and_nothing_else() -> None:
    accounts = FakeAccounts()
    async with keyed(accounts) as gateway:
        async with client(gateway, headers={"authorization": "Bearer good"}) as http:
            assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["tiny"]
            forbidden = await http.post("/v1/completions", json=COMPLETION | {"model": "plain"})
            assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (403, "permission_denied")
            for path in MUTATIONS:
                headers = ("connection: close", "authorization: Bearer good")
                answer = await answer_to(gateway, raw_request(method="GET", path=path, headers=headers))
                assert answer.startswith(b"HTTP/1.1 404 "), path
            wrong_method = await http.put("/v1/completions")
            assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
            assert (await http.head("/v1/models")).status_code == 200
            assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200
        (request,) = gateway.backend.requests
        assert (request.tenant, request.cache_salt, request.weight) == ("acme", b"s", 2.0)
        (record,) = accounts.records
        assert (record.tenant_id, record.num_prompt_tokens, record.num_completion_tokens, record.outcome) == (
            "acme", 3, 6, "stop",
        )  # fmt: skip


@pytest.mark.parametrize("retry_after_s", [12.3, None])
async def test_a_quota_that_is_used_up_says_when_to_come_back(retry_after_s: float | None) -> None:
    accounts = FakeAccounts()
    accounts.refusal = QuotaExceededError("too many", quota="tokens_per_minute", retry_after_s=retry_after_s)
    async with keyed(accounts) as gateway:
        answer = await post(gateway, "/v1/completions", COMPLETION, authorization="Bearer good")
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == (
            "insufficient_quota" if retry_after_s is None else "rate_limit_exceeded"
        )
        assert answer.headers.get("retry-after") == (None if retry_after_s is None else "13")


@pytest.mark.parametrize("body", [COMPLETION, STREAM])
async def test_a_client_that_leaves_is_metered_as_cancelled(body: Any) -> None:
    accounts = FakeAccounts()
    async with keyed(accounts, FakeBackend(for_ever)) as gateway:
        request = asyncio.create_task(post(gateway, "/v1/completions", body, authorization="Bearer good"))
        await gateway.backend.started.wait()
        request.cancel()
        await gateway.backend.closed()
        await until(lambda: accounts.records)
        (record,) = accounts.records
        assert (record.outcome, record.num_prompt_tokens, record.num_completion_tokens) == ("cancelled", 3, 1)


def failing(error: Exception, *, after: str = "") -> Any:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        for character in after:
            yield (EngineOutput(request_id=requests[0].request_id, token_ids=(ord(character),)),)
        raise error

    return script


FAULTS: list[tuple[Exception, int, str, bool]] = [
    (GroupRefusedError("full", kind="overloaded"), 503, "server_is_overloaded", True),
    (GroupUnavailableError("no group"), 503, "service_unavailable", True),
    (RequestError("nan", kind="numerical_error"), 500, "numerical_error", False),
    (ZeroDivisionError("/secret/place"), 500, "internal_error", False),
]


@pytest.mark.parametrize(("error", "status", "code", "retries"), FAULTS)
@pytest.mark.parametrize("body", [COMPLETION, STREAM])
async def test_faults_before_the_first_token_have_a_status(
    serve: Serve, body: Any, error: Exception, status: int, code: str, retries: bool
) -> None:
    async with serve(FakeBackend(failing(error)), http_port=0) as gateway:
        answer = await post(gateway, "/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) is retries
    assert "secret" not in answer.text
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize(("error", "status", "code", "retries"), FAULTS)
async def test_faults_within_a_stream_are_told_in_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str, retries: bool
) -> None:
    monkeypatch.setattr("serving.gateway.core.generation.RECOVERY_TIMEOUT_S", 0.0)  # no other group goes on with it
    async with serve(FakeBackend(failing(error, after="ab")), http_port=0) as gateway:
        answer = await post(gateway, "/v1/completions", STREAM)
        assert answer.status_code == 200
        *parts, last = events(answer)
        assert "".join(part["choices"][0]["text"] for part in parts) == "ab"
        assert last["error"]["code"] == code
        whole = await post(gateway, "/v1/completions", COMPLETION)
        assert whole.status_code == status


async def test_a_deadline_goes_to_the_group_and_its_end_is_told(serve: Serve) -> None:
    async def late(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (EngineOutput(request_id=requests[0].request_id, finish_reason=FinishReason.DEADLINE),)

    async with serve(FakeBackend(late), http_port=0) as gateway:
        answer = await post(gateway, "/v1/completions", COMPLETION, **{"x-request-timeout-s": "7.5"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        deadline_s = gateway.backend.requests[0].deadline_s
        assert deadline_s is not None and 7 < deadline_s <= 7.5


async def test_a_deadline_holds_when_the_group_says_nothing(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever), http_port=0) as gateway:
        answer = await post(gateway, "/v1/completions", COMPLETION, **{"x-request-timeout-s": "0.05"})
        assert answer.status_code == 504
        stream = await post(gateway, "/v1/completions", STREAM, **{"x-request-timeout-s": "0.05"})
        assert events(stream)[-1]["error"]["code"] == "deadline_exceeded"
        await gateway.backend.closed()


HOSTILE = ["victim", "a" * 5000, "\x1b[31mred", "caf\u00e9", "a" * 128 + "b"]


async def test_a_clients_id_is_a_label_and_nothing_else(serve: Serve) -> None:
    async with serve(http_port=0) as gateway:
        ids = set()
        for name in ("x-request-id", "x-client-request-id"):
            for label in HOSTILE:
                request = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{name}: {label}\r\n\r\n"
                answer = (await answer_to(gateway, request.encode("latin-1"))).decode("latin-1")
                if "\x1b" in label:
                    assert answer.startswith("HTTP/1.1 400")
                    continue
                headers = dict(line.split(": ", 1) for line in answer.split("\r\n\r\n")[0].split("\r\n")[1:])
                assert headers["x-client-request-id"] == label.encode("ascii", "ignore").decode()[:128]
                ids.add(headers["x-request-id"])
        assert len(ids) == 2 * (len(HOSTILE) - 1)


async def test_too_many_requests_are_refused_and_counted_with_grpcs(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever), http_port=0, max_concurrent_requests=1) as gateway:
        running = asyncio.create_task(post(gateway, "/v1/completions", STREAM))
        await gateway.backend.started.wait()
        answer = await post(gateway, "/v1/chat/completions", CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        async with client(gateway) as http:
            assert (await http.get("/readyz")).status_code == 200
        running.cancel()


async def test_drain_lets_running_requests_finish_and_takes_no_new_ones(serve: Serve) -> None:
    go_on = asyncio.Event()

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        number = 0
        async for outputs in say("finished")(requests):
            yield outputs
            if (number := number + 1) == 3:
                await go_on.wait()

    async with serve(FakeBackend(script), http_port=0) as gateway, client(gateway) as http:
        running = asyncio.create_task(post(gateway, "/v1/completions", STREAM))
        await gateway.backend.started.wait()
        draining = asyncio.create_task(gateway.server.drain())
        await asyncio.sleep(0)
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert (await http.get("/healthz")).status_code == 200
        refused = await http.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert "retry-after" in refused.headers
        go_on.set()
        await draining
        parts = events(await running)
        assert "".join(part["choices"][0]["text"] for part in parts) == "finished"


async def test_a_drain_that_takes_too_long_ends_requests_with_an_error(serve: Serve) -> None:
    async with serve(FakeBackend(for_ever), http_port=0, drain_timeout_s=0.05) as gateway:
        stream = asyncio.create_task(post(gateway, "/v1/completions", STREAM))
        whole = asyncio.create_task(post(gateway, "/v1/completions", COMPLETION))
        await until(lambda: gateway.backend.num_open >= 2)
        await gateway.server.drain()
        assert events(await stream)[-1]["error"]["code"] == "service_unavailable"
        assert (await whole).status_code == 503


async def test_readiness_follows_the_groups(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, client(gateway) as http:
        gateway.backend.healthy = {"tiny": False, "plain": False}
        await gateway.server.refresh_health()
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/healthz")).status_code == 200
        gateway.backend.healthy["tiny"] = True
        await gateway.server.refresh_health()
        assert (await http.get("/readyz")).status_code == 200


async def test_the_greatest_values_are_taken(serve: Serve) -> None:
    """What does not fit 32 bits ended the gateway while it started, without a reason."""
    greatest: dict[str, Any] = {
        name: bound.le
        for name, field in GatewayConfig.model_fields.items()
        for bound in field.metadata
        if hasattr(bound, "le") and name not in ("port", "http_port")
    }
    assert greatest.keys() >= {"max_concurrent_requests", "header_timeout_s", "slow_reader_timeout_s"}
    async with serve(http_port=0, **greatest) as gateway, client(gateway) as http:
        assert (await http.get("/healthz")).status_code == 200


def test_an_open_address_needs_keys_or_insecure(caplog: pytest.LogCaptureFixture) -> None:
    config = GatewayConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match="tenancy"):
        check_listening(config, has_keys=False)
    with pytest.raises(ConfigError, match=r"^gateway\.host: the host 'locahost\.invalid' cannot be resolved"):
        check_listening(GatewayConfig(host="locahost.invalid"), has_keys=False)
    check_listening(config, has_keys=True)
    assert "unencrypted" in caplog.text
    backend = FakeBackend()
    tokenizers: Any = dict.fromkeys(backend.models, ByteTokenizer())
    GatewayServer(config, LimitsConfig(), backend, tokenizers, OpenAccounts())
