"""The client and `kalm serve` as a process of its own: stopped and started anew, with a key, busy and hung up on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tools.services import in_process, kalm_serve, number

from kalm_integrations import KalmReranker, Passage, RemoteReranker
from kalm_integrations.errors import DeadlineExceededError, SettingsError
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings

QUERY = "who won the super bowl?"
TEXTS = ["The Panthers defense gave up 308 points.", "Lift and drag of a wing.", "Denver won Super Bowl 50."]


def test_a_service_that_was_started_anew_finds_what_it_encoded(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Its store has what the first one was sent as texts, by ingest and by queries."""
    store, local = tmp_path / "store", KalmReranker.from_pretrained(tiny_checkpoint)
    arguments = ("--model", tiny_checkpoint, "--store", store, "--api-key-env", "TEST_KEY")
    expected = local.rank(QUERY, TEXTS)
    with kalm_serve(tmp_path, *arguments, TEST_KEY="hunter2") as running:
        with pytest.raises(SettingsError, match="401"):
            RemoteReranker(running.url).warm_up()
        remote = RemoteReranker(running.url, api_key="hunter2")
        assert remote.encode_to_metadata(TEXTS[:2]) == local.encode_to_metadata(TEXTS[:2])
        ranking = remote.rank(QUERY, TEXTS)
        assert [place.index for place in ranking] == [place.index for place in expected]
        assert list(ranking.reading) == ["found", "found", "missing"]
        assert remote.fingerprint == local.fingerprint
        running.process.terminate()
        running.process.wait(60)
    with kalm_serve(tmp_path, *arguments, TEST_KEY="hunter2") as running:
        remote = RemoteReranker(running.url, api_key="hunter2")
        ranking = asyncio.run(remote.arank(QUERY, TEXTS))
        assert [place.score for place in ranking] == pytest.approx([place.score for place in expected], abs=1e-6)
        assert list(ranking.reading) == ["found"] * 3
        assert (remote.stats.store_hits, remote.stats.passages_encoded, ranking.made) == (3, 0, {})
        assert list(remote.read(TEXTS)) == ["cached"] * 3


def test_encodings_that_came_with_documents_travel_once(make_reranker) -> None:
    behind = make_reranker()
    made = make_reranker().encode_to_metadata(TEXTS)
    given = [Passage(text, metadata["kalm_encoding"]) for text, metadata in zip(TEXTS, made, strict=True)]
    with in_process(create_app(ServiceSettings.make(model="tiny"), lambda _: behind)) as url:
        remote = RemoteReranker(url)
        expected = make_reranker().rank(QUERY, given)
        assert [remote.rank(QUERY, given).counts["stored"] for _ in range(3)] == [3, 3, 3]
        assert [place.index for place in remote.rank(QUERY, given)] == [place.index for place in expected]
        assert number(url, "kalm_passages_encoded_total") == 0
        # Four queries, of which the first was asked a second time with what it had.
        assert number(url, "kalm_requests_total", endpoint="/v1/score") == 5


def test_a_service_that_takes_too_long_says_so(make_reranker) -> None:
    with in_process(create_app(ServiceSettings.make(model="tiny", timeout=1e-6), lambda _: make_reranker())) as url:
        with pytest.raises(DeadlineExceededError, match="504"):
            RemoteReranker(url).rank(QUERY, TEXTS)
        ranking = RemoteReranker(url).rank(QUERY, TEXTS, on_error="keep_order")
        assert not ranking.reranked


def test_what_the_service_does_not_take_is_a_mistake_of_the_caller(make_reranker) -> None:
    settings = ServiceSettings.make(model="tiny", max_documents=2, max_body_bytes=1000)
    with in_process(create_app(settings, lambda _: make_reranker())) as url:
        with pytest.raises(SettingsError, match=r"413.*at most 2 texts, but holds 3"):
            RemoteReranker(url).rank(QUERY, TEXTS)
        with pytest.raises(SettingsError, match=r"413.*at most 1,?000 bytes"):
            RemoteReranker(url).rank(QUERY * 100, TEXTS[:1])
