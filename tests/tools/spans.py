"""Spans of OpenTelemetry, kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kalm_integrations import tracing


class Spans:
    """What was made since it was last asked."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def take(self) -> tuple[ReadableSpan, ...]:
        spans = self.exporter.get_finished_spans()
        self.exporter.clear()
        return spans

    def one(self) -> ReadableSpan:
        [span] = self.take()
        return span


@contextmanager
def recording() -> Iterator[Spans]:
    """Spans that the package makes meanwhile."""
    spans = Spans()
    tracing.instrument(spans.provider)
    try:
        yield spans
    finally:
        tracing.uninstrument()
