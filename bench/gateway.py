"""What keys, quotas and exact metering add to a unary call: the whole gateway beside its bare servicer.

    python -m bench.gateway [--calls 1000] [--json FILE]

Both answer the same request from the same backend, which has its one token at once, so that nothing but the gateway is timed.
The bare servicer has no interceptor, no key, no quota and keeps no record. The gateway checks a key, reserves from a tenant's
and a key's quotas, and waits until the usage record is committed to SQLite by the quota authority, a Ray actor in a process of
its own. Calls alternate, one at a time, from one client on the same machine.
"""

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import ray

from bench.support.fake_backend import ByteTokenizer, FakeBackend
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serving.config import GatewayConfig, LimitsConfig
from serving.driver.environment import prepare_environment
from serving.gateway.core.generation import Generator
from serving.gateway.grpc.servicer import InferenceServicer
from serving.gateway.server import GatewayServer
from serving.tenants.authority.actor import start_authority, stop_authority
from serving.tenants.client.accounts import TenantAccounts
from serving.tenants.client.link import ActorLink
from serving.tenants.records import KeyGrant, Plan, Tenant
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store

RESULT = Path(__file__).parent / "results" / "gateway.json"
NUM_WARM_UP = 100
TARGET_MS = 3.0
PER_MINUTE = 10_000_000


async def measure(url: str, num_calls: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each call: bare, and through the gateway."""

    async def at_once(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        request = requests[0]
        yield (EngineOutput(request_id=request.request_id, token_ids=(97,), finish_reason=FinishReason.LENGTH),)

    backend: Any = FakeBackend(at_once)
    limits = LimitsConfig()
    tokenizers: dict[str, Any] = dict.fromkeys(backend.models, ByteTokenizer())
    bare = grpc.aio.server()
    generator = Generator(backend, tokenizers, limits)
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(generator), bare)
    bare_port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    accounts = TenantAccounts(ActorLink(), refresh_s=1.0)
    await accounts.start()
    whole = GatewayServer(GatewayConfig(port=0, http_port=0), limits, backend, tokenizers, accounts)
    ports = await whole.start()
    request = pb.GenerateRequest(
        model="plain", prompt=pb.Prompt(text="The capital of"), sampling=pb.Sampling(max_tokens=1, temperature=0)
    )
    metadata = (("authorization", f"Bearer {new_key(url)}"),)
    try:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{bare_port}") as bare_channel,
            grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as whole_channel,
        ):
            stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in (bare_channel, whole_channel)]
            await _until_the_key_is_known(stubs[1], request, metadata)
            times_ms: tuple[list[float], list[float]] = ([], [])
            for _ in range(NUM_WARM_UP + num_calls):
                for stub, into in zip(stubs, times_ms, strict=True):
                    began_s = time.perf_counter()
                    await stub.Generate(request, timeout=10, metadata=metadata)
                    into.append(1e3 * (time.perf_counter() - began_s))
            return times_ms[0][NUM_WARM_UP:], times_ms[1][NUM_WARM_UP:]
    finally:
        await whole.drain()
        await whole.stop()
        await accounts.stop()
        await bare.stop(1)


def new_key(url: str) -> str:
    """Of a tenant with all four limits, as has the key."""
    limits: dict[str, Any] = {
        "requests_per_minute": PER_MINUTE,
        "tokens_per_minute": PER_MINUTE,
        "max_concurrent_requests": 1000,
        "token_budget": PER_MINUTE,
    }
    database = Database(url)
    try:
        store = Store(database)
        store.create_plan(Plan(name="all-limits", **limits))
        store.create_tenant(Tenant(id="bench", plan="all-limits"))
        return store.create_key("bench", KeyGrant(**limits)).text
    finally:
        database.close()


async def _until_the_key_is_known(
    stub: Any, request: pb.GenerateRequest, metadata: tuple[tuple[str, str], ...]
) -> None:
    deadline_s = time.monotonic() + 10
    while True:
        try:
            await stub.Generate(request, timeout=10, metadata=metadata)
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED or time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="of each kind")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/tenants.db"
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            start_authority(url, refresh_s=1.0)
            bare_ms, whole_ms = asyncio.run(measure(url, arguments.calls))
            stop_authority(10)
        finally:
            ray.shutdown()
    added_ms = statistics.median(whole_ms) - statistics.median(bare_ms)
    result = {
        "machine": platform.processor() or platform.machine(),
        "num_calls": arguments.calls,
        "bare_median_ms": round(statistics.median(bare_ms), 3),
        "gateway_median_ms": round(statistics.median(whole_ms), 3),
        "bare_p99_ms": round(statistics.quantiles(bare_ms, n=100)[98], 3),
        "gateway_p99_ms": round(statistics.quantiles(whole_ms, n=100)[98], 3),
        "added_median_ms": round(added_ms, 3),
        "target_ms": TARGET_MS,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
