"""packtrain.v1.Admin, health and reflection on a port for operators: every call needs a key with administration, or without
tenancy the operator's own."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from model_parallel.errors import ConfigError
from protos import admin_pb2, admin_pb2_grpc
from protos import admin_pb2 as pb
from serving.admin import convert
from serving.admin.models import ModelCalls
from serving.admin.operator_key import KeyHolder
from serving.config import AdminConfig
from serving.contracts.accounts import OpenAccounts, Principal
from serving.contracts.errors import ChangeError, PermissionDeniedError, StoreUnavailableError
from serving.contracts.operations import Operations
from serving.gateway.core.admission import Admission
from serving.gateway.grpc.health import HEALTH
from serving.gateway.grpc.interceptors import StatusInterceptor
from serving.gateway.grpc.reflection import add_reflection
from serving.gateway.server import bind, check_protobuf
from serving.observability.log import Trouble
from serving.tenants.directory import KeyDirectory

if TYPE_CHECKING:
    from serving.tenants.store.store import Store

logger = logging.getLogger(__name__)

ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name

_MAX_CONCURRENT_CALLS = 64
_MAX_CONNECTIONS = 256
_NUM_THREADS = 4
"""Calls that ask the database at a time."""
_TIMEOUT_S = 30.0
"""Of the database's answers, and of a client that does not read its own."""
_MAX_MESSAGE_BYTES = 1 << 20
_MAX_CONNECTION_AGE_S = 600
_RETRY_DELAY_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]
_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


class Operators(OpenAccounts):
    """Lets in who has a key with administration, and keeps what is known of keys up to date. Nothing is metered."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="admin")
        self._directory: KeyDirectory | None = None

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        """Raises UnauthenticatedError, PermissionDeniedError."""
        assert self._directory is not None, "refresh comes first"
        operator = self._directory.authenticate(credentials)
        if not operator.is_admin:
            raise PermissionDeniedError("this key does not allow administration")
        return operator

    async def ask(
        self, question: Callable[_Arguments, _Answer], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Answer:
        """Run one of the store's methods in a thread. Raises what it raises, StoreUnavailableError when it takes too long."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, lambda: question(*args, **kwargs))
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await running
        except TimeoutError as error:
            raise StoreUnavailableError(f"the database did not answer within {_TIMEOUT_S:.0f} s") from error

    async def refresh(self) -> None:
        """See whether keys have changed, and know them if so. Raises StoreUnavailableError."""
        generation = await self.ask(self._store.generation)
        if self._directory is None or self._directory.generation != generation:
            self._directory = KeyDirectory(await self.ask(self._store.snapshot))

    def close(self) -> None:
        """What the threads still do, they finish by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class AdminServer:
    """Serves operators. One start, one stop."""

    def __init__(
        self,
        config: AdminConfig,
        store: "Store | None",
        *,
        refresh_s: float,
        operations: Operations | None = None,
        operator_key: str = "",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """`refresh_s` is how soon keys that others have changed count here; `credentials` serve TLS. Without a `store` there is
        no tenancy, and who shows the `operator_key` is let in."""
        if config.port is None:
            raise ConfigError("admin.port is null, which turns packtrain.v1.Admin off")
        self._config = config
        self._refresh_s = refresh_s
        self._credentials = credentials
        if store is None and not operator_key:
            raise ValueError("without a store, an operator's key is needed")
        self._operators = None if store is None else Operators(store)
        self._accounts = self._operators or KeyHolder(operator_key)
        self._servicer = AdminServicer(store, self._operators, operations)
        self._health = health.aio.HealthServicer()
        self._refresh_task: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen and serve. Returns the port. Raises ConfigError when the address cannot be had, StoreUnavailableError."""
        if self._server is not None:
            raise RuntimeError("an admin server starts once")
        check_protobuf()
        if self._operators is not None:
            await self._operators.refresh()
        interceptor = StatusInterceptor(
            Admission(_MAX_CONCURRENT_CALLS),
            self._accounts,
            admitted_service=ADMIN,
            open_service=HEALTH,
            retry_delay_s=_RETRY_DELAY_S,
            slow_reader_timeout_s=_TIMEOUT_S,
            is_strict=True,  # a limit that is not read would be a limit that does not hold
        )
        server = self._server = grpc.aio.server(interceptors=(interceptor,), options=_OPTIONS)
        admin_pb2_grpc.add_AdminServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection(server, [ADMIN, HEALTH])
        assert self._config.port is not None  # the constructor has seen to it
        port = bind(server, self._config.host, self._config.port, self._credentials)
        await self._show(health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        if self._operators is not None:
            self._refresh_task = asyncio.create_task(self._run(self._operators))
        return port

    async def stop(self, grace_s: float = 1.0) -> None:
        """Close the port; calls that still run after `grace_s` are cut off. Safe to call again, and without `start`."""
        if self._refresh_task is not None:
            self._refresh_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._refresh_task
            self._refresh_task = None
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)
        self._servicer.close()
        if self._operators is not None:
            self._operators.close()

    async def _run(self, operators: Operators) -> None:
        """Follow changes of keys until cancelled. Without the database the service is shown as NOT_SERVING."""
        trouble = Trouble(logger)
        while True:
            await asyncio.sleep(self._refresh_s)
            status: int = health_pb2.HealthCheckResponse.NOT_SERVING
            try:
                await operators.refresh()
                status = health_pb2.HealthCheckResponse.SERVING
                trouble.over("changes of keys are followed again")
            except StoreUnavailableError as error:
                trouble.met(str(error))
            except Exception:  # whatever it is, keys that are revoked later must not stay good
                logger.exception("changes of keys cannot be followed")
            await self._show(status)

    async def _show(self, status: int) -> None:
        for name in ("", ADMIN):
            await self._health.set(name, status)


class AdminServicer(ModelCalls, admin_pb2_grpc.AdminServicer):
    """Turns requests into the store's and the driver's operations. Exceptions pass through; `interceptors` answers them."""

    def __init__(
        self, store: "Store | None", operators: Operators | None, operations: Operations | None = None
    ) -> None:
        super().__init__(operations)
        self._found_store = store
        self._operators = operators

    @property
    def _store(self) -> "Store":
        if self._found_store is None:
            raise ChangeError("this server has no tenancy, and so no plans, tenants, keys and usage; configure tenancy")
        return self._found_store

    async def CreatePlan(self, request: pb.CreatePlanRequest, context: Context) -> pb.CreatePlanResponse:
        with convert.within("plan"):
            plan = convert.plan(request.plan)
        made = await self._change(self._store.create_plan, plan)
        return pb.CreatePlanResponse(plan=convert.plan_message(made))

    async def ListPlans(self, request: pb.ListPlansRequest, context: Context) -> pb.ListPlansResponse:
        plans = await self._ask(self._store.list_plans)
        return pb.ListPlansResponse(plans=map(convert.plan_message, plans))

    async def UpdatePlan(self, request: pb.UpdatePlanRequest, context: Context) -> pb.UpdatePlanResponse:
        with convert.within("plan", "update_mask"):
            changes = convert.plan_changes(request.plan, request.update_mask)
            plan = await self._change(self._store.update_plan, request.plan.name, changes)
        return pb.UpdatePlanResponse(plan=convert.plan_message(plan))

    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Context) -> pb.CreateTenantResponse:
        with convert.within("tenant"):
            tenant = convert.tenant(request.tenant)
        made = await self._change(self._store.create_tenant, tenant)
        return pb.CreateTenantResponse(tenant=convert.tenant_message(made))

    async def GetTenant(self, request: pb.GetTenantRequest, context: Context) -> pb.GetTenantResponse:
        tenant = await self._ask(self._store.get_tenant, request.id)
        return pb.GetTenantResponse(tenant=convert.tenant_message(tenant))

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        size = convert.page_size(request)
        (after,) = convert.position(request.page_token, tuple[str]) or ("",)
        found = await self._ask(self._store.list_tenants, after=after, limit=size + 1)
        token = convert.page_token((found[size - 1].id,)) if len(found) > size else ""
        return pb.ListTenantsResponse(tenants=map(convert.tenant_message, found[:size]), next_page_token=token)

    async def UpdateTenant(self, request: pb.UpdateTenantRequest, context: Context) -> pb.UpdateTenantResponse:
        with convert.within("tenant", "update_mask"):
            changes = convert.tenant_changes(request.tenant, request.update_mask)
            tenant = await self._change(self._store.update_tenant, request.tenant.id, changes)
        return pb.UpdateTenantResponse(tenant=convert.tenant_message(tenant))

    async def DisableTenant(self, request: pb.DisableTenantRequest, context: Context) -> pb.DisableTenantResponse:
        tenant = await self._change(self._store.set_tenant_disabled, request.id, True)
        return pb.DisableTenantResponse(tenant=convert.tenant_message(tenant))

    async def EnableTenant(self, request: pb.EnableTenantRequest, context: Context) -> pb.EnableTenantResponse:
        tenant = await self._change(self._store.set_tenant_disabled, request.id, False)
        return pb.EnableTenantResponse(tenant=convert.tenant_message(tenant))

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.CreateKeyResponse:
        with convert.within("grant"):
            grant = convert.key_grant(request.grant)
            issued = await self._change(self._store.create_key, request.tenant_id, grant)
        return pb.CreateKeyResponse(key=convert.key_message(issued.key), text=issued.text)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        size = convert.page_size(request)
        (after,) = convert.position(request.page_token, tuple[str]) or ("",)
        found = await self._ask(self._store.list_keys, tenant_id=request.tenant_id or None, after=after, limit=size + 1)
        token = convert.page_token((found[size - 1].id,)) if len(found) > size else ""
        return pb.ListKeysResponse(keys=map(convert.key_message, found[:size]), next_page_token=token)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.RotateKeyResponse:
        overlap_s = convert.duration_s(request.overlap)
        issued = await self._change(self._store.rotate_key, request.id, overlap_s=overlap_s)
        return pb.RotateKeyResponse(key=convert.key_message(issued.key), text=issued.text)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        key = await self._change(self._store.revoke_key, request.id)
        return pb.RevokeKeyResponse(key=convert.key_message(key))

    async def ListUsage(self, request: pb.ListUsageRequest, context: Context) -> pb.ListUsageResponse:
        size = convert.page_size(request)
        wanted = convert.usage_filter(request)
        after = convert.position(request.page_token, tuple[float, str])
        found = await self._ask(self._store.list_usage, wanted, after=after, limit=size + 1)
        last = found[size - 1] if len(found) > size else None
        token = convert.page_token((last.started_unix_s, last.request_id)) if last else ""
        return pb.ListUsageResponse(records=map(convert.usage_message, found[:size]), next_page_token=token)

    async def _ask(
        self, question: Callable[_Arguments, _Answer], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Answer:
        assert self._operators is not None, "there is a store"
        try:
            return await self._operators.ask(question, *args, **kwargs)
        except StoreUnavailableError as error:
            logger.warning("%s", error)  # the answer does not say where the database is
            raise

    async def _change(
        self, change: Callable[_Arguments, _Answer], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Answer:
        """Ask for a change, and have it hold here before it is answered."""
        answer = await self._ask(change, *args, **kwargs)
        with suppress(StoreUnavailableError):  # the change is made; `AdminServer` goes on trying to see it
            assert self._operators is not None, "there is a store"
            await self._operators.refresh()
        return answer


_OPTIONS = [
    ("grpc.so_reuseport", 0),  # or two servers would share a port unnoticed
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 2 * _MAX_CONCURRENT_CALLS),
    ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # 60 s otherwise, for keepalive too
    ("grpc.max_connection_age_ms", _MAX_CONNECTION_AGE_S * 1000),
]
