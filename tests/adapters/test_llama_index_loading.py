"""Encodings that were made elsewhere, into LlamaIndex's stores and out again; and every node of a store, page by page."""

from __future__ import annotations

import operator
import uuid

import pytest
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.docstore.types import BaseDocumentStore
from tools.llama_index_helpers import (
    QUERY,
    STORES,
    TEXTS,
    CountingEmbedding,
    delete,
    make_index,
    make_nodes,
    node_id,
    opener,
    read,
    then,
)

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import filling, qdrant
from kalm_integrations.hosting.stores import Label
from kalm_integrations.llama_index import (
    BackfillReport,
    KalmPassageEncoder,
    KalmRerank,
    LoadReport,
    Written,
    backfill,
    docstores,
    drop_encodings,
    fetch_from,
    held,
    load_encodings,
    vectors,
)
from kalm_integrations.llama_index.stores import access_to
from kalm_integrations.testing import FakeReranker

QUIET = {"show_progress": False}


@pytest.fixture(params=STORES)
def opened(request, tmp_path):
    """A storage context, and where its nodes are."""
    with opener(request, tmp_path / "store", request.param) as open_store:
        yield open_store()


def rows_of(nodes):
    """What `kalm encode` writes."""
    keys = (ENCODING_KEY, FINGERPRINT_KEY)
    return [{"id": node.node_id, "text": node.text, **{key: node.metadata[key] for key in keys}} for node in nodes]


def snapshot(store):
    """All that a store has of its nodes, vectors too where it has them."""
    vectors_held = {}
    kind = type(store).__name__
    if kind == "ChromaVectorStore":
        found = store.client.get(include=["embeddings", "documents"])
        rows = zip(found["ids"], found["embeddings"], found["documents"], strict=True)
        vectors_held = {i: (list(map(float, vector)), text) for i, vector, text in rows}
    if kind == "QdrantVectorStore":
        points, _ = store.client.scroll(store.collection_name, with_vectors=True)
        vectors_held = {point.id: point.vector for point in points}
    nodes = [node.to_dict() for node in read(store, *range(len(TEXTS)))]
    for node in nodes:
        node["embedding"] = None if node["embedding"] is None else list(map(float, node["embedding"]))
    return vectors_held, nodes


def test_rows_are_loaded_by_id_and_dropped_again_and_nothing_else_changes(opened, make_reranker):
    context, store = opened
    embedding = CountingEmbedding(embed_dim=3)
    make_index(context, make_nodes(), embedding)
    before = snapshot(store)
    encoder = KalmPassageEncoder(make_reranker())
    rows = rows_of(encoder(make_nodes()))
    rows[0] |= rows_of(encoder([TextNode(id_=node_id(0), text="another text")]))[0]
    gone = {**rows[1], "id": node_id(99)}
    bad = [{"text": "no id"}, {**rows[1], ENCODING_KEY: rows[1][ENCODING_KEY][:-9]}, {**rows[1], FINGERPRINT_KEY: "other"}]
    given = [*bad, *rows[:2], gone, *rows[2:]]

    settings = {"batch_size": 3, **QUIET}
    report = load_encodings(store, iter(given), **settings)
    assert report == LoadReport(n_written=4, n_present=0, n_gone=1, n_changed=1, n_bad=3, n_failed=0)
    report = load_encodings(store, given, **settings)
    assert report == LoadReport(n_written=0, n_present=4, n_gone=1, n_changed=1, n_bad=3, n_failed=0)
    loaded = read(store, 1, 2, 3, 4)
    fresh = make_reranker()
    KalmRerank(fresh, on_missing="error").postprocess_nodes([NodeWithScore(node=node) for node in loaded], query_str=QUERY)
    assert fresh.stats.passages_encoded == 0
    assert fetch_from(store)(make_nodes()) == [None, *(row[ENCODING_KEY] for row in rows[1:])]
    shown = [node.get_content(mode) for node in loaded for mode in (MetadataMode.EMBED, MetadataMode.LLM)]
    assert not any("kalm" in text for text in shown)
    assert list(access_to(store).find_ids(Label(FINGERPRINT_KEY, fresh.fingerprint))) == [node_id(0)]

    assert drop_encodings(store, **settings) == Written(n_written=4)
    assert drop_encodings(store, **settings) == Written()
    assert snapshot(store) == before
    assert len(list(access_to(store).find_ids(Label(FINGERPRINT_KEY, fresh.fingerprint)))) == len(TEXTS)
    assert embedding._count == len(TEXTS)


@pytest.fixture
def crowded(opened, monkeypatch):
    """A store of 40 nodes, whose pages are of 7."""
    for module in (filling, qdrant, held, vectors, docstores):
        if hasattr(module, "PAGE_SIZE"):
            monkeypatch.setattr(module, "PAGE_SIZE", 7)
    monkeypatch.setattr(docstores, "_REDIS_ENTRIES", 7)
    _, store = opened
    add = store.add_documents if isinstance(store, BaseDocumentStore) else store.add
    add([TextNode(id_=node_id(i), text=f"text {i}", metadata={"page": i}, embedding=[1.0, 0.0, float(i)]) for i in range(40)])
    return store


@pytest.mark.parametrize("check_texts", [True, False])
def test_every_node_comes_once_while_backfill_writes(crowded, check_texts):
    for name, expected in {"one": (40, 40, 0), "another": (40, 0, 40)}.items():
        encoder = KalmPassageEncoder(FakeReranker(name))
        report = backfill(crowded, encoder, check_texts=check_texts, batch_size=3, **QUIET)
        assert report == BackfillReport(*expected)
        assert encoder.reranker.stats.passages_encoded == 40


@pytest.mark.parametrize("check_texts", [True, False])
def test_no_node_is_skipped_when_others_delete_those_that_are_done(crowded, check_texts):
    fake = FakeReranker()

    def delete_done():
        done = [node.node_id for node in read(crowded, *range(40)) if ENCODING_KEY in node.metadata]
        assert len(done) == 6
        delete(crowded, *done)

    fake.encode_to_metadata = then(fake.encode_to_metadata, 3, delete_done)
    report = backfill(crowded, KalmPassageEncoder(fake), check_texts=check_texts, batch_size=3, **QUIET)
    assert report == BackfillReport(40, 40, 0)
    assert [ENCODING_KEY in node.metadata for node in read(crowded, *range(40))] == [True] * 34


def test_how_many_nodes_there_are_is_known_beforehand(opened):
    context, store = opened
    make_index(context, make_nodes())
    assert operator.length_hint(access_to(store).find_ids(None)) == len(TEXTS)


def test_two_checkpoints_lie_side_by_side_and_one_is_dropped(opened, make_reranker):
    context, store = opened
    encoder = KalmPassageEncoder(make_reranker())
    make_index(context, encoder(make_nodes()))
    rows = rows_of(encoder(make_nodes()))
    before = snapshot(store)
    assert load_encodings(store, rows, encoding_key="kalm_new", **QUIET).n_written == len(rows)
    for node in read(store, *range(len(TEXTS))):
        assert node.metadata[ENCODING_KEY] == node.metadata["kalm_new"]
        assert node.metadata[FINGERPRINT_KEY] == node.metadata["kalm_new_fp"]
        assert {"kalm_new", "kalm_new_fp", ENCODING_KEY} < set(node.excluded_llm_metadata_keys)
    lacking = access_to(store).find_ids(Label("kalm_new_fp", encoder.reranker.fingerprint))
    assert list(lacking) == []
    assert drop_encodings(store, encoding_key="kalm_new", **QUIET).n_written == len(rows)
    assert snapshot(store) == before


def test_the_text_that_was_encoded_depends_on_the_metadata_mode(make_reranker):
    store = SimpleDocumentStore()
    store.add_documents(make_nodes())
    rows = rows_of(KalmPassageEncoder(make_reranker(), metadata_mode=MetadataMode.NONE)(make_nodes()))
    assert load_encodings(store, rows, **QUIET).n_changed == len(rows)
    assert load_encodings(store, rows, metadata_mode=MetadataMode.NONE, **QUIET).n_written == len(rows)


def test_ids_may_be_numbers_and_have_another_name(make_reranker):
    """A table of a database has numbers where nodes have texts."""
    store, encoder = SimpleDocumentStore(), KalmPassageEncoder(make_reranker())
    nodes = [TextNode(id_=str(i), text=text) for i, text in enumerate(TEXTS)]
    store.add_documents(nodes)
    rows = [{**row, "id": "none", "key": int(row["id"])} for row in rows_of(encoder(nodes))]
    assert load_encodings(store, rows, id_field="key", **QUIET).n_written == len(rows)
    assert load_encodings(store, rows, id_field="key", **QUIET).n_present == len(rows)


def test_loading_shows_progress_and_refuses_what_cannot_work(capsys, make_reranker):
    store = SimpleDocumentStore()
    store.add_documents(make_nodes())
    rows = rows_of(KalmPassageEncoder(make_reranker())(make_nodes()))
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
            function(store, encoding_key=FINGERPRINT_KEY)
        with pytest.raises(SettingsError, match="store must be"):
            function(object())


@pytest.mark.parametrize("opened", ["lancedb"], indirect=True)
@pytest.mark.parametrize("quoted", ["it's", 'a "b"', "back`tick"])
def test_ids_and_texts_with_quotes_are_safe_in_lancedb(opened, quoted):
    """They are put into conditions."""
    _, store = opened
    node = TextNode(id_=f"{quoted} {uuid.uuid4().hex}", text=f"{quoted} \\ ' or 1 = 1 --", embedding=[1.0, 0.0, 0.0])
    store.add([node, TextNode(id_="other", text="other", embedding=[1.0, 0.0, 0.0])])
    encoder = KalmPassageEncoder(FakeReranker())
    assert backfill(store, encoder, **QUIET) == BackfillReport(n_checked=2, n_missing=2, n_stale=0)
    assert backfill(store, encoder, **QUIET) == BackfillReport(n_checked=2, n_missing=0, n_stale=0)
    assert list(access_to(store).read([node.node_id])) == [node.node_id]


@pytest.mark.parametrize("opened", ["lancedb"], indirect=True)
def test_nodes_that_were_added_without_the_fields_of_others_are_found_in_lancedb(opened):
    """The fields beside a node are those of the first nodes, here encodings, and may be missing in later ones."""
    _, store = opened
    encoder = KalmPassageEncoder(FakeReranker())
    nodes = [TextNode(id_=node_id(i), text=f"text {i}", metadata={"page": i}, embedding=[1.0, 0.0, 0.0]) for i in range(4)]
    store.add(encoder(nodes[:2]))
    store.add(nodes[2:3])
    store.add([nodes[3].model_copy(update={"metadata": {}})])
    assert backfill(store, encoder, check_texts=False, **QUIET) == BackfillReport(2, 2, 0)
    assert backfill(store, encoder, **QUIET) == BackfillReport(4, 0, 0)
    assert drop_encodings(store, **QUIET) == Written(n_written=4)
    held_now = access_to(store).read([node_id(i) for i in range(4)])
    assert [held_now[node_id(i)].metadata for i in range(4)] == [{"page": 0}, {"page": 1}, {"page": 2}, {}]
