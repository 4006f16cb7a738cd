"""Spans of the service: part of the trace of whoever asks."""

from __future__ import annotations

import pytest
from tools.spans import recording
from typer.testing import CliRunner

from kalm_integrations.cli import app as cli
from kalm_integrations.errors import MissingExtraError
from kalm_integrations.serving import running

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans():
    with recording() as spans:
        yield spans


def test_spans_of_requests_belong_to_the_sender_s_trace(make_client, spans):
    client = make_client()
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    client.post("/v2/rerank", json={"query": "who?", "documents": ["a", "b"], "model": "fake"}, headers=headers)
    client.post("/v1/encodings", json={"texts": ["a"]}, headers=headers)
    client.post("/rerank", json={"query": "who?", "texts": ["a"]})
    ranked, encoded, alone = spans.take()
    assert [ranked.name, encoded.name, alone.name] == ["kalm.rank", "kalm.encode", "kalm.rank"]
    assert ranked.attributes["kalm.encodings.missing"] == 2
    for span in (ranked, encoded):
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    assert alone.parent is None


def test_a_service_that_cannot_send_spans_does_not_start(monkeypatch):
    def lacking():
        msg = "spans are sent by an exporter"
        raise MissingExtraError(msg)

    monkeypatch.setattr(running, "instrument_with_otlp", lacking)
    # What is logged after this test would go to the stream of the command.
    monkeypatch.setattr(running, "configure_logging", lambda level: None)
    done = CliRunner().invoke(cli, ["serve", "--traces", "--port", "0"])
    assert done.exit_code != 0
    assert "spans are sent by an exporter" in done.output
