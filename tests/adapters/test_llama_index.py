"""The LlamaIndex adapter in the framework's own pipelines, retrievers and query engines."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import logging
import pickle
import sys
import threading

import pytest
from llama_index.core import VectorStoreIndex, get_response_synthesizer
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
    TransformComponent,
)
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from pydantic import Field

from kalm_integrations import KalmReranker
from kalm_integrations.core.settings import DEFAULT_CODEC
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import EncodingError, MissingExtraError, SettingsError
from kalm_integrations.hosting import wait_for_write_back
from kalm_integrations.llama_index import KalmPassageEncoder, KalmRerank
from kalm_integrations.testing import FakeReranker

TEXTS = ["the panthers won", "rain is wet", "who lost the game", "who knows", "a wing in a slipstream"]
QUERY = "who won the game"


class WordEmbedding(BaseEmbedding):
    """Embeds the first letters of words, and remembers the texts."""

    texts: list[str] = Field(default_factory=list, exclude=True)

    def _get_text_embedding(self, text: str) -> list[float]:
        self.texts.append(text)
        return self._get_query_embedding(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return [1.0 + sum(word.startswith(letter) for word in query.lower().split()) for letter in "tprwags"]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


class EventLog(BaseEventHandler):
    events: list[BaseEvent] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "EventLog"

    def handle(self, event: BaseEvent, **kwargs: object) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[BaseEvent]:
        return [event for event in self.events if event.class_name() == name]


@pytest.fixture
def event_log():
    log = EventLog()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(log)
    yield log
    dispatcher.event_handlers.remove(log)


def make_nodes(texts=TEXTS, **metadata):
    return [TextNode(id_=f"n{i}", text=text, metadata={"page": i, **metadata}) for i, text in enumerate(texts)]


def scored(nodes):
    return [NodeWithScore(node=node, score=0.5 - i / 100) for i, node in enumerate(nodes)]


def rerank(postprocessor, nodes, query=QUERY):
    return postprocessor.postprocess_nodes(scored(nodes), query_str=query)


def has_encoding(value):
    return ENCODING_KEY in value or FINGERPRINT_KEY in value or "kalm1" in value


# Reranking.


def test_it_is_a_node_postprocessor_that_ranks_best_first_with_float_scores():
    ranked = rerank(KalmRerank(FakeReranker(), top_n=2), make_nodes())
    assert issubclass(KalmRerank, BaseNodePostprocessor)
    assert [r.node_id for r in ranked] == ["n2", "n0"]
    assert [type(r.score) for r in ranked] == [float, float]
    assert ranked[0].score > ranked[1].score


def test_scores_are_those_of_the_reranker_on_the_text_for_embedding(make_reranker):
    nodes = make_nodes(author="Ünïcödé")
    reranker = make_reranker()
    ranked = rerank(KalmRerank(reranker, top_n=None), nodes)
    expected = reranker.rank(QUERY, [node.get_content(MetadataMode.EMBED) for node in nodes])
    assert [(r.node_id, r.score) for r in ranked] == [(f"n{p.index}", p.score) for p in expected]


@pytest.mark.parametrize("mode", list(MetadataMode))
def test_metadata_mode_decides_the_text(make_reranker, mode):
    node = TextNode(text="a", metadata={"x": 1, "y": 2}, excluded_embed_metadata_keys=["x"], excluded_llm_metadata_keys=["y"])
    reranker = make_reranker()
    [ranked] = rerank(KalmRerank(reranker, metadata_mode=mode), [node])
    assert ranked.score == reranker.score(QUERY, [node.get_content(mode)])[0]


def test_inputs_are_untouched_and_outputs_are_copies_of_the_same_type_and_id():
    before_it = {NodeRelationship.PREVIOUS: RelatedNodeInfo(node_id="p", metadata={"authors": ["me"]})}
    shared = {"metadata": {"authors": ["me"]}, "relationships": before_it}
    nodes = [TextNode(id_="text", text="a text", **shared), ImageNode(id_="image", text="the picture", **shared)]
    nodes += [IndexNode(id_="index", text="an index", index_id="i", **shared), Document(id_="all", text="the whole", **shared)]
    nodes = KalmPassageEncoder(FakeReranker())(nodes)
    given = scored(nodes)
    before = [node.model_dump_json() for node in given]
    for strip in (True, False):
        postprocessor = KalmRerank(FakeReranker(), top_n=None, strip_encodings=strip, keep_retrieval_score=True)
        ranked = postprocessor.postprocess_nodes(given, query_str=QUERY)
        for out in ranked:
            out.node.metadata["later"] = "change"
            out.node.metadata["authors"].append("change")
            out.node.prev_node.metadata["authors"].append("change")
        assert [node.model_dump_json() for node in given] == before
        assert {(type(r.node), r.node_id) for r in ranked} == {(type(n), n.node_id) for n in nodes}


def test_ties_keep_the_order_of_retrieval():
    ranked = rerank(KalmRerank(FakeReranker(), top_n=3), make_nodes(["b", "a", "c", "d"]))
    assert [r.node_id for r in ranked] == ["n0", "n1", "n2"]


def test_duplicates_by_text_are_encoded_once_and_all_returned(make_reranker):
    reranker = make_reranker()
    nodes = [TextNode(id_=str(i), text="the same") for i in range(3)]
    assert len(rerank(KalmRerank(reranker), nodes)) == 3
    assert reranker.stats.passages_encoded == 1
    [first, *others] = KalmPassageEncoder(make_reranker())(nodes)
    fresh = make_reranker()
    rerank(KalmRerank(fresh), [*nodes, first, *others])
    assert fresh.stats.passages_encoded == 0


def test_threshold_comes_before_the_cut():
    words = KalmRerank(FakeReranker(), top_n=2, score_threshold=0.4)
    assert [r.node_id for r in rerank(words, make_nodes(["nothing", "who won the", "who won the game"]))] == ["n2", "n1"]
    assert rerank(KalmRerank(FakeReranker(), score_threshold=0.99), make_nodes()) == []


def test_no_nodes_give_no_nodes_no_events_and_load_nothing(event_log):
    assert KalmRerank("there is no such checkpoint").postprocess_nodes([], query_str="q") == []
    assert event_log.events == []
    assert KalmPassageEncoder("there is no such checkpoint")([]) == []


def test_no_query_is_refused_in_the_frameworks_words():
    with pytest.raises(SettingsError, match=r"Missing query bundle in extra info\..* pass query_str or query_bundle"):
        KalmRerank(FakeReranker()).postprocess_nodes(scored(make_nodes()))


def test_nodes_may_come_from_a_generator(event_log):
    """Also past the span that the framework draws around the call with its arguments."""
    ranked = KalmRerank(FakeReranker()).postprocess_nodes((node for node in scored(make_nodes())), query_str=QUERY)
    assert len(ranked) == len(event_log.named("ReRankStartEvent")[0].nodes) == len(TEXTS)
    assert len(KalmPassageEncoder(FakeReranker())(node for node in make_nodes())) == len(TEXTS)


def test_what_is_no_node_with_a_score_is_refused():
    for given in (TEXTS, make_nodes(), scored(make_nodes())[0]):
        with pytest.raises(SettingsError, match="KalmRerank takes a list of NodeWithScores, but got "):
            KalmRerank(FakeReranker()).postprocess_nodes(given, query_str=QUERY)
    with pytest.raises(
        SettingsError, match="KalmPassageEncoder takes a list of BaseNodes, but got a NodeWithScore at place 0"
    ):
        KalmPassageEncoder(FakeReranker())(scored(make_nodes()))


def test_instructions_may_differ_between_postprocessors_of_one_reranker(make_reranker):
    nodes = make_nodes()
    reranker = make_reranker()
    plain, told = (KalmRerank(reranker, top_n=None, instruction=i) for i in (None, "Find the rules of the game"))
    first, second = rerank(plain, nodes), rerank(told, nodes)
    assert {r.node_id: r.score for r in first} != {r.node_id: r.score for r in second}
    assert reranker.stats.passages_encoded == len(nodes)


def test_kept_retrieval_score_is_hidden_from_prompts_and_embeddings_and_a_second_reranker():
    fake = FakeReranker()
    nodes = KalmPassageEncoder(fake)(make_nodes())
    encoded = fake.stats.passages_encoded
    once = KalmRerank(fake, keep_retrieval_score=True, strip_encodings=False).postprocess_nodes(scored(nodes), query_str=QUERY)
    assert {r.node_id: r.node.metadata["retrieval_score"] for r in once} == {n.node_id: n.score for n in scored(nodes)}
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert all("retrieval_score" not in r.get_content(mode) for r in once)
    # What SentenceTransformerRerank does: it leaves the score in sight.
    for node in once:
        node.node.excluded_embed_metadata_keys.remove("retrieval_score")
    KalmRerank(fake).postprocess_nodes(once, query_str=QUERY)
    assert fake.stats.passages_encoded == encoded


# Stored encodings.


def test_encoded_nodes_are_ranked_the_same_without_encoding(make_reranker):
    nodes = make_nodes()
    encoded = KalmPassageEncoder(make_reranker(storage_codec="fp32"))(nodes)
    fresh = make_reranker()
    stored = {r.node_id: r.score for r in rerank(KalmRerank(fresh), encoded)}
    assert fresh.stats.passages_encoded == 0
    assert fresh.stats.metadata_hits == len(nodes)
    assert stored == pytest.approx({r.node_id: r.score for r in rerank(KalmRerank(make_reranker()), nodes)}, abs=1e-6)


@pytest.mark.parametrize(
    ("damage", "counter"),
    [
        (lambda node: node.set_content("another text"), "stale"),
        (lambda node: node.metadata.update(page="another page"), "stale"),
        (lambda node: node.metadata.update({ENCODING_KEY: node.metadata[ENCODING_KEY][:-1]}), "corrupt"),
        (lambda node: node.metadata.update({ENCODING_KEY: b"bytes"}), "corrupt"),
    ],
)
def test_an_encoding_of_another_text_or_a_damaged_one_is_counted_and_made_anew(make_reranker, damage, counter):
    [encoded] = KalmPassageEncoder(make_reranker())(make_nodes(["a text"]))
    damage(encoded)
    fresh = make_reranker()
    [ranked] = rerank(KalmRerank(fresh), [encoded])
    assert getattr(fresh.stats, counter) == fresh.stats.passages_encoded == 1
    text = ranked.get_content(MetadataMode.EMBED)
    assert ranked.score == fresh.score(QUERY, [text])[0]


def test_an_encoding_of_another_model_is_counted_and_made_anew(make_reranker, other_checkpoint):
    encoded = KalmPassageEncoder(make_reranker(other_checkpoint))(make_nodes())
    fresh = make_reranker()
    rerank(KalmRerank(fresh), encoded)
    assert fresh.stats.stale == fresh.stats.passages_encoded == len(TEXTS)


def test_on_missing_error_names_the_rule_and_the_node():
    nodes = make_nodes()
    [first] = KalmPassageEncoder(FakeReranker())(nodes[:1])
    with pytest.raises(
        EncodingError, match=r"on_missing='error'.*but 4 of 5 .* n1 \(missing\); encode them at ingest or run backfill"
    ):
        rerank(KalmRerank(FakeReranker(), on_missing="error"), [first, *nodes[1:]])
    assert rerank(KalmRerank(FakeReranker(), on_missing="error"), [first])


def test_write_back_gets_copies_of_what_was_encoded_after_scoring(make_reranker):
    nodes = make_nodes()
    [first] = KalmPassageEncoder(make_reranker())(nodes[:1])
    written = []
    reranker = make_reranker()
    rerank(KalmRerank(reranker, top_n=1, write_back=written.extend), [first, *nodes[1:]])
    assert wait_for_write_back(10)
    assert [node.node_id for node in written] == ["n1", "n2", "n3", "n4"]
    assert reranker.stats.passages_encoded == 4
    assert not any(has_encoding(node.to_json()) for node in nodes)
    rerank(KalmRerank(reranker, on_missing="error"), written)
    rerank(KalmRerank(reranker, write_back=written.clear), [first])
    assert wait_for_write_back(10)
    assert len(written) == 4


def test_write_back_never_fails_a_query(caplog):
    def fail(nodes):
        msg = "the store is down"
        raise ConnectionError(msg)

    with caplog.at_level(logging.ERROR, logger="kalm_integrations"):
        assert rerank(KalmRerank(FakeReranker(), write_back=fail), make_nodes())
        assert wait_for_write_back(10)
    assert "the store is down" in caplog.text


def test_encoding_key_may_be_another_one():
    fake = FakeReranker()
    encoded = KalmPassageEncoder(fake, encoding_key="states")(make_nodes())
    assert all("states" in node.metadata and ENCODING_KEY not in node.metadata for node in encoded)
    ranked = rerank(KalmRerank(fake, encoding_key="states", on_missing="error"), encoded)
    assert not any("states" in r.node.metadata for r in ranked)


# Encoding at ingest.


def test_encoder_returns_copies_whose_encoding_is_out_of_sight():
    nodes = make_nodes(author="me")
    before = [node.to_json() for node in nodes]
    encoded = KalmPassageEncoder(FakeReranker())(nodes)
    assert [node.to_json() for node in nodes] == before
    for old, new in zip(nodes, encoded, strict=True):
        assert (type(new), new.node_id, new.text) == (type(old), old.node_id, old.text)
        assert list(new.metadata) == ["page", "author", ENCODING_KEY, FINGERPRINT_KEY]
        assert all(isinstance(new.metadata[key], str) for key in (ENCODING_KEY, FINGERPRINT_KEY))
        for mode in (MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.NONE):
            assert new.get_content(mode) == old.get_content(mode)


def test_stripping_gives_the_node_that_was_encoded():
    """Then what it is hashed, fused and prompted by is what it was."""
    nodes = make_nodes(author="me")
    ranked = rerank(KalmRerank(FakeReranker(), top_n=None), KalmPassageEncoder(FakeReranker())(nodes))
    assert sorted((r.node for r in ranked), key=lambda node: node.node_id) == nodes


def test_encoder_encodes_only_what_has_no_valid_encoding(make_reranker):
    reranker = make_reranker()
    encoder = KalmPassageEncoder(reranker)
    encoded = encoder(make_nodes())
    changed = encoded[0].model_copy(update={"text": "changed"})
    again = KalmPassageEncoder(fresh := make_reranker())([changed, *encoded[1:]])
    assert fresh.stats.passages_encoded == 1
    assert again[1:] == encoded[1:]
    assert again[0].metadata[ENCODING_KEY] != encoded[0].metadata[ENCODING_KEY]


def test_encoder_hides_encodings_that_came_from_elsewhere():
    """As by export from a framework that has no exclusion lists."""
    fake = FakeReranker()
    [metadata] = fake.encode_to_metadata(["text"])
    [encoded] = KalmPassageEncoder(fake)([TextNode(text="text", metadata={ENCODING_KEY: metadata[ENCODING_KEY]})])
    assert fake.stats.passages_encoded == 1
    assert encoded.get_content(MetadataMode.LLM) == "text"
    assert encoded.metadata[FINGERPRINT_KEY] == fake.fingerprint


@pytest.mark.parametrize("component", [KalmRerank, KalmPassageEncoder])
async def test_async_calls_leave_the_event_loop_free(component):
    class Waiting(FakeReranker):
        """Goes on when the event loop tells it to."""

        released = threading.Event()

        def read(self, passages):
            assert self.released.wait(10), "the event loop was held up"
            return super().read(passages)

    instance = component(Waiting())
    nodes = make_nodes()
    if component is KalmRerank:
        call = asyncio.create_task(instance.apostprocess_nodes(scored(nodes), query_str=QUERY))
    else:
        call = asyncio.create_task(instance.acall(nodes))
    await asyncio.sleep(0.05)
    Waiting.released.set()
    assert len(await call) == len(nodes)


def test_encode_before_splitting_is_survived_and_undone_by_the_encoder(make_reranker):
    """Chunks inherit the encoding of the whole, three times over; it is never used for them."""
    reranker = make_reranker()
    parents = KalmPassageEncoder(reranker)([Document(text=" ".join(f"Sentence number {i} is here." for i in range(40)))])
    assert len(parents[0].metadata[ENCODING_KEY]) > 128
    chunks = SentenceSplitter(chunk_size=128, chunk_overlap=0)(parents)
    assert len(chunks) > 2
    assert chunks[1].to_json().count("kalm1.") == 3
    fresh = make_reranker()
    rerank(KalmRerank(fresh, top_n=None), chunks)
    assert fresh.stats.stale == fresh.stats.passages_encoded == len(chunks)
    again = KalmPassageEncoder(fresh)(chunks)
    assert again[1].to_json().count("kalm1.") == 1
    last = make_reranker()
    ranked = rerank(KalmRerank(last), again)
    assert last.stats.passages_encoded == 0
    assert not any(has_encoding(r.to_json()) for r in ranked)


# Ingestion pipelines.


def make_pipeline(reranker, embedding, **settings):
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0)
    return IngestionPipeline(transformations=[splitter, embedding, KalmPassageEncoder(reranker)], **settings)


def make_documents(n=5):
    return [Document(id_=f"d{i}", text=f"{TEXTS[i % 5]} {i}", metadata={"source": i}) for i in range(n)]


def test_second_run_of_a_pipeline_with_a_docstore_ingests_nothing():
    embedding, fake = WordEmbedding(), FakeReranker()
    pipeline = make_pipeline(fake, embedding, docstore=SimpleDocumentStore(), vector_store=SimpleVectorStore())
    assert len(pipeline.run(documents=make_documents())) == 5
    assert len(pipeline.run(documents=make_documents())) == 0
    assert len(embedding.texts) == fake.stats.passages_encoded == 5
    assert not any(has_encoding(text) for text in embedding.texts)


def test_second_run_on_the_same_nodes_ingests_nothing():
    """It would ingest all of them if the first had put encodings into the nodes it was given: the docstore hashes those."""
    nodes = make_nodes()
    fake = FakeReranker()
    pipeline = IngestionPipeline(
        transformations=[WordEmbedding(), KalmPassageEncoder(fake)],
        docstore=SimpleDocumentStore(),
        vector_store=SimpleVectorStore(),
    )
    assert len(pipeline.run(nodes=nodes)) == 5
    assert len(pipeline.run(nodes=nodes)) == 0
    assert fake.stats.passages_encoded == 5


async def test_pipelines_run_asynchronously():
    nodes = await make_pipeline(FakeReranker(), WordEmbedding()).arun(documents=make_documents())
    assert all(ENCODING_KEY in node.metadata for node in nodes)


def test_one_new_document_costs_one_encoding(make_reranker):
    """The ingestion cache keys a batch as a whole and runs all of it again; the reranker's memory does not."""
    reranker = make_reranker()
    pipeline = make_pipeline(reranker, WordEmbedding())
    pipeline.run(documents=make_documents(8))
    pipeline.run(documents=make_documents(9))
    assert reranker.stats.passages_encoded == 9


def test_ingestion_cache_serves_the_same_settings_and_no_others(tiny_checkpoint, other_checkpoint):
    cache = IngestionCache()
    nodes = make_nodes()

    def run(model=tiny_checkpoint, **settings):
        encoder = KalmPassageEncoder(model, **settings)
        out = IngestionPipeline(transformations=[encoder], cache=cache).run(nodes=nodes)
        return encoder.reranker.stats.passages_encoded, out[0].metadata[ENCODING_KEY]

    n_encoded, value = run()
    assert n_encoded == 5
    assert run() == (0, value)
    assert run(show_progress=True) == (0, value)
    for settings in (
        {"compression_ratio": 2},
        {"storage_codec": "int8"},
        {"max_passage_tokens": 3},
        {"metadata_mode": "none"},
        {"model": other_checkpoint},
        {"model_kwargs": {"allow_special_tokens": True}},
    ):
        n_encoded, other = run(**settings)
        assert (n_encoded, other == value) == (5, False), settings


def test_ingestion_cache_keeps_given_rerankers_apart():
    cache = IngestionCache()
    for fake in (FakeReranker("one"), FakeReranker("two")):
        nodes = IngestionPipeline(transformations=[KalmPassageEncoder(fake)], cache=cache).run(nodes=make_nodes())
        assert nodes[0].metadata[FINGERPRINT_KEY] == fake.fingerprint


def test_pipelines_run_in_worker_processes(tiny_checkpoint, make_reranker):
    pipeline = IngestionPipeline(transformations=[KalmPassageEncoder(tiny_checkpoint, storage_codec="fp32")])
    nodes = pipeline.run(nodes=make_nodes(), num_workers=2)
    assert sorted(node.node_id for node in nodes) == [f"n{i}" for i in range(5)]
    assert len(rerank(KalmRerank(make_reranker(), on_missing="error"), nodes)) == 5


def test_a_given_reranker_does_not_go_to_worker_processes():
    with pytest.raises(SettingsError, match=r"num_workers.*pass model and settings instead"):
        pickle.dumps(KalmPassageEncoder(FakeReranker()))


# Query engines.


def make_engine(index, postprocessor, **settings):
    settings = {"similarity_top_k": 4, "llm": MockLLM(), "node_postprocessors": [postprocessor], **settings}
    return index.as_query_engine(**settings)


def test_nothing_of_an_encoding_reaches_prompts_embeddings_events_or_responses(make_reranker, event_log):
    embedding, reranker = WordEmbedding(), make_reranker()
    nodes = make_pipeline(reranker, embedding).run(documents=make_documents())
    index = VectorStoreIndex(nodes, embed_model=embedding)
    event_log.events.clear()
    response = make_engine(index, KalmRerank(reranker, top_n=3)).query(QUERY)

    assert len(response.source_nodes) == 3
    # MockLLM answers with its prompt.
    assert response.source_nodes[0].text in response.response
    assert not has_encoding(response.response)
    assert not any(has_encoding(text) for text in embedding.texts)
    assert not any(has_encoding(node.to_json()) for node in response.source_nodes)
    [start], [end] = event_log.named("ReRankStartEvent"), event_log.named("ReRankEndEvent")
    assert (start.query.query_str, len(start.nodes), start.top_n, start.model_name) == (QUERY, 4, 3, "KalmReranker")
    assert [node.node_id for node in end.nodes] == [node.node_id for node in response.source_nodes]
    after_retrieval = event_log.events[event_log.events.index(start) :]
    assert not any(has_encoding(event.model_dump_json(fallback=str)) for event in after_retrieval)


def test_callback_handlers_see_the_reranking_without_encodings():
    debug = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = KalmRerank(FakeReranker(), top_n=3, callback_manager=CallbackManager([debug]))
    rerank(postprocessor, KalmPassageEncoder(FakeReranker())(make_nodes()))
    [(start, end)] = debug.get_event_pairs(CBEventType.RERANKING)
    assert (start.payload[EventPayload.QUERY_STR], start.payload[EventPayload.TOP_K]) == (QUERY, 3)
    assert len(end.payload[EventPayload.NODES]) == 3
    for event in (start, end):
        assert not any(has_encoding(node.to_json()) for node in event.payload[EventPayload.NODES])


def test_a_response_can_be_written_as_json(make_reranker):
    index = VectorStoreIndex(make_nodes(), embed_model=WordEmbedding())
    response = make_engine(index, KalmRerank(make_reranker(), keep_retrieval_score=True)).query(QUERY)
    written = json.loads(json.dumps([node.to_dict() for node in response.source_nodes]))
    assert [node["score"] for node in written] == [node.score for node in response.source_nodes]


def test_a_changed_document_is_never_scored_by_its_old_encoding(make_reranker):
    reranker = make_reranker()
    nodes = KalmPassageEncoder(reranker)(make_nodes())
    index = VectorStoreIndex(nodes, embed_model=WordEmbedding())
    stored = index.docstore.get_node("n0")
    stored.set_content("the panthers never won the game")
    index.docstore.add_documents([stored])
    response = make_engine(index, KalmRerank(reranker, top_n=None), similarity_top_k=5).query(QUERY)
    [changed] = [node for node in response.source_nodes if node.node_id == "n0"]
    assert reranker.stats.stale == 1
    [fresh] = make_reranker().score(QUERY, [changed.get_content(MetadataMode.EMBED)])
    # In another batch, and so with other low bits.
    assert changed.score == pytest.approx(fresh, abs=1e-6)


async def test_fifty_concurrent_queries_agree_with_one_by_one_and_encode_once(tiny_checkpoint, make_reranker):
    index = VectorStoreIndex(make_nodes(), embed_model=WordEmbedding())
    queries = [f"{QUERY} {i % 7}" for i in range(50)]
    postprocessor = KalmRerank(tiny_checkpoint)
    engine = make_engine(index, postprocessor, similarity_top_k=5)
    responses = await asyncio.gather(*[engine.aquery(query) for query in queries])
    alone = make_engine(index, KalmRerank(make_reranker(storage_codec=DEFAULT_CODEC)), similarity_top_k=5)
    expected = {query: alone.query(query).source_nodes for query in set(queries)}
    for query, response in zip(queries, responses, strict=True):
        assert [n.node_id for n in response.source_nodes] == [n.node_id for n in expected[query]]
        assert [n.score for n in response.source_nodes] == pytest.approx([n.score for n in expected[query]], abs=1e-6)
    assert postprocessor.reranker.stats.passages_encoded == len(TEXTS)


class WordRetriever(BaseRetriever):
    """Returns the nodes that share a word with the query."""

    def __init__(self, nodes):
        self.nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle):
        words = set(query_bundle.query_str.split())
        found = [(len(words & set(node.text.split())), node) for node in self.nodes]
        return [NodeWithScore(node=node, score=float(n)) for n, node in found if n]


@pytest.mark.parametrize("mode", ["reciprocal_rerank", "relative_score", "simple"])
def test_fusion_finds_a_node_once_if_all_retrievers_are_built_after_encoding(make_reranker, mode):
    reranker = make_reranker()
    plain = make_nodes()
    index = VectorStoreIndex(KalmPassageEncoder(reranker)(plain), embed_model=WordEmbedding())
    stored = list(index.docstore.docs.values())
    retrievers = [index.as_retriever(similarity_top_k=5), WordRetriever(stored)]
    settings = {"num_queries": 1, "use_async": False, "similarity_top_k": 10, "llm": MockLLM(), "mode": mode}
    fused = QueryFusionRetriever(retrievers, **settings)._retrieve(QueryBundle(QUERY))
    assert sorted(node.node_id for node in fused) == [f"n{i}" for i in range(5)]

    fresh = make_reranker()
    fused = QueryFusionRetriever(retrievers, **settings).retrieve(QUERY)
    assert len(KalmRerank(fresh, top_n=None).postprocess_nodes(fused, query_str=QUERY)) == 5
    assert fresh.stats.passages_encoded == 0

    # The trap: one retriever was built before, and the framework fuses by a hash that covers metadata.
    mixed = QueryFusionRetriever([retrievers[0], WordRetriever(plain)], **settings)._retrieve(QueryBundle(QUERY))
    assert len(mixed) > len({node.node_id for node in mixed})
    fresh = make_reranker()
    KalmRerank(fresh, top_n=None).postprocess_nodes(mixed, query_str=QUERY)
    assert fresh.stats.passages_encoded == 0


def test_text_that_another_postprocessor_replaced_is_what_is_scored(make_reranker):
    """MetadataReplacementPostProcessor shows a window around the sentence that was found."""
    nodes = [
        TextNode(text=t, metadata={"window": f"before {t} after"}, excluded_embed_metadata_keys=["window"]) for t in TEXTS
    ]
    reranker = make_reranker()
    replaced = MetadataReplacementPostProcessor("window").postprocess_nodes(scored(KalmPassageEncoder(reranker)(nodes)))
    ranked = KalmRerank(reranker, top_n=1).postprocess_nodes(replaced, query_str=QUERY)
    assert reranker.stats.stale == len(TEXTS)
    assert ranked[0].score == max(reranker.score(QUERY, [f"before {t} after" for t in TEXTS]))


# Settings.


def test_settings_reach_the_reranker(tiny_checkpoint, make_reranker):
    postprocessor = KalmRerank(
        tiny_checkpoint,
        compression_ratio=2,
        storage_codec="fp32",
        max_query_tokens=4,
        system_instruction="Judge.",
        instruction="Find",
        dtype="float32",
        device="cpu",
        model_kwargs={"allow_special_tokens": True, "cache_bytes": 0},
    )
    same = make_reranker(compression_ratio=2, max_query_tokens=4, system_instruction="Judge.", allow_special_tokens=True)
    [ranked] = rerank(postprocessor, make_nodes(["a <bos> b"]))
    text = ranked.get_content(MetadataMode.EMBED)
    assert ranked.score == same.score(QUERY, [text], instruction="Find")[0]
    assert postprocessor.reranker.compression_ratio == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_n": 0}, "top_n must be a positive whole number, or None for all, but got 0"),
        ({"topn": 3}, "must be out of .*but got 'topn'; did you mean 'top_n'"),
        ({"on_missing": "skip"}, "on_missing: .*'encode' or 'error', but got 'skip'"),
        ({"metadata_mode": "some"}, "metadata_mode: "),
        ({"keep_retrieval_score": 2}, "keep_retrieval_score: "),
        ({"model_kwargs": {"batch": 3}}, "model_kwargs must be out of .*encode_batch_size.*but got 'batch'"),
        ({"model_kwargs": {"device": "cpu"}}, "but got device"),
        ({"model_kwargs": {"cache_bytes": object()}}, "cache_bytes: .*object"),
        ({"model": 3}, "model must be an alias, a hub id, a folder, the address of a service or a reranker, but got int"),
        ({"model": FakeReranker(), "dtype": "float32"}, "brings its own settings, but got dtype"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    with pytest.raises(SettingsError, match=message):
        KalmRerank(**settings)


def test_a_fused_score_is_in_no_text():
    """Neither in what models see, nor in what the next reranker reads: the encoding that came with a node stays valid."""
    stored = KalmPassageEncoder(FakeReranker())(make_nodes())
    fused = KalmRerank(FakeReranker(), fusion="z_score", strip_encodings=False).postprocess_nodes(
        scored(stored), query_str=QUERY
    )
    assert all(type(node.metadata["fused_score"]) is float for node in fused)
    assert not any(
        "fused_score" in node.node.get_content(mode) for node in fused for mode in (MetadataMode.LLM, MetadataMode.EMBED)
    )
    after = FakeReranker()
    KalmRerank(after).postprocess_nodes(fused, query_str=QUERY)
    assert after.stats.passages_encoded == 0


@pytest.mark.parametrize("mode", [MetadataMode.ALL, MetadataMode.EMBED, MetadataMode.NONE])
def test_spans_are_places_in_the_node_s_own_text(mode):
    """Not in the metadata that are read with it; they are in no text, and the next reranker reads what the first one did."""
    text = "It is wet here. Who won the game? Nobody.\n"
    node = TextNode(text=text, metadata={"title": "Who won the game?"}, start_char_idx=7, end_char_idx=49)
    [encoded] = KalmPassageEncoder(FakeReranker(), metadata_mode=mode)([node])
    rerank = KalmRerank(FakeReranker(), metadata_mode=mode, highlight=True, strip_encodings=False)
    [found] = rerank.postprocess_nodes(scored([encoded]), query_str=QUERY)
    spans = found.node.metadata["relevant_spans"]
    assert [text[span["start"] : span["end"]] for span in spans] == ["Who won the game?", "It is wet here.", "Nobody."]
    assert not any("span" in found.node.get_content(shown) for shown in (MetadataMode.LLM, MetadataMode.EMBED))
    after = FakeReranker()
    KalmRerank(after, metadata_mode=mode).postprocess_nodes([found], query_str=QUERY)
    assert after.stats.passages_encoded == 0
    rerank.prune, rerank.prune_threshold = True, 0.5
    [cut] = rerank.postprocess_nodes(scored([encoded]), query_str=QUERY)
    assert (cut.node.text, cut.node.node_id) == ("Who won the game?", node.node_id)
    assert (cut.node.start_char_idx, cut.node.end_char_idx) == (7, 49)
    assert not any("span" in cut.node.get_content(shown) for shown in (MetadataMode.LLM, MetadataMode.EMBED))
    assert encoded.text == text


def test_other_kinds_of_nodes_are_cut_too():
    text = "It is wet here. Who won the game?"
    nodes = [Document(text=text), ImageNode(text=text), IndexNode(text=text, index_id="index")]
    rerank = KalmRerank(FakeReranker(), prune=True, prune_threshold=0.5)
    returned = rerank.postprocess_nodes(scored(nodes), query_str=QUERY)
    assert [type(node.node) for node in returned] == [Document, ImageNode, IndexNode]
    assert [node.node.get_content() for node in returned] == ["Who won the game?"] * 3
    assert [node.get_content() for node in nodes] == [text] * 3


def test_text_that_a_template_changes_has_no_spans():
    """The node's own text does not stand in what is read."""
    node = TextNode(text="It is wet. Who won?", metadata={"a": "b"}, text_template="{content!r:.12} {metadata_str}")
    rerank = KalmRerank(FakeReranker(), highlight=True, prune=True, prune_threshold=0.5)
    [found] = rerank.postprocess_nodes(scored([node]), query_str=QUERY)
    assert (found.node.text, found.node.metadata["relevant_spans"]) == (node.text, [])


def test_components_survive_serialisation(tiny_checkpoint):
    settings = {"top_n": 2, "score_threshold": 0.1, "metadata_mode": "llm", "model_kwargs": {"cache_bytes": 0}}
    settings |= {"fusion": "z_score", "fusion_weight": 0.25, "calibration": {"temperature": 2.0, "bias": -1.0}}
    settings |= {"highlight": True, "prune": True, "prune_threshold": 0.125}
    postprocessor = KalmRerank(tiny_checkpoint, write_back=print, **settings)
    encoder = KalmPassageEncoder(tiny_checkpoint, compression_ratio=2, metadata_mode="all", model_kwargs={"cache_bytes": 0})
    for component in (postprocessor, encoder):
        assert type(component).from_json(component.to_json()).to_dict() == component.to_dict()
        assert pickle.loads(pickle.dumps(component)).to_dict() == component.to_dict()
    assert KalmRerank.from_dict(postprocessor.to_dict()).model == str(tiny_checkpoint)
    assert json.loads(KalmRerank(FakeReranker()).to_json())["model"] == f"FakeReranker:{FakeReranker().fingerprint}"
    postprocessor.fusion, postprocessor.prune = None, False
    assert KalmRerank.from_dict(postprocessor.to_dict()).to_dict() == postprocessor.to_dict()


def test_copies_report_to_the_same_handlers():
    """Handlers hold locks and connections; a copy of one would report to nobody."""
    debug = LlamaDebugHandler(print_trace_on_end=False)
    original = KalmRerank(FakeReranker(), callback_manager=CallbackManager([debug]))
    for made in (copy.copy(original), copy.deepcopy(original), original.model_copy(deep=True)):
        rerank(made, make_nodes())
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 3


def test_a_query_engine_sets_the_callback_manager():
    debug, postprocessor = LlamaDebugHandler(print_trace_on_end=False), KalmRerank(FakeReranker())
    RetrieverQueryEngine(
        WordRetriever(make_nodes()),
        get_response_synthesizer(MockLLM()),
        node_postprocessors=[postprocessor],
        callback_manager=CallbackManager([debug]),
    )
    rerank(postprocessor, make_nodes())
    assert debug.get_event_pairs(CBEventType.RERANKING)


def test_one_reranker_is_opened_by_many_threads(tiny_checkpoint):
    postprocessor = KalmRerank(tiny_checkpoint)
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(postprocessor.reranker)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 8
    assert len(set(map(id, opened))) == 1
    assert isinstance(opened[0], KalmReranker)


def test_defaults_are_those_a_person_would_choose():
    postprocessor = KalmRerank()
    assert (postprocessor.model, postprocessor.top_n, postprocessor.metadata_mode) == ("pico", 5, MetadataMode.EMBED)
    assert issubclass(KalmPassageEncoder, TransformComponent)


def test_the_missing_framework_is_named_with_the_pip_line(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("kalm_integrations.llama_index")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_index.core", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kalm-integrations\[llama-index\]"') as caught:
        importlib.import_module("kalm_integrations.llama_index")
    assert isinstance(caught.value.__cause__, ImportError)


def test_relationships_lose_encodings_of_relatives():
    fake = FakeReranker()
    [parent] = KalmPassageEncoder(fake)([TextNode(id_="parent", text="whole")])
    children = [parent.as_related_node_info()]
    node = TextNode(text="part", relationships={NodeRelationship.PARENT: children[0], NodeRelationship.CHILD: children})
    [ranked] = rerank(KalmRerank(fake), [node])
    assert not has_encoding(ranked.to_json())
    assert ranked.node.parent_node.node_id == "parent"
    assert ENCODING_KEY in node.parent_node.metadata
