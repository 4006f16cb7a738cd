"""Encodings in real LangChain stores: kept, read after a restart, written back and backfilled without embedding again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_chroma import Chroma
from langchain_classic.retrievers import ParentDocumentRetriever
from langchain_classic.storage import LocalFileStore, create_kv_docstore
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.stores import InMemoryByteStore, InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_postgres import PGVector
from langchain_qdrant import QdrantVectorStore
from langchain_text_splitters import CharacterTextSplitter
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams
from tools.langchain_helpers import TEXTS, CountingEmbeddings, make_documents

from kalm_integrations import KalmReranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import Label
from kalm_integrations.langchain import (
    BackfillReport,
    ByteStorePayloads,
    DocumentAccess,
    KalmPassageEncoder,
    KalmRerank,
    backfill,
    kalm_key_encoder,
    wait_for_write_back,
    write_back_to,
)
from kalm_integrations.langchain.stores import access_to
from kalm_integrations.testing import FakeReranker

QUERY = "what did the Panthers do"


class VectorHost:
    """A vector store that can be closed and opened again."""

    def __init__(self, embeddings: CountingEmbeddings) -> None:
        self.embeddings = embeddings
        self.store: Any = None
        self.open()

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def drop(self) -> None:
        self.close()

    def restart(self) -> None:
        self.close()
        self.open()

    def add(self, documents: list[Document]) -> None:
        self.store.add_documents(documents, ids=[document.id for document in documents])

    def delete(self, ids: list[str | None]) -> None:
        self.store.delete(ids=ids)

    def retrieve(self, k: int = 20) -> list[Document]:
        return self.store.similarity_search(QUERY, k=k)


class ChromaHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = folder
        super().__init__(embeddings)

    def open(self) -> None:
        self.store = Chroma("kalm", self.embeddings, persist_directory=str(self.folder))


class QdrantHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = folder
        super().__init__(embeddings)

    def open(self) -> None:
        self.client = QdrantClient(path=str(self.folder))
        if not self.client.collection_exists("kalm"):
            self.client.create_collection("kalm", vectors_config=VectorParams(size=16, distance=Distance.COSINE))
        self.store = QdrantVectorStore(self.client, "kalm", self.embeddings, validate_collection_config=False)

    def close(self) -> None:
        self.client.close()


class PostgresHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, uri: str) -> None:
        self.uri = uri.replace("postgresql://", "postgresql+psycopg://")
        self.collection = f"langchain-{uuid4()}"
        super().__init__(embeddings)

    def open(self) -> None:
        self.store = PGVector(self.embeddings, connection=self.uri, collection_name=self.collection)

    def close(self) -> None:
        self.store._engine.dispose()

    def drop(self) -> None:
        # Ids are unique across the collections of a database.
        self.store.delete_collection()
        self.close()


class FaissHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = str(folder)
        super().__init__(embeddings)

    def open(self) -> None:
        if Path(self.folder).exists():
            self.store = FAISS.load_local(self.folder, self.embeddings, allow_dangerous_deserialization=True)

    def close(self) -> None:
        self.store.save_local(self.folder)

    def add(self, documents: list[Document]) -> None:
        if self.store is None:
            self.store = FAISS.from_documents(documents, self.embeddings, ids=[document.id for document in documents])
        else:
            super().add(documents)


class InMemoryHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.file = str(folder / "store.json")
        super().__init__(embeddings)

    def open(self) -> None:
        exists = Path(self.file).exists()
        self.store = InMemoryVectorStore.load(self.file, self.embeddings) if exists else InMemoryVectorStore(self.embeddings)

    def close(self) -> None:
        self.store.dump(self.file)


class DocstoreHost(VectorHost):
    """Not a vector store: a key-value docstore on disk, whose keys are the documents' ids."""

    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = folder
        super().__init__(embeddings)

    def open(self) -> None:
        self.store = create_kv_docstore(LocalFileStore(self.folder))

    def add(self, documents: list[Document]) -> None:
        self.store.mset([(str(document.id), document) for document in documents])

    def delete(self, ids: list[str | None]) -> None:
        self.store.mdelete(ids)

    def retrieve(self, k: int = 20) -> list[Document]:
        return self.store.mget(sorted(self.store.yield_keys()))[:k]


@pytest.fixture
def embeddings() -> CountingEmbeddings:
    return CountingEmbeddings()


@pytest.fixture(params=["chroma", "qdrant", "postgres", "faiss", "in_memory", "docstore"])
def host(request: pytest.FixtureRequest, embeddings: CountingEmbeddings, tmp_path: Path) -> Iterator[VectorHost]:
    """Each store in turn, empty."""
    if request.param == "postgres":
        made: VectorHost = PostgresHost(embeddings, request.getfixturevalue("postgres_uri"))
    elif request.param == "in_memory":
        made = InMemoryHost(embeddings, tmp_path)
    else:
        kinds = {"chroma": ChromaHost, "qdrant": QdrantHost, "faiss": FaissHost, "docstore": DocstoreHost}
        made = kinds[request.param](embeddings, tmp_path / "store")
    yield made
    made.drop()


def sources(documents: list[Document]) -> dict[str, str]:
    return {document.page_content: document.metadata["source"] for document in documents}


def ranking(documents: list[Document]) -> list[tuple[str, float]]:
    return [(document.page_content, document.metadata["relevance_score"]) for document in documents]


def test_encodings_survive_a_restart_of_every_store(host: VectorHost, make_reranker: Callable[..., KalmReranker]):
    """Ingest, restart, query: nothing is encoded, and fp32 encodings give the scores of fresh ones."""
    settings = {"storage_codec": "fp32", "compression_ratio": 1}
    # The last one has an encoding of over 100,000 characters.
    documents = make_documents([*TEXTS, "a long passage about wings " * 60])
    host.add(KalmPassageEncoder(model=make_reranker(**settings)).transform_documents(documents))
    host.restart()

    retrieved = host.retrieve()
    fresh = make_reranker(**settings)
    result = KalmRerank(model=fresh, top_n=None).compress_documents(retrieved, QUERY)

    assert max(len(document.metadata["kalm_encoding"]) for document in retrieved) > 100_000
    assert fresh.stats.passages_encoded == 0
    assert fresh.stats.metadata_hits == len(documents)
    order = {document.page_content: i for i, document in enumerate(retrieved)}
    expected = make_reranker(**settings).rank(QUERY, [document.page_content for document in retrieved])
    assert [order[document.page_content] for document in result] == [passage.index for passage in expected]
    assert [document.metadata["relevance_score"] for document in result] == pytest.approx(
        [p.score for p in expected], abs=1e-6
    )


def test_write_back_makes_the_next_process_encode_nothing(host: VectorHost, embeddings: CountingEmbeddings):
    documents = make_documents()
    host.add(documents)
    n_embedded = embeddings.n_documents
    first = FakeReranker()
    rerank = KalmRerank(model=first, top_n=2, write_back=write_back_to(host.store))

    before = rerank.compress_documents(host.retrieve(), QUERY)
    assert wait_for_write_back(10)
    assert first.stats.passages_encoded >= len(documents)
    host.restart()

    second = FakeReranker()
    after = KalmRerank(model=second, top_n=2).compress_documents(host.retrieve(), QUERY)
    assert second.stats.passages_encoded == 0
    assert ranking(after) == ranking(before)
    assert sources(host.retrieve()) == sources(documents)
    assert embeddings.n_documents == n_embedded


def test_write_back_leaves_the_retrieved_documents_as_they_are(host: VectorHost):
    """Some stores hand out the very objects they hold."""
    host.add(make_documents())
    retrieved = host.retrieve()
    KalmRerank(model=FakeReranker(), write_back=write_back_to(host.store)).compress_documents(retrieved, QUERY)
    assert wait_for_write_back(10)
    assert not any("kalm_encoding" in document.metadata for document in retrieved)
    assert all("kalm_encoding" in document.metadata for document in host.retrieve())


def test_write_back_passes_over_documents_that_are_gone_or_have_no_id(host: VectorHost, caplog: pytest.LogCaptureFixture):
    documents = make_documents()
    host.add(documents)
    gone, nameless = Document("gone", id=str(uuid4())), Document("nameless")
    encoded = KalmPassageEncoder(model=FakeReranker()).transform_documents([*host.retrieve(), gone, nameless])

    write_back_to(host.store)([*encoded, encoded[0]])

    assert "2 of 7 encodings were not written back: 1 gone, 1 have no id" in caplog.text
    held = host.retrieve()
    assert sorted(document.page_content for document in held) == sorted(TEXTS)
    assert all("kalm_encoding" in document.metadata for document in held)


def test_backfill_encodes_what_is_missing_or_stale(host: VectorHost, embeddings: CountingEmbeddings):
    """Counts are right, nothing is embedded, everything else stays, and a second run finds nothing."""
    current, stale, missing = make_documents()[:2], make_documents()[2:3], make_documents()[3:]
    reranker = FakeReranker()
    host.add(KalmPassageEncoder(model=reranker).transform_documents(current))
    host.add(KalmPassageEncoder(model=FakeReranker("old")).transform_documents(stale))
    host.add(missing)
    n_embedded = embeddings.n_documents

    encoder = KalmPassageEncoder(model=reranker)
    report = backfill(host.store, encoder, batch_size=2, show_progress=False)
    assert report == BackfillReport(n_checked=5, n_missing=2, n_stale=1)
    assert backfill(host.store, encoder, show_progress=False) == BackfillReport(5, 0, 0)
    assert reranker.stats.passages_encoded == len(TEXTS)
    host.restart()

    fresh = FakeReranker()
    KalmRerank(model=fresh).compress_documents(host.retrieve(), QUERY)
    assert fresh.stats.passages_encoded == 0
    assert sources(host.retrieve()) == sources(make_documents())
    assert embeddings.n_documents == n_embedded


def test_backfill_believes_the_fingerprint_key_only_if_asked(host: VectorHost):
    """`kalm_fp` alone cannot tell: here it is right, only the text is another."""
    [document] = KalmPassageEncoder(model=FakeReranker()).transform_documents(make_documents()[:1])
    host.add([document.model_copy(update={"page_content": "another text"})])
    encoder = KalmPassageEncoder(model=FakeReranker())
    assert backfill(host.store, encoder, check_texts=False, show_progress=False) == BackfillReport(0, 0, 0)
    assert backfill(host.store, encoder, show_progress=False) == BackfillReport(1, 0, 1)
    assert backfill(host.store, encoder, show_progress=False) == BackfillReport(1, 0, 0)
    [held] = host.retrieve()
    assert FakeReranker().find_unencoded([_passage(held)]) == []


def test_backfill_labels_valid_encodings_that_lack_the_fingerprint_key(host: VectorHost):
    """Otherwise a run that believes the key would look at them again."""
    [document] = KalmPassageEncoder(model=FakeReranker()).transform_documents(make_documents()[:1])
    del document.metadata["kalm_fp"]
    host.add([document])
    encoder = KalmPassageEncoder(model=FakeReranker())
    assert backfill(host.store, encoder, show_progress=False) == BackfillReport(1, 0, 0)
    assert backfill(host.store, encoder, check_texts=False, show_progress=False) == BackfillReport(0, 0, 0)
    assert encoder.reranker.stats.passages_encoded == 0


def test_backfill_takes_documents_without_any_metadata(host: VectorHost):
    documents = [document.model_copy(update={"metadata": {}}) for document in make_documents()]
    host.add(documents)
    report = backfill(host.store, KalmPassageEncoder(model=FakeReranker()), show_progress=False)
    assert report == BackfillReport(len(documents), len(documents), 0)
    assert all("kalm_encoding" in document.metadata for document in host.retrieve())


def test_backfill_draws_a_progress_bar(embeddings: CountingEmbeddings, capsys: pytest.CaptureFixture[str]):
    store = InMemoryVectorStore(embeddings)
    store.add_documents(make_documents())
    backfill(store, KalmPassageEncoder(model=FakeReranker()), batch_size=2)
    assert "Encoding: 100%" in capsys.readouterr().err


def test_backfill_refuses_a_batch_of_nothing(embeddings: CountingEmbeddings):
    with pytest.raises(SettingsError, match="batch_size must be a positive whole number, but got 0"):
        backfill(InMemoryVectorStore(embeddings), KalmPassageEncoder(model=FakeReranker()), batch_size=0)


def test_unknown_stores_are_refused_with_the_known_ones_named(postgres_uri: str, embeddings: CountingEmbeddings):
    with pytest.raises(SettingsError, match=r"langchain_chroma.Chroma, .* but got dict"):
        write_back_to({})
    byte_store = InMemoryByteStore()
    byte_store.mset([("key", b"value")])
    with pytest.raises(SettingsError, match="a docstore must hold Documents, but got bytes"):
        backfill(byte_store, KalmPassageEncoder(model=FakeReranker()), show_progress=False)
    uri = postgres_uri.replace("postgresql://", "postgresql+psycopg://")
    with pytest.raises(SettingsError, match="PGVector must be in sync mode"):
        write_back_to(PGVector(embeddings, connection=uri, async_mode=True))


def test_a_store_of_ones_own_needs_four_methods():
    class Shelf:
        def __init__(self) -> None:
            self.documents: dict[Any, Document] = {f"row {i}": document for i, document in enumerate(make_documents())}

        def find_ids(self, without: Label | None) -> list[Any]:
            return [i for i, d in self.documents.items() if without is None or not without.is_on(d.metadata)]

        def read(self, ids: Any) -> dict[Any, Document]:
            return {i: self.documents[i] for i in ids}

        def id_of(self, document: Document) -> str:
            return document.metadata["source"].replace("page", "row")

        def add_metadata(self, changes: Any) -> None:
            for i, added in changes.items():
                self.documents[i].metadata.update(added)

    shelf, encoder = Shelf(), KalmPassageEncoder(model=FakeReranker())
    write_back_to(shelf)(encoder.transform_documents(make_documents()[:2]))
    assert backfill(shelf, encoder, check_texts=False, show_progress=False) == BackfillReport(3, 3, 0)
    assert backfill(shelf, encoder, show_progress=False) == BackfillReport(5, 0, 0)


class Interrupted:
    """A store that others change once, right after it was read for the nth time."""

    def __init__(self, access: DocumentAccess, after: int, change: Callable[[], object]) -> None:
        self._access, self._left, self._change = access, after, change
        self.find_ids, self.id_of, self.add_metadata = access.find_ids, access.id_of, access.add_metadata

    def read(self, ids: Any) -> dict[Any, Document]:
        held = {i: document.model_copy() for i, document in self._access.read(ids).items()}
        self._left -= 1
        if self._left == 0:
            self._change()
        return held


def rewrite_and_delete(host: VectorHost, documents: list[Document]) -> Callable[[], None]:
    """Return what another client does: the first document gets another text and owner, the second is deleted."""

    def change() -> None:
        host.delete([documents[0].id, documents[1].id])
        host.add([documents[0].model_copy(update={"page_content": "NEW TEXT", "metadata": {"source": "new"}})])

    return change


@pytest.mark.parametrize(
    ("way", "after"),
    [("backfill", 1), ("backfill", 2), ("write-back", 1)],
    ids=["while backfill encodes", "right before backfill writes", "right before write-back"],
)
def test_what_others_write_meanwhile_is_never_undone(host: VectorHost, way: str, after: int):
    """Texts that others changed and documents that they deleted stay so; the rest gets its encodings."""
    documents = make_documents()
    host.add(documents)
    access = Interrupted(access_to(host.store), after, rewrite_and_delete(host, documents))
    if way == "backfill":
        report = backfill(access, KalmPassageEncoder(model=FakeReranker()), show_progress=False)
        if after == 1:
            assert report == BackfillReport(len(TEXTS), len(TEXTS), 0, n_gone=1, n_changed=1)
    else:
        encoded = KalmPassageEncoder(model=FakeReranker()).transform_documents(host.retrieve())
        write_back_to(access)(encoded)
    held = {document.page_content: document for document in host.retrieve()}
    assert sorted(held) == sorted(["NEW TEXT", *TEXTS[2:]])
    assert held["NEW TEXT"].metadata["source"] == "new"
    assert FakeReranker().find_unencoded([_passage(held[text]) for text in TEXTS[2:]]) == []


def test_write_back_counts_documents_that_changed_since_they_were_retrieved(
    host: VectorHost, caplog: pytest.LogCaptureFixture
):
    documents = make_documents()
    host.add(documents)
    encoded = KalmPassageEncoder(model=FakeReranker()).transform_documents(host.retrieve())
    rewrite_and_delete(host, documents)()
    write_back_to(host.store)(encoded)
    assert "2 of 5 encodings were not written back: 1 gone, 1 have another text now" in caplog.text


def test_a_document_that_a_store_refuses_keeps_no_other_out(embeddings: CountingEmbeddings, caplog: pytest.LogCaptureFixture):
    store = InMemoryVectorStore(embeddings)
    ids = store.add_documents(make_documents())

    class Picky(Interrupted):
        def __init__(self, access: DocumentAccess) -> None:
            super().__init__(access, 0, lambda: None)
            self.add_metadata = self.refuse_first

        def refuse_first(self, changes: Any) -> None:
            if ids[0] in changes:
                msg = "too large"
                raise ValueError(msg)
            access.add_metadata(changes)

    access = access_to(store)
    report = backfill(Picky(access), KalmPassageEncoder(model=FakeReranker()), show_progress=False)
    assert report == BackfillReport(len(TEXTS), len(TEXTS), 0, n_failed=1)
    assert "1 of 5 encodings" in caplog.text
    assert "too large" in caplog.text
    assert sum("kalm_encoding" in entry["metadata"] for entry in store.store.values()) == len(TEXTS) - 1


def test_chroma_upsert_that_keeps_the_old_encoding_is_seen_through(tmp_path: Path, make_reranker: Callable[..., KalmReranker]):
    """Chroma merges metadata: the text is new, the encoding is of the old one; it is counted as stale and made anew."""
    host = ChromaHost(CountingEmbeddings(), tmp_path / "store")
    [old] = KalmPassageEncoder(model=make_reranker()).transform_documents(make_documents()[:1])
    host.add([old])
    new = Document("something else entirely", id=old.id, metadata={"source": "new"})
    host.add([new])
    [retrieved] = host.retrieve()
    assert retrieved.metadata["kalm_encoding"] == old.metadata["kalm_encoding"], "Chroma no longer merges: drop this test"

    reranker = make_reranker()
    [result] = KalmRerank(model=reranker).compress_documents([retrieved], QUERY)
    assert (reranker.stats.stale, reranker.stats.passages_encoded) == (1, 1)
    [expected] = make_reranker().score(QUERY, [new.page_content])
    assert result.metadata["relevance_score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["chroma", "qdrant", "in_memory"])
def test_index_neither_deletes_nor_embeds_again_when_encodings_come_or_change(
    kind: str, tmp_path: Path, embeddings: CountingEmbeddings
):
    """First indexed plain, then with encodings, then with another model's: always the same documents to index()."""
    hosts = {"chroma": ChromaHost, "qdrant": QdrantHost, "in_memory": InMemoryHost}
    host = hosts[kind](embeddings, tmp_path)
    records = InMemoryRecordManager(namespace="kalm")
    records.create_schema()
    documents = make_documents()

    def run(batch: list[Document]) -> dict[str, int]:
        return dict(index(batch, records, host.store, cleanup="full", source_id_key="source", key_encoder=kalm_key_encoder))

    nothing = {"num_added": 0, "num_updated": 0, "num_skipped": len(documents), "num_deleted": 0}
    assert run(documents)["num_added"] == len(documents)
    assert run(KalmPassageEncoder(model=FakeReranker()).transform_documents(documents)) == nothing
    assert run(KalmPassageEncoder(model=FakeReranker("other")).transform_documents(documents)) == nothing
    assert embeddings.n_documents == len(documents)
    # index() has skipped the encodings; a backfill brings them without embedding.
    report = backfill(host.store, KalmPassageEncoder(model=FakeReranker()), show_progress=False)
    assert report.n_missing == len(documents)
    assert run(documents) == nothing
    assert embeddings.n_documents == len(documents)
    host.close()


def test_parents_of_a_parent_document_retriever_are_encoded_in_their_docstore(embeddings: CountingEmbeddings, tmp_path: Path):
    """The retriever returns parents: backfill their docstore, and keep encodings out of the children."""
    docstore = create_kv_docstore(LocalFileStore(tmp_path))
    retriever = ParentDocumentRetriever(
        vectorstore=InMemoryVectorStore(embeddings),
        docstore=docstore,
        child_splitter=CharacterTextSplitter(separator=" ", chunk_size=20, chunk_overlap=0),
    )
    retriever.add_documents(make_documents())
    report = backfill(docstore, KalmPassageEncoder(model=FakeReranker()), show_progress=False)
    assert report.n_missing == len(TEXTS)

    reranker = FakeReranker()
    parents = retriever.invoke(QUERY)
    assert len(KalmRerank(model=reranker, top_n=1).compress_documents(parents, QUERY)) == 1
    assert reranker.stats.passages_encoded == 0
    children = retriever.vectorstore.similarity_search(QUERY, k=20)
    assert not any("kalm_encoding" in child.metadata for child in children)


def test_write_back_finds_docstore_keys_in_metadata(embeddings: CountingEmbeddings):
    docstore = InMemoryStore()
    documents = [Document(text, metadata={"doc_id": f"key {i}"}) for i, text in enumerate(TEXTS)]
    docstore.mset([(document.metadata["doc_id"], document) for document in documents])
    write_back = write_back_to(docstore, id_of=lambda document: document.metadata["doc_id"])
    KalmRerank(model=FakeReranker(), write_back=write_back).compress_documents(documents, QUERY)
    assert wait_for_write_back(10)
    assert all("kalm_encoding" in document.metadata for document in docstore.mget([f"key {i}" for i in range(len(TEXTS))]))
    assert not any("kalm_encoding" in document.metadata for document in documents)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_reference_mode_keeps_payloads_in_a_byte_store(
    kind: str, tmp_path: Path, embeddings: CountingEmbeddings, make_reranker: Callable[..., KalmReranker]
):
    """The vector store gets short strings; a later reranker reads payloads through a new adapter on the same byte store."""
    byte_store = LocalFileStore(tmp_path) if kind == "file" else InMemoryByteStore()
    settings = {"storage_mode": "reference", "storage_codec": "fp32"}
    store = InMemoryVectorStore(embeddings)
    encoder = KalmPassageEncoder(model=make_reranker(payload_store=ByteStorePayloads(byte_store), **settings))
    store.add_documents(encoder.transform_documents(make_documents()))
    assert len(ByteStorePayloads(byte_store)) == len(TEXTS)

    reranker = make_reranker(payload_store=ByteStorePayloads(byte_store), **settings)
    retrieved = store.similarity_search(QUERY, k=5)
    result = KalmRerank(model=reranker, top_n=None).compress_documents(retrieved, QUERY)
    assert max(len(document.metadata["kalm_encoding"]) for document in retrieved) < 500
    assert (reranker.stats.passages_encoded, reranker.stats.metadata_hits) == (0, len(TEXTS))
    expected = make_reranker().score(QUERY, [document.page_content for document in result])
    assert [document.metadata["relevance_score"] for document in result] == pytest.approx(expected, abs=1e-6)


def test_byte_store_payloads_are_a_mutable_mapping(tmp_path: Path):
    payloads = ByteStorePayloads(LocalFileStore(tmp_path))
    payloads["ab:cd:4:fp16"] = b"one"
    payloads.update({"ab:cd:8:fp16": b"two"})
    assert dict(payloads) == {"ab:cd:4:fp16": b"one", "ab:cd:8:fp16": b"two"}
    assert payloads.get("no:such:key") is None
    del payloads["ab:cd:4:fp16"]
    assert list(payloads) == ["ab:cd:8:fp16"]
    with pytest.raises(KeyError):
        del payloads["ab:cd:4:fp16"]
    with pytest.raises(SettingsError, match="must not contain '-'"):
        payloads["a-b"] = b""


def _passage(document: Document) -> Any:
    from kalm_integrations import Passage

    return Passage(document.page_content, document.metadata.get("kalm_encoding"))
