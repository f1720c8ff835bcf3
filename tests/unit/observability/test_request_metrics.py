"""What a request leaves in the metrics, and that no client can add a series."""

import uuid
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest

from bench.support.fake_backend import FakeBackend, Script, card, for_ever, say, steps
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, Timings
from model_parallel.errors import RequestError
from protos import inference_pb2 as pb
from serving.contracts.accounts import OpenAccounts, Principal, Reservation
from serving.contracts.errors import GroupRefusedError, GroupUnavailableError, QuotaExceededError
from serving.contracts.observer import RequestObserver
from serving.gateway.server import METHODS
from serving.observability.gateway import GatewayWatch
from serving.observability.metrics import MAX_TENANTS
from serving.observability.requests import MAX_LINES_PER_S, _LineBudget
from serving.observability.tracing import Tracing
from tests.unit.observability.conftest import Watch

TINY = {"model_name": "tiny", "engine": "group-1"}
GENERATE = "/packtrain.v1.Inference/Generate"


def request(**sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="hi"), sampling=pb.Sampling(**sampling))  # type: ignore[arg-type]


def test_usage_records_that_are_not_durable_are_counted_when_metrics_are_read() -> None:
    metrics = GatewayWatch([card()], METHODS, Tracing()).metrics
    pending = [1, 2]
    metrics.watch_pending_records(lambda: len(pending))
    assert metrics.registry.get_sample_value("packtrain_usage_records_pending") == 2
    pending.clear()
    assert metrics.registry.get_sample_value("packtrain_usage_records_pending") == 0


async def test_one_answer_is_in_every_metric(watched: Watch) -> None:
    async with watched(FakeBackend(say("Paris"))) as gateway:
        await gateway.stub.Generate(request(max_tokens=20))
        value = gateway.value
        assert value("vllm:time_to_first_token_seconds_count", **TINY) == 1
        assert value("vllm:inter_token_latency_seconds_count", **TINY) == 4
        assert value("vllm:e2e_request_latency_seconds_count", **TINY) == 1
        assert value("vllm:request_queue_time_seconds_sum", **TINY) == 0.25
        assert value("vllm:request_prefill_time_seconds_sum", **TINY) == 0.5
        assert value("vllm:request_decode_time_seconds_sum", **TINY) == 0.75
        assert value("vllm:request_inference_time_seconds_sum", **TINY) == 1.25
        assert value("vllm:request_prompt_tokens_sum", **TINY) == 3
        assert value("vllm:request_generation_tokens_sum", **TINY) == 6
        assert value("vllm:request_max_num_generation_tokens_sum", **TINY) == 6
        assert value("vllm:request_params_max_tokens_sum", **TINY) == 20
        assert value("vllm:request_params_n_sum", **TINY) == 1
        assert value("vllm:request_time_per_output_token_seconds_count", **TINY) == 1
        assert value("vllm:request_success_total", **TINY, finished_reason="stop") == 1
        labels = {"front_end": "grpc", "method": GENERATE, "model_name": "tiny", "code": "OK"}
        assert value("packtrain_requests_total", **labels) == 1
        assert value("packtrain_requests_in_progress", front_end="grpc") == 0
        tenant = {"tenant": "default", "model_name": "tiny"}
        assert value("packtrain_tenant_requests_total", **tenant, outcome="stop") == 1
        kinds = ("prompt", "cached", "completion")
        assert [value("packtrain_tokens_total", **tenant, kind=kind) for kind in kinds] == [3, 3, 6]
        assert value("packtrain_tenant_ttft_seconds_count", **tenant) == 1


async def test_the_stages_add_up_to_the_time_to_the_first_token(watched: Watch) -> None:
    quick = Timings(queue_s=1e-6, prefill_s=2e-6)

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        yield (
            EngineOutput(
                request_id=requests[0].request_id, token_ids=(65,), finish_reason=FinishReason.LENGTH, timings=quick
            ),
        )

    async with watched(FakeBackend(script)) as gateway:
        await gateway.stub.Generate(request(max_tokens=1))
        stages = {
            stage: gateway.value("packtrain_ttft_stage_seconds_sum", model_name="tiny", stage=stage) or 0
            for stage in ("gateway", "queue", "prefill", "network")
        }
        assert sum(stages.values()) == pytest.approx(gateway.value("vllm:time_to_first_token_seconds_sum", **TINY))
        assert (stages["queue"], stages["prefill"]) == (1e-6, 2e-6)
        assert min(stages["network"], stages["gateway"]) > 0


async def test_the_pause_of_a_request_whose_group_is_lost_is_told_by_stage(watched: Watch) -> None:
    quick = Timings(queue_s=1e-6, prefill_s=2e-6)
    num_lost = 0

    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        nonlocal num_lost
        yield (EngineOutput(request_id=requests[0].request_id, token_ids=(65,), timings=quick),)
        if num_lost < 2:
            num_lost += 1
            raise GroupUnavailableError("the replica group was lost")
        yield (
            EngineOutput(
                request_id=requests[0].request_id, token_ids=(66,), finish_reason=FinishReason.LENGTH, timings=quick
            ),
        )

    async with watched(FakeBackend(script)) as gateway:
        await gateway.stub.Generate(request(max_tokens=4))
        stages = {
            stage: gateway.value("packtrain_resumption_stage_seconds_sum", model_name="tiny", stage=stage) or 0
            for stage in ("handover", "queue", "prefill", "network")
        }
        count = gateway.value("packtrain_resumption_stage_seconds_count", model_name="tiny", stage="handover")
        assert count == 2
        assert (stages["queue"], stages["prefill"]) == (2e-6, 4e-6)
        assert stages["handover"] > 0
        assert gateway.value("vllm:time_to_first_token_seconds_count", **TINY) == 1


async def test_choices_share_one_first_token(watched: Watch) -> None:
    script = steps([[65], [66], [67]], [[65], [66]], finish=FinishReason.LENGTH, eos=False)
    async with watched(FakeBackend(script)) as gateway:
        await gateway.stub.Generate(request(n=2, max_tokens=3))
        assert gateway.value("vllm:time_to_first_token_seconds_count", **TINY) == 1
        assert gateway.value("vllm:inter_token_latency_seconds_count", **TINY) == 2 + 1
        assert gateway.value("vllm:request_params_n_sum", **TINY) == 2
        assert gateway.value("vllm:request_generation_tokens_sum", **TINY) == 5
        assert gateway.value("vllm:request_max_num_generation_tokens_sum", **TINY) == 3


def failing(error: Exception) -> Script:
    async def script(requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[EngineOutput, ...]]:
        raise error
        yield ()

    return script


@pytest.mark.parametrize(
    ("error", "code", "outcome", "reason"),
    [
        (
            GroupRefusedError("full", kind="overloaded", engine="group-1"),
            "RESOURCE_EXHAUSTED",
            "rejected",
            "OVERLOADED",
        ),
        (GroupUnavailableError("lost"), "UNAVAILABLE", "unavailable", "NO_GROUP"),
        (RequestError("nan", kind="numerical_error"), "INTERNAL", "error", ""),
        (RuntimeError("a bug"), "INTERNAL", "error", ""),
    ],
)
async def test_failures_are_counted(watched: Watch, error: Exception, code: str, outcome: str, reason: str) -> None:
    async with watched(FakeBackend(failing(error))) as gateway:
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Generate(request())
        await gateway.idle()
        labels = {"front_end": "grpc", "method": GENERATE, "model_name": "tiny"}
        assert gateway.value("packtrain_requests_total", **labels, code=code) == 1
        assert gateway.value("packtrain_requests_in_progress", front_end="grpc") == 0
        labels = {"tenant": "default", "model_name": "tiny", "outcome": outcome}
        assert gateway.value("packtrain_tenant_requests_total", **labels) == 1
        if reason:
            labels = {"model_name": "tiny", "reason": reason}
            assert gateway.value("packtrain_admission_rejections_total", **labels) == 1
            by_group = gateway.value("vllm:admission_rejections_total", **labels, engine="group-1")
            assert by_group == (1 if reason == "OVERLOADED" else None)
        assert gateway.value("vllm:e2e_request_latency_seconds_count", **TINY) is None


async def test_a_client_that_leaves_and_a_deadline_are_told_apart(watched: Watch) -> None:
    async with watched(FakeBackend(for_ever)) as gateway:
        stream = gateway.stub.GenerateStream(request())
        await stream.read()
        stream.cancel()
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Generate(request(), timeout=0.2)  # must expire
        await gateway.backend.closed()
        await gateway.idle()
        labels = {"front_end": "grpc", "model_name": "tiny"}
        cancelled = gateway.value("packtrain_requests_total", method=f"{GENERATE}Stream", code="CANCELLED", **labels)
        late = gateway.value("packtrain_requests_total", method=GENERATE, code="DEADLINE_EXCEEDED", **labels)
        assert (cancelled, late) == (1, 1)
        assert gateway.value("vllm:request_success_total", **TINY, finished_reason="abort") == 2


class NoBudget(OpenAccounts):
    """Knows its only tenant, who has used up everything."""

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        return Principal(tenant_id="acme")

    async def reserve(
        self, principal: Principal, *, request_id: str, model: str, num_tokens: int, billed_id: str = ""
    ) -> Reservation:
        raise QuotaExceededError("none left", quota="tokens_per_minute", retry_after_s=1.0)


async def test_a_used_up_quota_is_counted_by_its_name(watched: Watch) -> None:
    async with watched(accounts=NoBudget()) as gateway:
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Generate(request())
        await gateway.idle()
        assert gateway.value("packtrain_quota_refusals_total", tenant="acme", quota="tokens_per_minute") == 1
        assert gateway.value("packtrain_admission_rejections_total", model_name="tiny", reason="QUOTA") == 1
        assert gateway.value("vllm:admission_rejections_total", **TINY, reason="QUOTA") is None


async def test_strangers_names_add_no_series(watched: Watch) -> None:
    async with watched() as gateway:

        async def ask(model: str, method: str) -> None:
            call = gateway.channel.unary_unary(f"/packtrain.v1.Inference/{method}")
            with pytest.raises(grpc.aio.AioRpcError):
                await call(pb.GenerateRequest(model=model, prompt=pb.Prompt(text="hi")).SerializeToString())
            await gateway.idle()

        await ask("nobody", "Generate")
        await ask("nobody", "Nothing")
        before = gateway.samples()
        for _ in range(50):
            await ask(uuid.uuid4().hex, "Generate")
            await ask("tiny", uuid.uuid4().hex)
        assert gateway.samples() == before


def test_ten_thousand_names_leave_the_number_of_series_as_it_is() -> None:
    watch = GatewayWatch([card()], METHODS, Tracing())

    def requests(prefix: str, number: int) -> int:
        for index in range(number):
            name = f"{prefix}-{index}"
            with watch.telemetry.observe("grpc", name, name, {}) as observer:
                observer.authenticated(Principal(tenant_id=name))
                if index % 2:
                    observer.resolved("tiny", "tiny")
                observer.failed("RESOURCE_EXHAUSTED", "QUOTA", quota="requests_per_minute")
        return sum(len(family.samples) for family in watch.metrics.registry.collect())

    before = requests("first", 2 * MAX_TENANTS)
    assert requests("second", 10_000) == before
    assert watch.metrics.tenant_label("first-0") == "first-0"
    assert watch.metrics.tenant_label("second-0") == "other"


def test_the_access_log_has_an_end() -> None:
    budget = _LineBudget()
    taken = [budget.take(100.5) for _ in range(MAX_LINES_PER_S + 7)]
    assert taken == [0] * MAX_LINES_PER_S + [None] * 7
    assert [budget.take(101.0), budget.take(101.0)] == [7, 0]


def test_an_unwatched_request_costs_nothing_and_says_nothing() -> None:
    with RequestObserver() as observer:
        assert observer.submitted() == {}
