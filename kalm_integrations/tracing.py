"""OpenTelemetry spans of rerankers, after OpenInference's conventions. Off until `instrument` is called.

```python
from kalm_integrations.tracing import instrument

instrument()            # the application's tracer provider
```

While it is off, nothing of OpenTelemetry is imported. A span has the query and what came of it, and no text of a passage
unless `record_texts` asks for it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kalm_integrations.errors import MissingExtraError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

    from kalm_integrations.core.base import RankRequest, Reranker
    from kalm_integrations.core.types import Ranking

MAX_DOCUMENTS = 50
MAX_DOCUMENTS_WITH_TEXTS = 20
"""The first that are recorded: a span of the SDK holds 128 attributes, and a document takes several."""


def instrument(
    tracer_provider: TracerProvider | None = None,
    *,
    record_texts: bool = False,
    hide_inputs: bool | None = None,
    hide_outputs: bool | None = None,
) -> None:
    """Make spans of what rerankers of this process do from now on, whoever calls them.

    Args:
        tracer_provider: takes the spans; None takes the process's own, as OpenTelemetry has it.
        record_texts: record the texts of passages, and the messages of errors, which may quote them.
        hide_inputs: leave out the query and the passages that were given; None asks `OPENINFERENCE_HIDE_INPUTS`.
        hide_outputs: leave out which passages were returned, and their scores; None asks `OPENINFERENCE_HIDE_OUTPUTS`.

    Raises:
        MissingExtraError: the extra `telemetry` is not installed.
    """
    global _tracing
    _tracing = _Tracing(
        tracer_provider,
        record_texts=record_texts,
        hide_inputs=_is_set("OPENINFERENCE_HIDE_INPUTS") if hide_inputs is None else hide_inputs,
        hide_outputs=_is_set("OPENINFERENCE_HIDE_OUTPUTS") if hide_outputs is None else hide_outputs,
    )


def uninstrument() -> None:
    """Make no more spans."""
    global _tracing
    _tracing = None


def instrument_with_otlp(**settings: Any) -> None:
    """Make spans and send them by OTLP, as the `OTEL_…` environment variables say.

    Where the process has a tracer provider, spans go there instead. What was not sent yet is sent when the process ends.

    Args:
        settings: see `instrument`.

    Raises:
        MissingExtraError: the extra `telemetry`, OpenTelemetry's SDK or its OTLP exporter is not installed.
    """
    instrument(**settings)
    from opentelemetry import trace

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL"))
    transport = "grpc" if protocol == "grpc" else "http"
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = import_module(f"opentelemetry.exporter.otlp.proto.{transport}.trace_exporter").OTLPSpanExporter()
    except ImportError as error:
        uninstrument()
        msg = f"spans are sent by an exporter; install it with: pip install opentelemetry-exporter-otlp-proto-{transport}"
        raise MissingExtraError(msg) from error
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "kalm"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    # Not the process's own: a web framework would add a span of each of its steps, and of each health check.
    instrument(provider, **settings)


def from_headers(headers: Mapping[str, str]) -> AbstractContextManager[object]:
    """Have spans that are made inside belong to the trace of an HTTP request's sender (`traceparent`).

    It does nothing where spans are off, or where the web framework's own instrumentation has opened a span already.
    """
    tracing = _tracing
    return nullcontext() if tracing is None else tracing.continued(headers)


def headers() -> dict[str, str]:
    """Return the HTTP headers by which another service continues the current trace; none where spans are off."""
    carrier: dict[str, str] = {}
    tracing = _tracing
    if tracing is not None:
        tracing.propagate.inject(carrier)
    return carrier


class RankSpan:
    """The span of a request; this one is none, and stands in for it where spans are off."""

    def answer(self, rankings: Sequence[Ranking]) -> None:
        """Record what came of it."""

    def fail(self, error: BaseException) -> None:
        """Record what made it fail, though it is not raised."""


def ranking(reranker: Reranker, request: RankRequest, name: str = "kalm.rank") -> AbstractContextManager[RankSpan]:
    """Open the span of a request, as a child of the caller's; what is raised inside is recorded."""
    tracing = _tracing
    return _OFF if tracing is None else tracing.ranking(reranker, request, name)


def encoding(reranker: Reranker, n_passages: int) -> AbstractContextManager[object]:
    """Open the span of passages that are encoded at ingest."""
    tracing = _tracing
    return _OFF if tracing is None else tracing.encoding(reranker, n_passages)


class _Tracing:
    """What makes spans, and what goes into them."""

    def __init__(self, provider: TracerProvider | None, *, record_texts: bool, hide_inputs: bool, hide_outputs: bool) -> None:
        try:
            from openinference.semconv import trace as conventions
            from opentelemetry import context, propagate, trace
            from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
        except ImportError as error:
            msg = 'spans need OpenTelemetry; install it with: pip install "kalm-integrations[telemetry]"'
            raise MissingExtraError(msg) from error
        self.conventions, self.context, self.propagate, self.trace = conventions, context, propagate, trace
        self.tracer = trace.get_tracer("kalm_integrations", tracer_provider=provider)
        self.record_texts, self.hide_inputs, self.hide_outputs = record_texts, hide_inputs, hide_outputs
        names = conventions.SpanAttributes
        self._suppressed = _SUPPRESS_INSTRUMENTATION_KEY
        self._shared = (names.SESSION_ID, names.USER_ID, names.METADATA, names.TAG_TAGS)

    @contextmanager
    def ranking(self, reranker: Reranker, request: RankRequest, name: str) -> Iterator[RankSpan]:
        names, reranked_by = self.conventions.SpanAttributes, self.conventions.RerankerAttributes
        attributes: dict[str, Any] = {
            names.OPENINFERENCE_SPAN_KIND: self.conventions.OpenInferenceSpanKindValues.RERANKER.value,
            reranked_by.RERANKER_MODEL_NAME: reranker.model_name,
            "kalm.passages": sum(map(len, request.lists)),
            "kalm.reranked": False,  # until there is an answer
        }
        if request.rules.top_k is not None:
            attributes[reranked_by.RERANKER_TOP_K] = request.rules.top_k
        if name != "kalm.rank":
            attributes["kalm.queries"] = len(request.queries)
        elif not self.hide_inputs:
            attributes[reranked_by.RERANKER_QUERY] = attributes[names.INPUT_VALUE] = request.queries[0]
            attributes[names.INPUT_MIME_TYPE] = self.conventions.OpenInferenceMimeTypeValues.TEXT.value
        with self._open(name, attributes) as span:
            yield _OpenRankSpan(self, span)

    @contextmanager
    def encoding(self, reranker: Reranker, n_passages: int) -> Iterator[None]:
        names = self.conventions.SpanAttributes
        attributes: dict[str, Any] = {
            names.OPENINFERENCE_SPAN_KIND: self.conventions.OpenInferenceSpanKindValues.EMBEDDING.value,
            names.EMBEDDING_MODEL_NAME: reranker.model_name,
            "kalm.passages": n_passages,
        }
        with self._open("kalm.encode", attributes) as span:
            yield
            span.set_status(self.trace.StatusCode.OK)

    @contextmanager
    def continued(self, headers: Mapping[str, str]) -> Iterator[None]:
        if self.trace.get_current_span().get_span_context().is_valid:
            yield
            return
        token = self.context.attach(self.propagate.extract({name.lower(): value for name, value in headers.items()}))
        try:
            yield
        finally:
            self.context.detach(token)

    def fail(self, span: Span, error: BaseException) -> None:
        """Record an error: its type; its message may quote a text."""
        kind = type(error).__name__
        event = {"exception.type": kind}
        if self.record_texts:
            event["exception.message"] = str(error)
        span.add_event("exception", event)
        span.set_status(self.trace.StatusCode.ERROR, kind)

    @contextmanager
    def _open(self, name: str, attributes: Mapping[str, Any]) -> Iterator[Span]:
        get = self.context.get_value
        # What `suppress_tracing` sets, and `using_session` and its kin: OpenInference's instrumentors heed both.
        if get(self._suppressed):
            yield self.trace.INVALID_SPAN
            return
        shared: dict[str, Any] = {key: value for key in self._shared if (value := get(key)) is not None}
        with self.tracer.start_as_current_span(
            name, attributes={**shared, **attributes}, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                self.fail(span, error)
                raise


class _OpenRankSpan(RankSpan):
    """A span that is open."""

    def __init__(self, tracing: _Tracing, span: Span) -> None:
        self._tracing, self._span = tracing, span

    def answer(self, rankings: Sequence[Ranking]) -> None:
        if not self._span.is_recording():
            return
        counts: Counter[str] = Counter()
        for ranking in rankings:
            counts.update({f"kalm.encodings.{status}": count for status, count in ranking.counts.items()})
        self._span.set_attributes({**counts, "kalm.reranked": True})
        if len(rankings) == 1:
            self._span.set_attributes(self._documents(rankings[0]))
        self._span.set_status(self._tracing.trace.StatusCode.OK)

    def fail(self, error: BaseException) -> None:
        self._tracing.fail(self._span, error)

    def _documents(self, ranking: Ranking) -> dict[str, Any]:
        """Return the passages that came in, where their texts are recorded, and those that went out."""
        tracing = self._tracing
        names, reranked_by = tracing.conventions.DocumentAttributes, tracing.conventions.RerankerAttributes
        texts = ranking.reading.texts if tracing.record_texts else ()
        limit = MAX_DOCUMENTS_WITH_TEXTS if texts else MAX_DOCUMENTS
        documents: dict[str, Any] = {}
        for index, text in enumerate(() if tracing.hide_inputs else texts[:limit]):
            start = f"{reranked_by.RERANKER_INPUT_DOCUMENTS}.{index}."
            documents |= {start + names.DOCUMENT_ID: index, start + names.DOCUMENT_CONTENT: text or ""}
        for place, passage in enumerate(() if tracing.hide_outputs else ranking[:limit]):
            start = f"{reranked_by.RERANKER_OUTPUT_DOCUMENTS}.{place}."
            documents |= {start + names.DOCUMENT_ID: passage.index, start + names.DOCUMENT_SCORE: passage.score}
            if texts:
                documents[start + names.DOCUMENT_CONTENT] = texts[passage.index] or ""
        return documents


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("true", "1")


_OFF = nullcontext(RankSpan())
_tracing: _Tracing | None = None
