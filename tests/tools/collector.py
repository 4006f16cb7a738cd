"""A collector of OpenTelemetry spans, which come in by OTLP over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What has come in, and where it is to be sent."""

    def __init__(self) -> None:
        self.received: list[ResourceSpans] = []
        self.environment: dict[str, str] = {}

    @property
    def spans(self) -> list[Span]:
        return [span for sent in self.received for scope in sent.scope_spans for span in scope.spans]

    def Export(self, request, context):  # noqa: N802
        self.received += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens; its environment tells a process to send to it."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.environment = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)
