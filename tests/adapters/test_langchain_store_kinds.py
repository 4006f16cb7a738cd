"""What is peculiar to one kind of store: where it keeps encodings, what it refuses, and what one has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_community.vectorstores import LanceDB
from langchain_core.documents import Document
from langchain_milvus import Milvus
from langchain_postgres import Column, PGEngine, PGVectorStore
from milvus_lite.server_manager import server_manager_instance
from sqlalchemy.ext.asyncio import create_async_engine
from tools.langchain_helpers import TEXTS, CountingEmbeddings, make_documents
from tools.langchain_stores import QUERY, WIDTH

from kalm_integrations import KalmReranker
from kalm_integrations.errors import EncodingTooLargeError, SettingsError
from kalm_integrations.langchain import (
    BackfillReport,
    KalmPassageEncoder,
    KalmRerank,
    backfill,
    drop_encodings,
    fetch_from,
    load_encodings,
    wait_for_write_back,
    write_back_to,
)
from kalm_integrations.testing import FakeReranker

IDS = [document.id for document in make_documents()]


@pytest.fixture
def embeddings() -> CountingEmbeddings:
    return CountingEmbeddings()


def encode(reranker: Any = None) -> list[Document]:
    return list(KalmPassageEncoder(model=reranker or FakeReranker()).transform_documents(make_documents()))


def fill(store: Any, count: int = len(TEXTS)) -> BackfillReport:
    report = backfill(store, KalmPassageEncoder(model=FakeReranker()), show_progress=False)
    assert report.n_checked == count
    return report


Open = Callable[..., PGVectorStore]


@pytest.fixture
def open_table(postgres_uri: str, embeddings: CountingEmbeddings) -> Iterator[Open]:
    """Makes a table with some columns and opens it; once more with other settings."""
    engine = PGEngine.from_connection_string(postgres_uri.replace("postgresql", "postgresql+psycopg", 1))
    tables: list[str] = []

    def make(columns: list[str] | None = None, id_type: str = "uuid", json: bool = False, **settings: Any) -> PGVectorStore:
        if columns is not None:
            tables.append(f"Kinds {uuid4().hex}")
            names, keys = [Column(name, "text") for name in columns], Column("langchain_id", id_type)
            engine.init_vectorstore_table(tables[-1], WIDTH, metadata_columns=names, id_column=keys, store_metadata=json)
            settings = {"metadata_columns": columns, **settings}
        return PGVectorStore.create_sync(engine, embeddings, tables[-1], **settings)

    yield make
    for table in tables:
        engine.drop_table(table)
    engine._run_as_sync(engine._pool.dispose())


def test_a_lean_pgvectorstore_is_written_to_and_read_from_by_itself(open_table: Open):
    """It leaves the column out of its searches; the table has it."""
    open_table(["source", "kalm_encoding", "kalm_fp"]).add_documents(make_documents(), ids=IDS)
    lean = open_table(ignore_metadata_columns=["kalm_encoding"])
    first = KalmRerank(model=FakeReranker(), fetch=fetch_from(lean), write_back=write_back_to(lean))
    first.compress_documents(lean.similarity_search(QUERY, k=2), QUERY)
    assert wait_for_write_back(10)
    assert fill(lean).n_missing == len(TEXTS) - 2
    hits = lean.similarity_search(QUERY, k=5)
    assert not any("kalm_encoding" in hit.metadata for hit in hits)
    reranker = FakeReranker()
    KalmRerank(model=reranker, fetch=fetch_from(lean)).compress_documents(hits, QUERY)
    assert reranker.stats.passages_encoded == 0


def test_a_table_that_has_no_place_for_encodings_is_refused_with_what_would_make_one(open_table: Open):
    store = open_table(["source", "kalm_fp"])
    with pytest.raises(SettingsError, match=r'has no kalm_encoding; alter table .* add column "kalm_encoding" text'):
        write_back_to(store)
    with pytest.raises(SettingsError, match="has no vec and no vec_fp"):
        load_encodings(store, [], encoding_key="vec")


def test_columns_and_json_share_a_documents_metadata(open_table: Open):
    """Here the encoding has a column and the fingerprint has not."""
    store = open_table(["kalm_encoding"], json=True)
    store.add_documents(make_documents(), ids=IDS)
    encoder = KalmPassageEncoder(model=FakeReranker())
    assert backfill(store, encoder, check_texts=False, show_progress=False).n_missing == len(TEXTS)
    assert backfill(store, encoder, check_texts=False, show_progress=False).n_checked == 0
    for hit, expected in zip(sorted_hits(store), sorted(encode(), key=lambda d: d.metadata["source"]), strict=True):
        assert hit.metadata == expected.metadata
    assert drop_encodings(store, show_progress=False).n_written == len(TEXTS)
    assert [hit.metadata for hit in sorted_hits(store)] == [
        {"source": f"page {i}", "kalm_encoding": None} for i in range(len(TEXTS))
    ]


def sorted_hits(store: Any) -> list[Document]:
    return sorted(store.similarity_search(QUERY, k=20), key=lambda hit: hit.metadata["source"])


def test_ids_of_a_table_may_be_numbers(open_table: Open, make_reranker: Callable[..., KalmReranker]):
    """Of rows to load they may be anything; what cannot be an id of the table is gone."""
    store = open_table(["source", "kalm_encoding", "kalm_fp"], id_type="bigint")
    store.add_documents(make_documents(), ids=list(range(7, 7 + len(TEXTS))))
    made = make_reranker().encode_to_metadata(TEXTS)
    rows = [{"id": i, **metadata} for i, metadata in zip((7, "8", "nine", 1000, 11), made, strict=True)]
    report = load_encodings(store, rows, show_progress=False)
    assert (report.n_written, report.n_gone) == (3, 2)
    assert backfill(store, KalmPassageEncoder(model=make_reranker()), show_progress=False) == BackfillReport(5, 2, 0)


def test_ids_that_are_no_uuids_are_gone_from_a_table_of_uuids(open_table: Open, make_reranker: Callable[..., KalmReranker]):
    store = open_table([], json=True)
    store.add_documents(make_documents(), ids=IDS)
    [made, *_] = make_reranker().encode_to_metadata(TEXTS)
    rows = [{"id": IDS[0].upper(), **made}, {"id": "p1", **made}]
    report = load_encodings(store, rows, show_progress=False)
    assert (report.n_written, report.n_gone) == (1, 1)


def test_an_engine_without_a_loop_is_refused(postgres_uri: str, open_table: Open, embeddings: CountingEmbeddings):
    store = open_table([], json=True)
    engine = PGEngine.from_engine(create_async_engine(postgres_uri.replace("postgresql", "postgresql+psycopg", 1)))
    store._engine = engine
    with pytest.raises(SettingsError, match="but got one without a loop"):
        write_back_to(store)


@pytest.fixture
def open_milvus(tmp_path: Path, embeddings: CountingEmbeddings) -> Iterator[Callable[..., Milvus]]:
    uri = str(tmp_path / "milvus.db")
    index = {"index_type": "FLAT", "metric_type": "L2"}
    yield lambda **settings: Milvus(embeddings, connection_args={"uri": uri}, index_params=index, **settings)
    server_manager_instance.release_server(uri)


def test_milvus_with_a_static_schema_keeps_encodings_in_fields_of_their_own(
    open_milvus: Callable[..., Milvus], caplog: pytest.LogCaptureFixture
):
    """They are empty where an encoding was taken away, because such a field takes no null, and hold 65,535 characters."""
    store = open_milvus()
    store.add_documents(encode(FakeReranker("old")), ids=IDS)
    encoder = KalmPassageEncoder(model=FakeReranker())
    assert backfill(store, encoder, check_texts=False, show_progress=False).n_stale == len(TEXTS)
    assert fill(store) == BackfillReport(5, 0, 0)
    assert drop_encodings(store, show_progress=False).n_written == len(TEXTS)
    assert [hit.metadata["kalm_encoding"] for hit in sorted_hits(store)] == [""] * len(TEXTS)
    assert fill(store).n_missing == len(TEXTS)
    [document, *_] = encode()
    document.metadata["kalm_encoding"] = "x" * 65_536
    write_back_to(store, id_of=lambda d: d.id)([document])
    assert "1 of 1 encodings were not written back: 1 failed" in caplog.text


def test_a_lean_milvus_store_fetches_the_field_that_it_leaves_out_of_searches(open_milvus: Callable[..., Milvus]):
    store = open_milvus()
    store.add_documents(encode(), ids=IDS)
    store.fields.remove("kalm_encoding")
    hits = store.similarity_search(QUERY, k=5)
    assert not any("kalm_encoding" in hit.metadata for hit in hits)
    reranker = FakeReranker()
    KalmRerank(model=reranker, fetch=fetch_from(store)).compress_documents(hits, QUERY)
    assert reranker.stats.passages_encoded == 0
    assert fill(store) == BackfillReport(5, 0, 0)


def test_milvus_is_refused_where_encodings_have_no_place_or_ids_change(open_milvus: Callable[..., Milvus]):
    static = open_milvus(collection_name="static")
    static.add_documents(make_documents(), ids=IDS)
    with pytest.raises(SettingsError, match="has no kalm_encoding and no kalm_fp; create it"):
        write_back_to(static)
    with pytest.raises(SettingsError, match="without auto_id=True"):
        backfill(open_milvus(collection_name="auto", auto_id=True), KalmPassageEncoder(model=FakeReranker()))
    with pytest.raises(SettingsError, match="without metadata_field"):
        drop_encodings(open_milvus(collection_name="json", metadata_field="meta"))


def test_a_milvus_collection_that_is_not_there_yet_is_empty(open_milvus: Callable[..., Milvus]):
    store = open_milvus(enable_dynamic_field=True)
    write_back = write_back_to(store)
    assert fill(store, 0) == BackfillReport(0, 0, 0)
    store.add_documents(make_documents(), ids=IDS)
    write_back(KalmPassageEncoder(model=FakeReranker()).transform_documents(store.similarity_search(QUERY, k=2)))
    assert fill(store).n_missing == len(TEXTS) - 2


def test_a_milvus_server_takes_less_than_milvus_lite_in_dynamic_fields(open_milvus: Callable[..., Milvus]):
    """All of them together; a file takes what it is given."""
    store = open_milvus(enable_dynamic_field=True)
    long = [Document("passage", metadata={"summary": "x" * 65_536})]
    assert KalmPassageEncoder(model=FakeReranker(), store=store).transform_documents(long)
    store._connection_args = {"uri": "http://localhost:19530"}
    with pytest.raises(EncodingTooLargeError, match="Milvus takes at most 65536 bytes of metadata"):
        KalmPassageEncoder(model=FakeReranker(), store=store).transform_documents(long)


def open_lancedb(folder: Path, embeddings: CountingEmbeddings, **settings: Any) -> LanceDB:
    return LanceDB(embedding=embeddings, uri=str(folder), mode="append", **settings)


def test_a_lancedb_table_without_fields_for_encodings_gets_columns_beside_its_metadata(
    tmp_path: Path, embeddings: CountingEmbeddings
):
    """Searches do not carry them: they are fetched. Documents may be added and filtered as before."""
    store = open_lancedb(tmp_path, embeddings)
    documents = [d.model_copy(update={"metadata": {**d.metadata, "id": d.id}}) for d in make_documents()]
    store.add_documents(documents[:3], ids=IDS[:3])
    n_embedded = embeddings.n_documents
    assert fill(store, 3).n_missing == 3
    assert embeddings.n_documents == n_embedded
    store.add_documents(documents[3:], ids=IDS[3:])
    encoder = KalmPassageEncoder(model=FakeReranker())
    assert backfill(store, encoder, check_texts=False, show_progress=False) == BackfillReport(2, 2, 0)
    hits = store.similarity_search(QUERY, k=5)
    assert [hit.metadata.keys() for hit in hits] == [{"source", "id"}] * 5
    [found] = store.similarity_search(QUERY, k=5, filter="metadata.source = 'page 1'", prefilter=True)
    assert found.page_content == TEXTS[1]
    reranker = FakeReranker()
    KalmRerank(model=reranker, fetch=fetch_from(store)).compress_documents(hits, QUERY)
    assert reranker.stats.passages_encoded == 0
    assert drop_encodings(store, show_progress=False).n_written == 5
    assert fill(store).n_missing == 5


def test_lancedb_with_names_of_ones_own_and_quotes_in_them(tmp_path: Path, embeddings: CountingEmbeddings):
    """In fields of the metadata, beside values of other types, which stay."""
    store = open_lancedb(tmp_path, embeddings, id_key="Page Id", text_key="Body")
    metadata = {"it's": "a 'quote'", "Pages": [1, 2], "inner": {"a.b": 1.5}}
    encoded = KalmPassageEncoder(model=FakeReranker("old")).transform_documents(
        [Document(text, metadata={**metadata, "Page Id": f"it's {i}"}) for i, text in enumerate(TEXTS)]
    )
    store.add_documents(encoded, ids=[f"it's {i}" for i in range(len(TEXTS))])
    assert fill(store).n_stale == len(TEXTS)
    assert drop_encodings(store, show_progress=False).n_written == len(TEXTS)
    write_back_to(store)(KalmPassageEncoder(model=FakeReranker()).transform_documents(store.similarity_search(QUERY, k=2)))
    assert fill(store).n_missing == len(TEXTS) - 2
    for hit in store.similarity_search(QUERY, k=5):
        kept = {key: value for key, value in hit.metadata.items() if not key.startswith("kalm_")}
        assert kept == {**metadata, "Page Id": kept["Page Id"]}


def test_a_lancedb_table_that_is_not_there_yet_is_empty(tmp_path: Path, embeddings: CountingEmbeddings):
    store = open_lancedb(tmp_path, embeddings)
    assert fill(store, 0) == BackfillReport(0, 0, 0)
    assert fetch_from(store)([Document("text", metadata={"id": "1"})]) == [None]
