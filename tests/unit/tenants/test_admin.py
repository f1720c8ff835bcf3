"""packtrain.v1.Admin over a real port, asked by stubs and by a client that knows nothing but the address."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from model_parallel.errors import ConfigError
from protos import admin_pb2 as pb
from protos import admin_pb2_grpc
from serving.admin import convert
from serving.admin.service import ADMIN, AdminServer
from serving.config import AdminConfig
from serving.contracts.errors import StoreUnavailableError
from serving.tenants.records import KeyGrant, Plan, Tenant
from serving.tenants.store.store import Store
from tests.support.waiting import PATIENCE_S, until
from tests.unit.tenants.conftest import NOON_UNIX_S, Clock
from tests.unit.tenants.test_usage import keep, record

Status = health_pb2.HealthCheckResponse


@dataclass
class Running:
    """The service, and a key that opens it."""

    stub: Any
    channel: grpc.aio.Channel
    target: str
    key: str

    def call(self, method: str, request: Any, *, key: str | None = None) -> Any:
        return getattr(self.stub, method)(
            request, metadata=[("authorization", f"Bearer {key or self.key}")], timeout=30
        )


@pytest.fixture
async def admin(store: Store) -> AsyncIterator[Running]:
    store.create_tenant(Tenant(id="operators", plan="unlimited"))
    key = store.create_key("operators", KeyGrant(is_admin=True, models=())).text
    server = AdminServer(AdminConfig(port=0), store, refresh_s=0.02)
    target = f"127.0.0.1:{await server.start()}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield Running(admin_pb2_grpc.AdminStub(channel), channel, target, key)
    finally:
        await server.stop(0)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def wrong_field(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    assert status is not None
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return bad.field_violations[0].field
    raise AssertionError("no BadRequest")


async def test_from_a_plan_to_a_key(admin: Running) -> None:
    plan = pb.Plan(name="gold", tokens_per_minute=1000, weight=2.0, priority=0)
    assert (await admin.call("CreatePlan", pb.CreatePlanRequest(plan=plan))).plan == plan
    made = (await admin.call("CreateTenant", pb.CreateTenantRequest(tenant=pb.Tenant(id="acme", plan="gold")))).tenant
    assert made.created.seconds > 0 and not made.HasField("disabled") and not made.HasField("tokens_per_minute")
    assert (await admin.call("GetTenant", pb.GetTenantRequest(id="acme"))).tenant == made
    expires = Timestamp(seconds=int(NOON_UNIX_S) + 86400)
    grant = pb.KeyGrant(label="web", only_models=pb.ModelNames(names=["tiny"]), expires=expires, token_budget=9)
    issued = await admin.call("CreateKey", pb.CreateKeyRequest(tenant_id="acme", grant=grant))
    assert issued.key.grant == grant
    assert issued.text.startswith(f"pt_{issued.key.id}_")
    assert list((await admin.call("ListKeys", pb.ListKeysRequest(tenant_id="acme"))).keys) == [issued.key]
    plans = (await admin.call("ListPlans", pb.ListPlansRequest())).plans
    assert [plan.name for plan in plans] == ["gold", "unlimited"]


async def test_a_new_admin_key_opens_at_once_and_a_revoked_one_no_more(admin: Running) -> None:
    grant = pb.KeyGrant(admin=True, all_models=True)
    issued = await admin.call("CreateKey", pb.CreateKeyRequest(tenant_id="operators", grant=grant))
    assert issued.key.grant.all_models
    await admin.call("ListPlans", pb.ListPlansRequest(), key=issued.text)
    assert (await admin.call("RevokeKey", pb.RevokeKeyRequest(id=issued.key.id))).key.HasField("revoked")
    error = await refused(admin.call("ListPlans", pb.ListPlansRequest(), key=issued.text))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_key_revoked_elsewhere_is_refused_within_a_refresh(admin: Running, store: Store) -> None:
    issued = store.create_key("operators", KeyGrant(is_admin=True))
    async with asyncio.timeout(PATIENCE_S):
        while (await _code(admin, issued.text)) is not grpc.StatusCode.OK:
            await asyncio.sleep(0.005)
    store.revoke_key(issued.key.id)
    async with asyncio.timeout(PATIENCE_S):
        while (await _code(admin, issued.text)) is not grpc.StatusCode.UNAUTHENTICATED:
            await asyncio.sleep(0.005)


async def _code(admin: Running, key: str) -> grpc.StatusCode:
    return await admin.call("ListPlans", pb.ListPlansRequest(), key=key).code()


async def test_rotation_gives_a_new_key_and_ends_the_old_one(admin: Running, clock: Clock) -> None:
    grant = pb.KeyGrant(admin=True)
    old = (await admin.call("CreateKey", pb.CreateKeyRequest(tenant_id="operators", grant=grant))).key
    rotate = pb.RotateKeyRequest(id=old.id, overlap=Duration(seconds=90))
    new = await admin.call("RotateKey", rotate)
    assert (new.key.quota_id, new.key.grant) == (old.id, old.grant)
    keys = (await admin.call("ListKeys", pb.ListKeysRequest())).keys
    [ends] = [key.grant.expires.seconds for key in keys if key.id == old.id]
    assert ends == NOON_UNIX_S + 90


async def test_an_update_changes_what_the_mask_names(admin: Running) -> None:
    plan = pb.Plan(name="gold", weight=2.0, priority=3, token_budget=5, tokens_per_minute=7)
    await admin.call("CreatePlan", pb.CreatePlanRequest(plan=plan))
    change = pb.Plan(name="gold", tokens_per_minute=8, requests_per_minute=9)
    mask = FieldMask(paths=["weight", "token_budget", "tokens_per_minute"])
    changed = (await admin.call("UpdatePlan", pb.UpdatePlanRequest(plan=change, update_mask=mask))).plan
    assert changed == pb.Plan(name="gold", weight=1.0, priority=3, tokens_per_minute=8)
    tenant = pb.Tenant(id="acme", name="Acme", plan="gold", weight=5.0, tokens_per_minute=1)
    await admin.call("CreateTenant", pb.CreateTenantRequest(tenant=tenant))
    change = pb.Tenant(id="acme", plan="unlimited", name="other")
    mask = FieldMask(paths=["plan", "weight"])
    changed = (await admin.call("UpdateTenant", pb.UpdateTenantRequest(tenant=change, update_mask=mask))).tenant
    changed.ClearField("created")
    assert changed == pb.Tenant(id="acme", name="Acme", plan="unlimited", tokens_per_minute=1)


async def test_a_tenant_is_disabled_and_enabled(admin: Running, store: Store) -> None:
    store.create_tenant(Tenant(id="acme", plan="unlimited"))
    assert (await admin.call("DisableTenant", pb.DisableTenantRequest(id="acme"))).tenant.HasField("disabled")
    assert store.get_tenant("acme").disabled_unix_s is not None
    assert not (await admin.call("EnableTenant", pb.EnableTenantRequest(id="acme"))).tenant.HasField("disabled")


async def test_lists_come_in_pages(admin: Running, store: Store) -> None:
    for index in range(5):
        store.create_tenant(Tenant(id=f"t{index}", plan="unlimited"))
        store.create_key("operators", KeyGrant())
    keep(store, [record(index) for index in range(6)])
    for method, request, items, total in (
        ("ListTenants", pb.ListTenantsRequest(page_size=2), "tenants", 6),
        ("ListKeys", pb.ListKeysRequest(page_size=2), "keys", 6),
        ("ListUsage", pb.ListUsageRequest(page_size=2), "records", 6),
    ):
        pages = []
        while True:
            answer = await admin.call(method, request)
            pages.append(list(getattr(answer, items)))
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        assert [len(page) for page in pages] == [2, 2, 2]
        assert len({str(item) for page in pages for item in page}) == total


async def test_usage_is_filtered(admin: Running, store: Store) -> None:
    keep(store, [record(index) for index in range(10)])
    since, until = Timestamp(seconds=1001), Timestamp(seconds=1003, nanos=100_000_001)
    wanted = pb.ListUsageRequest(tenant_id="acme", key_id="k1", model="tiny", since=since, until=until)
    records = (await admin.call("ListUsage", wanted)).records
    assert [found.request_id for found in records] == ["r002", "r004", "r006"]
    assert records[0].completion_tokens == 2 and records[0].started.nanos == 100_000_000


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("CreatePlan", pb.CreatePlanRequest(), "plan.name"),
        ("CreatePlan", pb.CreatePlanRequest(plan=pb.Plan(name="a", token_budget=-1)), "plan.token_budget"),
        ("CreatePlan", pb.CreatePlanRequest(plan=pb.Plan(name="a", weight=float("nan"))), "plan.weight"),
        ("UpdatePlan", pb.UpdatePlanRequest(plan=pb.Plan(name="unlimited")), "update_mask"),
        (
            "UpdatePlan",
            pb.UpdatePlanRequest(plan=pb.Plan(name="unlimited"), update_mask=FieldMask(paths=["name"])),
            "update_mask",
        ),
        (
            "UpdatePlan",
            pb.UpdatePlanRequest(
                plan=pb.Plan(name="unlimited", priority=99), update_mask=FieldMask(paths=["priority"])
            ),
            "plan.priority",
        ),
        ("CreateTenant", pb.CreateTenantRequest(tenant=pb.Tenant(id="A", plan="unlimited")), "tenant.id"),
        (
            "CreateTenant",
            pb.CreateTenantRequest(tenant=pb.Tenant(id="a", plan="b", created=Timestamp())),
            "tenant.created",
        ),
        (
            "UpdateTenant",
            pb.UpdateTenantRequest(tenant=pb.Tenant(id="operators"), update_mask=FieldMask(paths=["plan"])),
            "tenant.plan",
        ),
        ("CreateKey", pb.CreateKeyRequest(tenant_id="operators"), "grant.models"),
        (
            "CreateKey",
            pb.CreateKeyRequest(tenant_id="operators", grant=pb.KeyGrant(admin=True, expires=Timestamp(seconds=1))),
            "grant.expires",
        ),
        (
            "CreateKey",
            pb.CreateKeyRequest(
                tenant_id="operators", grant=pb.KeyGrant(admin=True, expires=Timestamp(seconds=1 << 60))
            ),
            "grant.expires",
        ),
        ("RotateKey", pb.RotateKeyRequest(id="x", overlap=Duration(seconds=-1)), "overlap"),
        ("ListTenants", pb.ListTenantsRequest(page_size=1001), "page_size"),
        ("ListKeys", pb.ListKeysRequest(page_size=-1), "page_size"),
        ("ListKeys", pb.ListKeysRequest(page_token="x"), "page_token"),
        ("ListTenants", pb.ListTenantsRequest(page_token="eyJhIjoxfQ=="), "page_token"),
        ("ListTenants", pb.ListTenantsRequest(page_token=convert.page_token(("a\0",))), "page_token"),
        ("ListUsage", pb.ListUsageRequest(model="a\0"), "model"),
        ("ListUsage", pb.ListUsageRequest(page_token="é"), "page_token"),
        ("ListUsage", pb.ListUsageRequest(since=Timestamp(seconds=5), until=Timestamp(seconds=5)), "until"),
        ("ListUsage", pb.ListUsageRequest(since=Timestamp(seconds=-5)), "since"),
    ],
)
async def test_a_wrong_field_is_named_by_its_path(admin: Running, method: str, request_: Any, field: str) -> None:
    error = await refused(admin.call(method, request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert wrong_field(error) == field
    assert field.rpartition(".")[2] in str(error.details())


async def test_a_field_of_a_later_version_is_refused(admin: Running) -> None:
    call = admin.channel.unary_unary(f"/{ADMIN}/CreatePlan")
    data = pb.CreatePlanRequest(plan=pb.Plan(name="a")).SerializeToString() + b"\x98\x06\x01"
    error = await refused(call(data, metadata=[("authorization", f"Bearer {admin.key}")]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_is_missing_and_what_is_taken(admin: Running) -> None:
    error = await refused(admin.call("GetTenant", pb.GetTenantRequest(id="nobody")))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "there is no tenant 'nobody'")
    taken = pb.CreatePlanRequest(plan=pb.Plan(name="unlimited"))
    assert (await refused(admin.call("CreatePlan", taken))).code() is grpc.StatusCode.ALREADY_EXISTS


async def test_every_method_needs_a_key_with_administration(admin: Running, store: Store) -> None:
    user = store.create_key("operators", KeyGrant()).text
    async with asyncio.timeout(PATIENCE_S):
        while (await _code(admin, user)) is grpc.StatusCode.UNAUTHENTICATED:
            await asyncio.sleep(0.005)
    service = pb.DESCRIPTOR.services_by_name["Admin"]
    reflection = ["/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]
    for path in [f"/{ADMIN}/{method.name}" for method in service.methods] + reflection:
        for metadata, code in (
            ([], grpc.StatusCode.UNAUTHENTICATED),
            ([("authorization", "Bearer nonsense")], grpc.StatusCode.UNAUTHENTICATED),
            ([("authorization", f"Bearer {admin.key}")] * 2, grpc.StatusCode.UNAUTHENTICATED),
            ([("authorization", f"Bearer {user}")], grpc.StatusCode.PERMISSION_DENIED),
        ):
            call: Any
            if path in reflection:  # nothing is sent: it might go out when the stream has ended, which is INTERNAL then
                call = admin.channel.stream_stream(path)(metadata=metadata, timeout=PATIENCE_S)
            else:
                call = admin.channel.unary_unary(path)(b"", metadata=metadata, timeout=PATIENCE_S)
            assert await call.code() is code, path
    assert len(service.methods) == 23


async def test_health_is_open_and_follows_the_database(
    admin: Running, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    health = health_pb2_grpc.HealthStub(admin.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=ADMIN))
    assert (await watch.read()).status == Status.SERVING

    def gone(*args: Any) -> None:
        raise StoreUnavailableError("the database sqlite:///secret/place cannot be used now: gone")

    with monkeypatch.context() as patch:
        patch.setattr(store, "generation", gone)
        patch.setattr(store, "list_plans", gone)
        assert (await asyncio.wait_for(watch.read(), PATIENCE_S)).status == Status.NOT_SERVING
        error = await refused(admin.call("ListPlans", pb.ListPlansRequest()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "secret" not in str(error.details()) and "/secret/place" in caplog.text
    assert (await asyncio.wait_for(watch.read(), PATIENCE_S)).status == Status.SERVING
    watch.cancel()


async def test_keys_are_followed_again_after_a_bug(
    admin: Running, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = health_pb2_grpc.HealthStub(admin.channel).Watch(health_pb2.HealthCheckRequest(service=ADMIN))
    assert (await watch.read()).status == Status.SERVING

    def broken() -> int:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(store, "generation", broken)
        assert (await asyncio.wait_for(watch.read(), PATIENCE_S)).status == Status.NOT_SERVING
    assert (await asyncio.wait_for(watch.read(), PATIENCE_S)).status == Status.SERVING
    watch.cancel()


async def test_a_bug_says_nothing_about_itself(admin: Running, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Plan]:
        raise RuntimeError("canary")

    monkeypatch.setattr(store, "list_plans", broken)
    error = await refused(admin.call("ListPlans", pb.ListPlansRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL and "canary" not in str(error.details())


async def test_a_database_that_is_away_for_long_does_not_fill_the_log(
    admin: Running, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = []

    def gone() -> int:
        looks.append(1)
        raise StoreUnavailableError("the database cannot be used now: gone")

    with monkeypatch.context() as patch:
        patch.setattr(store, "generation", gone)
        await until(lambda: len(looks) > 3)
    await until(lambda: "again" in caplog.text)
    assert caplog.messages == ["the database cannot be used now: gone", "changes of keys are followed again"]


async def test_no_key_is_ever_logged(admin: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    grant = pb.KeyGrant(admin=True)
    issued = await admin.call("CreateKey", pb.CreateKeyRequest(tenant_id="operators", grant=grant))
    rotated = await admin.call("RotateKey", pb.RotateKeyRequest(id=issued.key.id))
    await refused(admin.call("GetTenant", pb.GetTenantRequest(id="nobody"), key=rotated.text))
    await refused(admin.call("ListPlans", pb.ListPlansRequest(), key=issued.text))
    for text in (admin.key, issued.text, rotated.text):
        assert text[20:] not in caplog.text


async def test_a_generic_client_can_administer(admin: Running) -> None:
    assert await asyncio.to_thread(_ask_knowing_nothing, admin) == ["gold", "unlimited"]


def _ask_knowing_nothing(admin: Running) -> list[str]:
    with grpc.insecure_channel(admin.target) as plain:
        channel = grpc.intercept_channel(plain, _WithKey(admin.key))
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName(ADMIN)

        def call(name: str, request: dict[str, Any]) -> dict[str, Any]:
            method = service.methods_by_name[name]
            message = json_format.ParseDict(request, message_factory.GetMessageClass(method.input_type)())
            answer = channel.unary_unary(
                f"/{ADMIN}/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )(message, timeout=30)
            return json_format.MessageToDict(answer)

        call("CreatePlan", {"plan": {"name": "gold"}})
        call("UpdatePlan", {"plan": {"name": "gold", "tokenBudget": "7"}, "updateMask": "tokenBudget"})
        return [plan["name"] for plan in call("ListPlans", {})["plans"]]


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Puts a key on every call, as command-line clients do with a header."""

    def __init__(self, key: str) -> None:
        self._metadata = [("authorization", f"Bearer {key}")]

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._keyed(details), request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(self._keyed(details), requests)

    def _keyed(self, details: Any) -> Any:
        return details._replace(metadata=self._metadata)


async def test_the_service_can_be_off_and_its_port_taken(admin: Running, store: Store) -> None:
    with pytest.raises(ConfigError, match=r"admin\.port is null"):
        AdminServer(AdminConfig(port=None), store, refresh_s=1)
    server = AdminServer(AdminConfig(port=int(admin.target.rpartition(":")[2])), store, refresh_s=1)
    with pytest.raises(ConfigError, match=r"cannot listen: .* is in use"):
        await server.start()
    await server.stop()
