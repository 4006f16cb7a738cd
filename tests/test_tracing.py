"""Spans of rerankers: what they hold, what they leave out, whose children they are, and that they cost nothing when off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, detach, set_value
from opentelemetry.trace import StatusCode
from tools.collector import collecting
from tools.hosts import HOSTS
from tools.paths import ROOT
from tools.spans import recording

from kalm_integrations import Passage, tracing
from kalm_integrations.core.pairs import score_pairs
from kalm_integrations.errors import CorruptEncodingError, MissingExtraError, PassError
from kalm_integrations.testing import FakeReranker

TEXTS = ["Lyon lies on the Rhone.", "The Panthers defense won.", "Super Bowl 50 was played in 2015."]
QUERY = "who won the super bowl?"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch):
    for side in ("INPUTS", "OUTPUTS"):
        monkeypatch.delenv(f"OPENINFERENCE_HIDE_{side}", raising=False)
    with recording() as spans:
        yield spans


def counts(span):
    start = "kalm.encodings."
    return {name.removeprefix(start): n for name, n in span.attributes.items() if name.startswith(start) and n}


def returned(span):
    """Index and score of the documents that went out."""
    rows = []
    while (start := f"reranker.output_documents.{len(rows)}.document.") + "id" in span.attributes:
        rows.append((span.attributes[start + "id"], span.attributes[start + "score"]))
    return rows


class Broken(FakeReranker):
    def answer(self, request):
        msg = f"cannot rank {request.lists[0]}"
        raise PassError(msg)


# --- what a span holds


def test_a_query_is_a_span_of_the_reranker_kind(make_reranker, spans):
    reranker = make_reranker()
    [metadata] = reranker.encode_to_metadata(TEXTS[:1])
    stored, corrupt = Passage(TEXTS[0], metadata["kalm_encoding"]), Passage(TEXTS[2], "kalm1.x")
    ranking = reranker.rank(QUERY, [stored, TEXTS[1], corrupt], top_k=2)
    span = spans.one()
    assert span.name == "kalm.rank"
    assert span.status.status_code is StatusCode.OK
    assert span.attributes["openinference.span.kind"] == "RERANKER"
    assert span.attributes["reranker.model_name"] == reranker.model_name
    assert span.attributes["reranker.query"] == span.attributes["input.value"] == QUERY
    assert span.attributes["reranker.top_k"] == 2
    assert span.attributes["kalm.passages"] == 3
    assert span.attributes["kalm.reranked"] is True
    assert counts(span) == {"stored": 1, "missing": 1, "corrupt": 1}
    assert returned(span) == [(passage.index, passage.score) for passage in ranking]


def test_no_text_of_a_passage_is_recorded_unless_it_is_asked_for(spans):
    FakeReranker().rank(QUERY, TEXTS)
    recorded = spans.one().to_json()
    assert not any(text in recorded for text in TEXTS)
    tracing.instrument(spans.provider, record_texts=True)
    best = FakeReranker().rank(QUERY, TEXTS)[0]
    attributes = spans.one().attributes
    assert [attributes[f"reranker.input_documents.{i}.document.content"] for i in range(3)] == TEXTS
    assert attributes["reranker.output_documents.0.document.content"] == TEXTS[best.index]


def test_inputs_and_outputs_are_hidden_as_openinference_hides_them(spans, monkeypatch):
    monkeypatch.setenv("OPENINFERENCE_HIDE_INPUTS", "true")
    monkeypatch.setenv("OPENINFERENCE_HIDE_OUTPUTS", "TRUE")
    tracing.instrument(spans.provider, record_texts=True)
    FakeReranker().rank(QUERY, TEXTS)
    span = spans.one()
    assert counts(span) == {"missing": 3}
    assert not any(hidden in span.to_json() for hidden in (QUERY, *TEXTS, "document.score"))
    tracing.instrument(spans.provider, hide_inputs=False, hide_outputs=False)
    FakeReranker().rank(QUERY, TEXTS)
    assert len(returned(shown := spans.one())) == 3
    assert shown.attributes["reranker.query"] == QUERY


@pytest.mark.parametrize("record_texts", [False, True])
def test_a_long_list_does_not_push_out_what_matters(spans, record_texts):
    tracing.instrument(spans.provider, record_texts=record_texts)
    FakeReranker().rank(QUERY, [f"passage {i}" for i in range(500)])
    span = spans.one()
    assert span.dropped_attributes == 0
    assert span.attributes["kalm.passages"] == 500
    assert len(returned(span)) == (tracing.MAX_DOCUMENTS_WITH_TEXTS if record_texts else tracing.MAX_DOCUMENTS)


def test_several_queries_together_are_one_span(spans):
    score_pairs(FakeReranker(), [("who?", TEXTS[0]), ("where?", TEXTS[0]), ("who?", TEXTS[1])])
    span = spans.one()
    assert span.name == "kalm.rank_many"
    assert (span.attributes["kalm.queries"], span.attributes["kalm.passages"]) == (2, 3)
    assert counts(span) == {"missing": 3}
    assert "who?" not in span.to_json()


# --- failures


@pytest.mark.parametrize("record_texts", [False, True])
def test_an_error_is_recorded_without_texts(spans, record_texts):
    tracing.instrument(spans.provider, record_texts=record_texts)
    with pytest.raises(PassError):
        Broken().rank(QUERY, TEXTS)
    span = spans.one()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "PassError")
    assert span.attributes["kalm.reranked"] is False
    assert [event.attributes["exception.type"] for event in span.events] == ["PassError"]
    assert (TEXTS[0] in span.to_json()) is record_texts


async def test_an_order_that_was_kept_is_marked(spans):
    assert not Broken().rank(QUERY, TEXTS, on_error="keep_order").reranked
    assert not (await Broken().arank(QUERY, TEXTS, on_error="keep_order")).reranked
    for span in spans.take():
        assert (span.status.description, span.attributes["kalm.reranked"]) == ("PassError", False)
        assert returned(span) == []


async def test_a_request_that_is_taken_back_says_so(spans):
    began = asyncio.Event()

    class Slow(FakeReranker):
        async def aanswer(self, request):
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(Slow().arank(QUERY, TEXTS))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert spans.one().status.description == "CancelledError"


# --- whose child


async def test_spans_are_children_of_their_callers(make_reranker, spans):
    reranker = make_reranker()

    async def in_task(name):
        with spans.tracer.start_as_current_span(name):
            await asyncio.sleep(0)
            await reranker.arank(name, TEXTS)

    def in_thread(name):
        with spans.tracer.start_as_current_span(name):
            reranker.rank(name, TEXTS)

    threads = [threading.Thread(target=in_thread, args=(f"thread {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(in_task(f"task {i}") for i in range(8)))
    for thread in threads:
        await asyncio.to_thread(thread.join)
    made = spans.take()
    callers = {span.context.span_id: span.name for span in made if span.name != "kalm.rank"}
    ranked = [span for span in made if span.name == "kalm.rank"]
    assert len(callers) == len(ranked) == 12
    assert all(callers[span.parent.span_id] == span.attributes["reranker.query"] for span in ranked)


def test_a_trace_goes_on_over_http(spans):
    with tracing.from_headers({"Traceparent": TRACEPARENT}):
        FakeReranker().rank(QUERY, TEXTS)
        assert tracing.headers()["traceparent"] == TRACEPARENT
    assert f"{(parent := spans.one().parent).trace_id:x}-{parent.span_id:x}" == TRACEPARENT[4:-3]
    with spans.tracer.start_as_current_span("by the web framework"), tracing.from_headers({"traceparent": TRACEPARENT}):
        FakeReranker().rank(QUERY, TEXTS)
    ranked, framework = spans.take()
    assert ranked.parent.span_id == framework.context.span_id
    with tracing.from_headers({"traceparent": "damaged"}):
        FakeReranker().rank(QUERY, TEXTS)
    assert spans.one().parent is None


def test_the_context_of_openinference_is_heeded(spans):
    token = attach(set_value("session.id", "a session"))
    FakeReranker().rank(QUERY, TEXTS)
    assert spans.one().attributes["session.id"] == "a session"
    detach(token)
    token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
    FakeReranker().rank(QUERY, TEXTS)
    detach(token)
    assert spans.take() == ()


# --- adapters


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
async def test_adapters_give_one_span_a_query_and_one_an_ingest(host, spans):
    fake = FakeReranker()
    documents = [host.document(f"id-{i}", text, {}) for i, text in enumerate(TEXTS)]
    stored = host.ingest(fake, documents[:2])
    span = spans.one()
    assert (span.name, span.attributes["openinference.span.kind"]) == ("kalm.encode", "EMBEDDING")
    assert (span.attributes["embedding.model_name"], span.attributes["kalm.passages"]) == ("FakeReranker", 2)
    await host.aencode(host.encoder(model=fake), stored)
    assert spans.take() == ()
    host.rerank(fake, QUERY, [*stored, documents[2]], 2)
    await host.arerank(fake, QUERY, [*stored, documents[2]], 2)
    for span in spans.take():
        assert (span.name, span.attributes["openinference.span.kind"]) == ("kalm.rank", "RERANKER")
        assert (span.attributes["kalm.passages"], span.attributes["reranker.top_k"]) == (3, 2)
        assert counts(span) == {"stored": 2, "missing": 1}
        assert len(returned(span)) == 2


def test_an_ingest_that_fails_is_recorded(spans):
    class Full(FakeReranker):
        def encode_to_metadata(self, texts, show_progress=False):
            msg = "full"
            raise CorruptEncodingError(msg)

    with pytest.raises(CorruptEncodingError):
        HOSTS[0].ingest(Full(), [HOSTS[0].document("a", "a", {})])
    assert spans.one().status.description == "CorruptEncodingError"


# --- off, and on in a process of its own


def test_nothing_is_recorded_or_imported_when_it_is_off(spans):
    tracing.uninstrument()
    FakeReranker().rank(QUERY, TEXTS)
    assert tracing.headers() == {}
    with tracing.from_headers({"traceparent": TRACEPARENT}):
        assert spans.take() == ()
    code = (
        "import sys; from kalm_integrations import tracing; from kalm_integrations.testing import FakeReranker; "
        "FakeReranker().rank('q', ['a']); tracing.headers(); "
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'openinference'))])"
    )
    assert run_python(code) == "[]"


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment or None
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("call", "hidden", "remedy"),
    [
        (tracing.instrument, "openinference.semconv", r'pip install "kalm-integrations\[telemetry\]"'),
        (tracing.instrument_with_otlp, "opentelemetry.sdk.trace.export", "pip install opentelemetry-exporter-otlp-proto-http"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, call, hidden, remedy):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(MissingExtraError, match=remedy):
        call()
    assert tracing._tracing is None


def test_spans_are_sent_by_otlp():
    code = (
        "from kalm_integrations import tracing; from kalm_integrations.testing import FakeReranker; "
        "tracing.instrument_with_otlp(); FakeReranker().rank('who?', ['a'])"
    )
    with collecting() as collector:
        run_python(code, **collector.environment)
    assert [span.name for span in collector.spans] == ["kalm.rank"]
    [sent] = collector.received
    [service] = [pair.value.string_value for pair in sent.resource.attributes if pair.key == "service.name"]
    assert service == "kalm"
