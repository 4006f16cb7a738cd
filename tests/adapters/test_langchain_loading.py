"""Encodings that were made elsewhere, loaded into real LangChain stores and taken out of them, page by page."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from tools.langchain_helpers import TEXTS, CountingEmbeddings, make_documents
from tools.langchain_stores import KINDS, QUERY, VectorHost, open_host

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import Label, Written
from kalm_integrations.langchain import (
    BackfillReport,
    DocumentAccess,
    KalmPassageEncoder,
    KalmRerank,
    LoadReport,
    backfill,
    drop_encodings,
    fetch_from,
    load_encodings,
    store_kinds,
)
from kalm_integrations.langchain.stores import access_to
from kalm_integrations.testing import FakeReranker

SECOND = "kalm_encoding_2"
Row = dict[str, Any]


@pytest.fixture
def embeddings() -> CountingEmbeddings:
    return CountingEmbeddings()


@pytest.fixture(params=KINDS)
def host(request: pytest.FixtureRequest, embeddings: CountingEmbeddings, tmp_path: Path) -> Iterator[VectorHost]:
    """Each store in turn, empty."""
    with open_host(request.param, embeddings, tmp_path, lambda: request.getfixturevalue("postgres_uri")) as host:
        yield host


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pages of three ids, in every kind of store."""
    for kind in ("chroma", "postgres", "milvus", "lancedb"):
        monkeypatch.setattr(getattr(store_kinds, kind), "PAGE_SIZE", 3)
    monkeypatch.setattr("kalm_integrations.hosting.qdrant.PAGE_SIZE", 3)
    monkeypatch.setattr("kalm_integrations.hosting.filling.PAGE_SIZE", 3)
    for kind in (store_kinds.lancedb, store_kinds.memory):
        monkeypatch.setattr(kind, "_READ_BATCH", 3)
    return 3


def many(count: int) -> list[Document]:
    return make_documents([f"passage {i}" for i in range(count)])


@pytest.fixture
def reranker(make_reranker: Callable[..., KalmReranker]) -> KalmReranker:
    return make_reranker()


@pytest.fixture
def other(make_reranker: Callable[..., KalmReranker], other_checkpoint: Path) -> KalmReranker:
    """Of another checkpoint."""
    return make_reranker(other_checkpoint)


def encoded(documents: list[Document], reranker: KalmReranker) -> list[Row]:
    """Rows as `kalm encode` writes them."""
    made = reranker.encode_to_metadata([document.page_content for document in documents])
    return [{"id": document.id, "text": document.page_content, **m} for document, m in zip(documents, made, strict=True)]


def seen(host: VectorHost) -> dict[str, tuple[Any, Any]]:
    """What encodings shall not change: text and owner of each document, and its score, which depends on its vector."""
    if not hasattr(host.store, "similarity_search_with_score"):
        return {d.page_content: (d.metadata["source"], None) for d in host.retrieve()}
    hits = host.store.similarity_search_with_score(QUERY, k=20)
    return {hit.page_content: (hit.metadata["source"], round(score, 5)) for hit, score in hits}


def n_unencoded(host: VectorHost, reranker: KalmReranker, key: str = "kalm_encoding") -> int:
    return len(reranker.find_unencoded([Passage(d.page_content, d.metadata.get(key)) for d in host.retrieve()]))


def load(host: VectorHost, rows: list[Row], **settings: Any) -> LoadReport:
    return load_encodings(host.store, rows, show_progress=False, **settings)


def drop(host: VectorHost, **settings: Any) -> Written:
    return drop_encodings(host.store, show_progress=False, **settings)


def test_loading_writes_what_is_sound_and_of_the_stores_text(
    host: VectorHost, embeddings: CountingEmbeddings, reranker: KalmReranker, make_reranker: Callable[..., KalmReranker]
):
    """Everything else is counted, and nothing but the two keys changes."""
    documents = make_documents()
    host.add(documents)
    before, n_embedded = seen(host), embeddings.n_documents
    gone = Document("gone", id="1b4e28ba-2fa1-11d2-883f-0016d3cca427")
    rewritten = documents[4].model_copy(update={"page_content": "another text"})
    rows = encoded([*documents[:3], gone, rewritten], reranker)
    row = encoded(documents[3:4], reranker)[0]
    bad = [
        {key: value for key, value in row.items() if key != "id"},
        {**row, "kalm_encoding": row["kalm_encoding"][:-4]},
        {**row, "kalm_encoding": None},
        {**row, "kalm_fp": "another"},
    ]
    assert load(host, [*rows, *bad], batch_size=2) == LoadReport(3, 0, 1, 1, 4, 0)
    assert load(host, rows) == LoadReport(0, 3, 1, 1, 0, 0)
    host.restart()

    fresh = make_reranker()
    KalmRerank(model=fresh).compress_documents(host.retrieve(), QUERY)
    assert (fresh.stats.metadata_hits, fresh.stats.passages_encoded) == (3, 2)
    assert seen(host) == before
    assert embeddings.n_documents == n_embedded


def test_loading_and_backfill_find_each_others_work(host: VectorHost, make_reranker: Callable[..., KalmReranker]):
    documents = make_documents()
    host.add(documents)
    rows, reranker = encoded(documents, make_reranker()), make_reranker()
    load(host, rows[:3])
    encoder = KalmPassageEncoder(model=reranker)
    assert backfill(host.store, encoder, check_texts=False, show_progress=False) == BackfillReport(2, 2, 0)
    report = load(host, rows)
    # Those of another batch may differ in their last bits, and then the ones that are loaded last count.
    assert (report.n_written + report.n_present, report.n_present >= 3) == (5, True)
    assert backfill(host.store, encoder, show_progress=False) == BackfillReport(5, 0, 0)
    assert reranker.stats.passages_encoded == 2


def test_loading_replaces_encodings_of_another_checkpoint(host: VectorHost, reranker: KalmReranker, other: KalmReranker):
    """And back: the last rows count."""
    documents = make_documents()
    host.add(documents)
    old, new = encoded(documents, other), encoded(documents, reranker)
    for rows, n_left in ((new, 0), (old, 5), (new, 0)):
        assert load(host, rows).n_written == 5
        assert n_unencoded(host, reranker) == n_left


def test_encodings_of_two_checkpoints_are_loaded_and_dropped_apart(
    host: VectorHost, reranker: KalmReranker, other: KalmReranker
):
    documents = make_documents()
    host.add(documents)
    before = seen(host)
    load(host, encoded(documents, other))
    assert load(host, encoded(documents, reranker), encoding_key=SECOND) == LoadReport(5, 0, 0, 0, 0, 0)
    assert n_unencoded(host, other) == 0
    assert fetched(host, SECOND) == [row["kalm_encoding"] for row in encoded(documents, reranker)]
    assert drop(host) == Written(5)
    assert fetched(host, "kalm_encoding") == [None] * 5
    assert fetched(host, SECOND) == [row["kalm_encoding"] for row in encoded(documents, reranker)]
    assert seen(host) == before


def fetched(host: VectorHost, key: str) -> list[Any]:
    return [value or None for value in fetch_from(host.store, encoding_key=key, id_of=lambda d: d.id)(make_documents())]


def test_dropping_leaves_a_store_as_it_was_and_what_was_dropped_can_be_loaded_again(
    host: VectorHost, embeddings: CountingEmbeddings, small_pages: int, reranker: KalmReranker
):
    documents = make_documents()
    host.add(documents)
    before, n_embedded = seen(host), embeddings.n_documents
    load(host, encoded(documents[:4], reranker))
    assert drop(host, batch_size=2) == Written(4)
    assert drop(host) == Written()
    host.restart()
    for document in host.retrieve():
        assert not any(document.metadata.get(key) for key in ("kalm_encoding", "kalm_fp"))
    assert seen(host) == before
    assert load(host, encoded(documents, reranker)) == LoadReport(5, 0, 0, 0, 0, 0)
    assert n_unencoded(host, reranker) == 0
    assert embeddings.n_documents == n_embedded


@pytest.mark.parametrize("labelled", [True, False], ids=["without a label", "all"])
def test_every_id_comes_once_while_labels_are_written(host: VectorHost, small_pages: int, labelled: bool):
    documents = many(14)
    host.add(documents)
    access, label = access_to(host.store), Label("kalm_fp", "f")
    access.add_metadata({documents[i].id: {"kalm_fp": "f"} for i in (1, 7)})
    ids = []
    for i in access.find_ids(label if labelled else None):
        ids.append(i)
        access.add_metadata({i: {"kalm_fp": "f"}})
    expected = [document.id for n, document in enumerate(documents) if not labelled or n not in (1, 7)]
    assert sorted(ids) == sorted(expected)
    assert list(access.find_ids(label)) == []


def test_what_others_add_and_delete_hides_no_id(host: VectorHost, small_pages: int):
    documents = many(16)
    host.add(documents[:14])
    access = access_to(host.store)
    iterator = iter(access.find_ids(None))
    ids = [next(iterator)]
    gone = {documents[n].id for n in (0, 1, 6, 13)}
    host.delete(sorted(gone))
    host.add(documents[14:])
    ids += iterator
    added = {document.id for document in documents[14:]}
    assert sorted(set(ids) - gone - added) == sorted(d.id for d in documents[:14] if d.id not in gone)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["chroma", "postgres"])
def test_a_backfill_holds_few_documents_at_a_time(
    name: str, request: pytest.FixtureRequest, embeddings: CountingEmbeddings, tmp_path: Path
):
    """Of thousands: those of a batch and of the one before, as read for encoding and as read again for writing."""
    with open_host(name, embeddings, tmp_path, lambda: request.getfixturevalue("postgres_uri")) as host:
        host.add(many(2200))
        access = Watched(access_to(host.store))
        encoder = KalmPassageEncoder(model=FakeReranker())
        report = backfill(access, encoder, batch_size=50, show_progress=False)
        assert report == BackfillReport(2200, 2200, 0)
        assert access.most_alive <= 200
        assert backfill(host.store, encoder, check_texts=False, show_progress=False) == BackfillReport(0, 0, 0)


class Watched:
    """Counts documents that were read and are still held."""

    def __init__(self, access: DocumentAccess) -> None:
        self._access = access
        self._alive = self.most_alive = 0
        self.find_ids, self.id_of, self.add_metadata = access.find_ids, access.id_of, access.add_metadata

    def read(self, ids: Any) -> dict[Any, Document]:
        held = self._access.read(ids)
        for document in held.values():
            weakref.finalize(document, self._forget)
        self._alive += len(held)
        self.most_alive = max(self.most_alive, self._alive)
        return held

    def _forget(self) -> None:
        self._alive -= 1


def test_numbers_are_taken_for_their_digits_and_another_field_may_have_the_id(
    embeddings: CountingEmbeddings, reranker: KalmReranker
):
    store = InMemoryVectorStore(embeddings)
    store.add_documents(make_documents(), ids=[str(n) for n in range(len(TEXTS))])
    rows = [{**row, "page": n} for n, row in enumerate(encoded(make_documents(), reranker))]
    assert load_encodings(store, rows, id_field="page", show_progress=False) == LoadReport(5, 0, 0, 0, 0, 0)


def test_bad_settings_are_refused_before_any_work(embeddings: CountingEmbeddings):
    store = InMemoryVectorStore(embeddings)
    encoder = KalmPassageEncoder(model=FakeReranker())
    with pytest.raises(SettingsError, match="documents_per_second must be a positive number or None"):
        load_encodings(store, [], documents_per_second=0)
    with pytest.raises(SettingsError, match="documents_per_second"):
        backfill(store, encoder, documents_per_second=-1.0)
    with pytest.raises(SettingsError, match="batch_size"):
        drop_encodings(store, batch_size=0)
    with pytest.raises(SettingsError, match="encoding_key"):
        load_encodings(store, [], encoding_key="kalm_fp")
    with pytest.raises(SettingsError, match="store must be"):
        drop_encodings({})


def test_progress_bars(embeddings: CountingEmbeddings, reranker: KalmReranker, capsys: pytest.CaptureFixture[str]):
    store = InMemoryVectorStore(embeddings)
    store.add_documents(make_documents())
    load_encodings(store, encoded(make_documents(), reranker))
    drop_encodings(store)
    shown = capsys.readouterr().err
    assert "Loading: 100%" in shown
    assert "Dropping: 100%" in shown
