"""Backfill of Haystack's stores: what is encoded, what is not, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from haystack import Document
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.document_stores.chroma import ChromaDocumentStore
from tools.haystack_helpers import (
    STORES,
    Backend,
    MakeReranker,
    assert_all_stored,
    by_text,
    documents,
    embed,
    encoded,
    open_backend,
)

from kalm_integrations.errors import SettingsError
from kalm_integrations.haystack import BackfillReport, KalmDocumentEncoder, backfill
from kalm_integrations.testing import FakeReranker


@pytest.fixture(params=STORES)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return open_backend(request, tmp_path, request.param)


@pytest.fixture
def store(backend: Backend) -> Iterator[Any]:
    store = backend.open()
    yield store
    backend.close(store)


class TestBackfill:
    def test_missing_and_stale_documents_are_encoded(
        self, store: Any, make_reranker: MakeReranker, other_checkpoint: Path
    ) -> None:
        """A second run has nothing to do; who believes `kalm_fp` fetches only documents without the current one."""
        missing, stale, current = documents("missing"), documents("stale"), documents("current")
        stale = encoded(make_reranker(other_checkpoint), stale)
        store.write_documents([*missing, *stale, *encoded(make_reranker(), current)])
        encoder = KalmDocumentEncoder(model=make_reranker(), progress_bar=False)
        believing = {"check_texts": False, "progress_bar": False}
        assert backfill(store, encoder, **believing) == BackfillReport(n_checked=2, n_missing=1, n_stale=1)
        assert backfill(store, encoder, **believing) == BackfillReport(0, 0, 0)
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(3, 0, 0)
        assert_all_stored(store, make_reranker(), ["missing", "stale", "current"])

    def test_filters_restrict_the_work(self, store: Any, make_reranker: MakeReranker) -> None:
        store.write_documents([*documents("a", language="en"), *documents("b", language="de")])
        encoder = KalmDocumentEncoder(model=make_reranker(), progress_bar=False)
        english = {"field": "meta.language", "operator": "==", "value": "en"}
        assert backfill(store, encoder, filters=english, progress_bar=False).n_missing == 1
        assert backfill(store, encoder, filters=english, progress_bar=False).n_checked == 1
        assert backfill(store, encoder, filters=english, check_texts=False, progress_bar=False).n_checked == 0
        assert "kalm_fp" not in by_text(store.filter_documents())["b"].meta

    def test_metadata_that_claim_too_much_are_found(self, store: Any, make_reranker: MakeReranker) -> None:
        """The current fingerprint beside an encoding of another text, or beside none, unless it is to be believed."""
        stale = [replace(document, content="new text") for document in encoded(make_reranker(), documents("old text"))]
        bare = documents("bare", kalm_fp=make_reranker().fingerprint)
        store.write_documents([*stale, *bare, *encoded(make_reranker(), documents("valid"))])
        encoder = KalmDocumentEncoder(model=make_reranker(), progress_bar=False)
        assert backfill(store, encoder, check_texts=False, progress_bar=False).n_checked == 0
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(n_checked=3, n_missing=1, n_stale=1)
        assert_all_stored(store, make_reranker(), ["new text", "bare", "valid"])

    def test_documents_without_content_are_encoded(self, store: Any) -> None:
        """Their passage is their meta fields; Chroma holds no such documents."""
        store.write_documents([Document(id="image", content=None, meta={"title": "A map"}, embedding=embed("map"))])
        encoder = KalmDocumentEncoder(model=FakeReranker(), meta_fields_to_embed=["title"], progress_bar=False)
        n_held = store.count_documents()
        assert n_held == (0 if isinstance(store, ChromaDocumentStore) else 1)
        assert backfill(store, encoder, progress_bar=False).n_missing == n_held
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(n_held, 0, 0)

    def test_it_goes_in_batches_under_one_bar(self, make_reranker: MakeReranker, capsys: pytest.CaptureFixture[str]) -> None:
        store = InMemoryDocumentStore()
        store.write_documents([Document(content=f"text {n}") for n in range(5)])
        encoder = KalmDocumentEncoder(model=make_reranker())
        assert backfill(store, encoder, batch_size=2).n_missing == 5
        shown = capsys.readouterr().err
        assert "5/5" in shown
        assert "2/2" not in shown

    def test_a_failing_store_is_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        class Failing(InMemoryDocumentStore):
            def update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
                if filters["value"] == "bad":
                    msg = "disk full"
                    raise OSError(msg)
                return super().update_by_filter(filters, meta)

        store = Failing()
        store.write_documents([Document(id="bad", content="a"), Document(id="good", content="b")])
        encoder = KalmDocumentEncoder(model=FakeReranker(), progress_bar=False)
        assert backfill(store, encoder, progress_bar=False) == BackfillReport(n_checked=2, n_missing=2, n_stale=0, n_failed=1)
        assert "a store did not take 1 of 2 encodings, the first being that of bad" in caplog.text
        assert "disk full" in caplog.text

    def test_what_cannot_work_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="must have update_by_filter"):
            backfill(object(), KalmDocumentEncoder(model=FakeReranker()))
        with pytest.raises(SettingsError, match="batch_size must be a positive whole number, but got 0"):
            backfill(InMemoryDocumentStore(), KalmDocumentEncoder(model=FakeReranker()), batch_size=0)
