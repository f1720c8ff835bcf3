"""An OpenTelemetry collector that keeps what it is sent."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """The trace service."""

    def __init__(self) -> None:
        self.requests: Queue[Any] = Queue()
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        """All that have come until now."""
        requests = [self.requests.get_nowait() for _ in range(self.requests.qsize())]
        return [
            span for each in requests for r in each.resource_spans for scope in r.scope_spans for span in scope.spans
        ]


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Listens on loopback within the block."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()
