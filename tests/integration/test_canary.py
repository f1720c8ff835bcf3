"""What the whole stack tells operators: logs, metrics and traces of every process, none of which holds a prompt or a key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import psutil
import pytest
from ray import serve

from protos import inference_pb2 as pb
from serving.client.client import Client
from serving.contracts.served import APP_NAME
from serving.driver.app import RunningApp
from tests.support.otlp import Collector, running_collector
from tests.support.stack import MODEL, running_stack, stack_config, story, wait_until
from tests.support.waiting import PATIENCE_S

CANARY = "heliotrope"
KEY, LABEL = f"pt-{CANARY}-key", f"{CANARY}-label"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
METADATA = (
    ("authorization", f"Bearer {KEY}"),
    ("x-request-id", LABEL),
    ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),
)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def app(collector: Collector) -> Iterator[RunningApp]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACKTRAIN_LOG_LEVEL", "DEBUG")
        patch.setenv("PACKTRAIN_LOG_FORMAT", "json")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_stack(stack_config()) as app:
            yield app


def canary_request(**fields: Any) -> pb.GenerateRequest:
    request = story(4)
    request.prompt.text = f"My {CANARY} prompt"
    request.MergeFrom(pb.GenerateRequest(**fields))
    return request


def send_everything(app: RunningApp) -> tuple[str, str]:
    """Answers, refusals and a client that leaves. Returns the id of a request that was answered, and all error texts."""
    told = ""
    with Client(app.address) as client:
        answered = client.stub.Generate(canary_request(), metadata=METADATA, timeout=60)
        for _ in client.stub.GenerateStream(canary_request(), metadata=METADATA, timeout=60):
            pass
        leaving = client.stub.GenerateStream(story(2000), metadata=METADATA, timeout=60)
        next(leaving)
        leaving.cancel()
        for wrong in (
            canary_request(sampling=pb.Sampling(stop=[f"my {CANARY} {number}" for number in range(40)])),
            canary_request(model="unknown"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                client.stub.Generate(wrong, metadata=METADATA, timeout=60)
            told += str(caught.value)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": LABEL, "content-type": "application/json"}
    for path in ("/v1/completions", f"/v1/{CANARY}"):
        body = json.dumps({"model": MODEL, "prompt": f"My {CANARY} prompt", "max_tokens": 2}).encode()
        try:
            with urlopen(Request(f"{app.http_url}{path}", body, headers), timeout=60) as answer:
                answer.read()
        except HTTPError as error:
            told += error.read().decode()
    return answered.request.request_id, told


def log_files(app: RunningApp) -> list[Path]:
    assert app.guard is not None
    return [path for path in app.guard.directory.rglob("*") if path.is_file() and "logs" in path.parts]


def records(app: RunningApp) -> list[dict[str, Any]]:
    """Those of Packtrain's own processes."""
    lines = [line for path in log_files(app) for line in path.read_text(errors="replace").splitlines()]
    return [json.loads(line) for line in lines if line.startswith('{"time"')]


def metrics_page() -> str:
    port = serve.get_deployment_handle("Gateway", APP_NAME).metrics_port.remote().result(timeout_s=PATIENCE_S)
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        page: bytes = answer.read()
    return page.decode()


def samples(page: str, name: str) -> list[float]:
    return [float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"{name}{{")]


def test_operators_see_what_happened_and_nothing_of_what_was_said(app: RunningApp, collector: Collector) -> None:
    request_id, told = send_everything(app)
    spans: list[Any] = []

    def traced() -> bool:
        spans.extend(collector.spans())
        return len(spans) == 7 + 4  # the gateway's and the group's

    wait_until(traced, PATIENCE_S, "spans of gateway and group have come")
    # Metrics of the group, by the gateway, which it reports from time to time.
    wait_until(
        lambda: sum(samples(metrics_page(), "vllm:generation_tokens_total")) >= 10, PATIENCE_S, "the group has reported"
    )
    wait_until(
        lambda: sum(samples(metrics_page(), "packtrain_ttft_stage_seconds_count")) == 4 * 4, PATIENCE_S, "all stages"
    )
    page = metrics_page()
    assert samples(page, "packtrain_group_up") == [1]
    assert f'model_name="{MODEL}"' in page and 'engine="' in page

    # One trace from the client over the gateway to the group.
    by_id = {span.span_id: span for span in spans}
    children = [span for span in spans if span.name == "group.generate"]
    assert {by_id[span.parent_span_id].name for span in children} == {"gateway.request"}
    assert sum(span.trace_id.hex() == TRACE for span in spans) == 2 * 3 + 2
    assert all([event.name for event in span.events] == ["first_token"] for span in children)

    # A line a request, and every process says what it is.
    found = records(app)
    (line,) = [each for each in found if each["event"] == "request" and each["request_id"] == request_id]
    assert (line["process"], line["code"], line["completion_tokens"], line["tenant"]) == ("gateway", "OK", 4, "default")
    processes = {" ".join(each["process"].split()[:2]) for each in found}
    assert {"gateway", f"group {MODEL}", "rank 0", "rank 1"} <= processes

    # And no canary anywhere.
    texts = {str(path): path.read_text(errors="replace") for path in log_files(app)}
    texts |= {f"command line of {p.pid}": " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    texts |= {"errors": told, "metrics": page, "traces": "".join(map(str, spans))}
    assert len(texts) > 20
    assert [name for name, text in texts.items() if CANARY in text.lower()] == []
