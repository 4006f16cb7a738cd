"""Encodings that were made elsewhere, into Haystack's stores and out again; and every document of a store, page by page."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from haystack import Document
from haystack.document_stores.in_memory import InMemoryDocumentStore
from tools.haystack_helpers import QUERY, STORES, TEXTS, AnyStore, MakeReranker, documents, embed, encoded, open_backend

from haystack_integrations.common.kalm import stores
from haystack_integrations.common.kalm.stores import access_to
from kalm_integrations.errors import SettingsError
from kalm_integrations.haystack import (
    BackfillReport,
    KalmDocumentEncoder,
    KalmRanker,
    LoadReport,
    Written,
    backfill,
    drop_encodings,
    fetch_from,
    load_encodings,
)
from kalm_integrations.hosting import filling
from kalm_integrations.hosting.stores import Label
from kalm_integrations.testing import FakeReranker

QUIET = {"progress_bar": False}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    backend = open_backend(request, tmp_path, request.param)
    store = backend.open()
    yield store
    backend.close(store)


def rows_of(given: list[Document]) -> list[dict[str, Any]]:
    """What `kalm encode` writes."""
    return [{"id": d.id, "text": d.content, **{key: d.meta[key] for key in ("kalm_encoding", "kalm_fp")}} for d in given]


def snapshot(store: Any) -> list[Document]:
    """All that a store has; in any store, what was taken away is null."""
    held = [replace(d, meta={k: v for k, v in d.meta.items() if v is not None}) for d in store.filter_documents()]
    return sorted(held, key=lambda document: document.id)


def lacking(store: Any, fingerprint: str, key: str = "kalm_fp") -> list[Any]:
    return list(access_to(store).find_ids(Label(key, fingerprint)))


def test_rows_are_loaded_by_id_and_dropped_again_and_nothing_else_changes(store: Any, make_reranker: MakeReranker) -> None:
    given = documents(*TEXTS, "Mostar", page=1)
    store.write_documents(given)
    before = snapshot(store)
    reranker = make_reranker()
    rows = rows_of(encoded(reranker, given))
    rows[0] |= rows_of(encoded(reranker, [replace(given[0], content="another text")]))[0]
    bad = [{"text": "no id"}, {**rows[1], "kalm_encoding": rows[1]["kalm_encoding"][:-9]}, {**rows[1], "kalm_fp": "other"}]
    all_rows = [*bad, *rows[:2], {**rows[1], "id": "gone"}, *rows[2:]]

    report = load_encodings(store, iter(all_rows), batch_size=3, **QUIET)
    assert report == LoadReport(n_written=3, n_present=0, n_gone=1, n_changed=1, n_bad=3, n_failed=0)
    report = load_encodings(store, all_rows, batch_size=3, **QUIET)
    assert report == LoadReport(n_written=0, n_present=3, n_gone=1, n_changed=1, n_bad=3, n_failed=0)
    fresh = make_reranker()
    loaded = [document for document in store.filter_documents() if document.id != given[0].id]
    KalmRanker(model=fresh, on_missing="error").run(query=QUERY, documents=loaded)
    assert fresh.stats.passages_encoded == 0
    assert fetch_from(store)(given) == [None, *(row["kalm_encoding"] for row in rows[1:])]
    assert lacking(store, fresh.fingerprint) == [given[0].id]

    assert drop_encodings(store, batch_size=3, **QUIET) == Written(n_written=3)
    assert drop_encodings(store, batch_size=3, **QUIET) == Written()
    assert snapshot(store) == before
    assert len(lacking(store, fresh.fingerprint)) == len(given)
    keys = {key for document in store.filter_documents() for key in document.meta}
    assert keys == ({"page", "kalm_encoding", "kalm_fp"} if isinstance(store, AnyStore) else {"page"})


@pytest.fixture
def crowded(store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store of 40 documents, whose pages are of 7."""
    for module in (filling, stores):
        monkeypatch.setattr(module, "PAGE_SIZE", 7)
    texts = [f"text {n}" for n in range(40)]
    given = [Document(content=text, meta={"page": n % 2}, embedding=embed(text)) for n, text in enumerate(texts)]
    store.write_documents(given)
    return store


@pytest.mark.parametrize("check_texts", [True, False])
def test_every_document_comes_once_while_backfill_writes(crowded: Any, check_texts: bool) -> None:
    """Those of a filter too."""
    odd = {"field": "meta.page", "operator": "==", "value": 1}
    settings = {"check_texts": check_texts, "batch_size": 3, **QUIET}
    first, second = (KalmDocumentEncoder(model=FakeReranker(name), progress_bar=False) for name in ("one", "another"))
    assert backfill(crowded, first, filters=odd, **settings) == BackfillReport(20, 20, 0)
    assert backfill(crowded, first, **settings) == BackfillReport(40 if check_texts else 20, 20, 0)
    assert backfill(crowded, second, **settings) == BackfillReport(40, 0, 40)
    assert second.reranker.stats.passages_encoded == 40


@pytest.mark.parametrize("check_texts", [True, False])
def test_no_document_is_skipped_when_others_delete_those_that_are_done(crowded: Any, check_texts: bool) -> None:
    fake = FakeReranker()
    encode, n_calls = fake.encode_to_metadata, iter(range(1, 99))

    def encode_and_delete(*arguments: Any, **settings: Any) -> Any:
        if next(n_calls) == 3:
            done = [document.id for document in crowded.filter_documents() if "kalm_fp" in document.meta]
            assert len(done) == 6
            crowded.delete_documents(done)
        return encode(*arguments, **settings)

    fake.encode_to_metadata = encode_and_delete  # type: ignore[method-assign]
    report = backfill(crowded, KalmDocumentEncoder(model=fake), check_texts=check_texts, batch_size=3, **QUIET)
    assert report == BackfillReport(40, 40, 0)
    assert ["kalm_fp" in document.meta for document in crowded.filter_documents()] == [True] * 34


def test_how_many_documents_there_are_is_known_beforehand(store: Any) -> None:
    store.write_documents(documents())
    assert operator.length_hint(access_to(store).find_ids(None)) == len(TEXTS)


def test_two_checkpoints_lie_side_by_side_and_one_is_dropped(store: Any, make_reranker: MakeReranker) -> None:
    reranker = make_reranker()
    given = encoded(reranker, [*documents(language="en"), *documents("Mostar", language="de")])
    store.write_documents(given)
    before = snapshot(store)
    assert load_encodings(store, rows_of(given), encoding_key="kalm_new", **QUIET).n_written == len(given)
    for document in store.filter_documents():
        assert document.meta["kalm_new"] == document.meta["kalm_encoding"]
        assert document.meta["kalm_new_fp"] == document.meta["kalm_fp"]
    assert lacking(store, reranker.fingerprint, "kalm_new_fp") == []
    english = {"field": "meta.language", "operator": "==", "value": "en"}
    assert drop_encodings(store, filters=english, encoding_key="kalm_new", **QUIET).n_written == len(given) - 1
    assert lacking(store, reranker.fingerprint) == []
    assert drop_encodings(store, encoding_key="kalm_new", **QUIET).n_written == 1
    assert snapshot(store) == before


def test_the_text_that_was_encoded_depends_on_the_layout(make_reranker: MakeReranker) -> None:
    store, given = InMemoryDocumentStore(), documents(title="Cities")
    store.write_documents(given)
    layout = {"meta_fields_to_embed": ["title"], "embedding_separator": ": "}
    rows = rows_of(KalmDocumentEncoder(model=make_reranker(), progress_bar=False, **layout).run(given)["documents"])
    assert load_encodings(store, rows, **QUIET).n_changed == len(rows)
    assert load_encodings(store, rows, meta_fields_to_embed=["title"], **QUIET).n_changed == len(rows)
    assert load_encodings(store, rows, **layout, **QUIET).n_written == len(rows)


def test_ids_may_be_numbers_and_have_another_name(store: Any, make_reranker: MakeReranker) -> None:
    """A table of a database has numbers where documents have texts."""
    given = [replace(document, id=str(n)) for n, document in enumerate(documents())]
    store.write_documents(given)
    rows = [{**row, "id": "none", "key": int(row["id"])} for row in rows_of(encoded(make_reranker(), given))]
    assert load_encodings(store, rows, id_field="key", **QUIET).n_written == len(rows)
    assert load_encodings(store, rows, id_field="key", **QUIET).n_present == len(rows)


def test_loading_shows_progress_and_refuses_what_cannot_work(
    capsys: pytest.CaptureFixture[str], make_reranker: MakeReranker
) -> None:
    store = InMemoryDocumentStore()
    store.write_documents(documents())
    rows = rows_of(encoded(make_reranker(), documents()))
    load_encodings(store, rows, **QUIET)
    assert capsys.readouterr().err == ""
    load_encodings(store, rows)
    drop_encodings(store)
    shown = capsys.readouterr().err
    assert "Loading: 100%" in shown
    assert "Dropping: 100%" in shown
    for function in (drop_encodings, lambda store, **settings: load_encodings(store, rows, **settings)):
        with pytest.raises(SettingsError, match="documents_per_second must be a positive number or None, but got 0"):
            function(store, documents_per_second=0)
        with pytest.raises(SettingsError, match="encoding_key must be"):
            function(store, encoding_key="kalm_fp")
        with pytest.raises(SettingsError, match="document_store must have update_by_filter"):
            function(object())
