"""The LangChain components keep their promises inside LangChain's own retrievers, pipelines, chains and tracers."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from langchain_text_splitters import CharacterTextSplitter
from tools.langchain_helpers import TEXTS, CountingEmbeddings, make_documents

from kalm_integrations import KalmReranker
from kalm_integrations.errors import EncodingError, EncodingTooLargeError, SettingsError
from kalm_integrations.hosting import wait_for_write_back
from kalm_integrations.langchain import (
    KalmCrossEncoder,
    KalmPassageEncoder,
    KalmRerank,
    KalmRetriever,
    kalm_key_encoder,
)
from kalm_integrations.testing import FakeReranker

QUERY = "where did the league rank the Panthers"
MakeReranker = Callable[..., KalmReranker]


class Page(Document):
    """A user's own kind of document."""

    number: int = 0


def encoded_documents(model: Any = None) -> list[Document]:
    return KalmPassageEncoder(model=model or FakeReranker()).transform_documents(make_documents())


def make_store(documents: list[Document]) -> InMemoryVectorStore:
    store = InMemoryVectorStore(CountingEmbeddings())
    store.add_documents(documents)
    return store


def make_retriever(documents: list[Document], k: int = 5) -> Any:
    return make_store(documents).as_retriever(search_kwargs={"k": k})


def texts(documents: Any) -> list[str]:
    return [document.page_content for document in documents]


def scores(documents: Any) -> list[float]:
    return [document.metadata["relevance_score"] for document in documents]


# What comes back


def test_results_are_copies_that_keep_id_class_and_metadata():
    page = Page("the Panthers rank", id="7", number=3, metadata={"source": "a", "relevance_score": "an older one"})
    [page] = KalmPassageEncoder(model=FakeReranker()).transform_documents([page])
    before = copy.deepcopy(page)

    [result] = KalmRerank(model=FakeReranker()).compress_documents([page], QUERY)

    assert page == before
    assert isinstance(result, Page)
    assert (result.id, result.number, result.page_content) == ("7", 3, page.page_content)
    assert result.metadata.keys() == {"source", "relevance_score"}
    assert type(result.metadata["relevance_score"]) is float
    json.dumps(result.metadata)


def test_encodings_stay_in_results_if_asked():
    documents = encoded_documents()
    [result] = KalmRerank(model=FakeReranker(), top_n=1, strip_encodings=False).compress_documents(documents, QUERY)
    assert result.metadata.keys() == {"source", "kalm_encoding", "kalm_fp", "relevance_score"}


def test_encodings_may_have_another_key():
    documents = KalmPassageEncoder(model=FakeReranker(), encoding_key="kalm_small").transform_documents(make_documents())
    assert documents[0].metadata.keys() == {"source", "kalm_small", "kalm_small_fp"}
    reranker = FakeReranker()
    results = KalmRerank(model=reranker, encoding_key="kalm_small").compress_documents(documents, QUERY)
    assert reranker.stats.passages_encoded == 0
    assert results[0].metadata.keys() == {"source", "relevance_score"}


def test_metadata_keys_that_are_not_strings_do_no_harm():
    document = Document.model_construct(page_content="text", metadata={1: "one"}, id=None)
    [result] = KalmRerank(model=FakeReranker()).compress_documents([document], QUERY)
    assert result.metadata[1] == "one"


def test_order_top_n_and_threshold():
    """Best first; the threshold comes before the cut; None returns all; the constructor's and the call's size."""
    rerank = KalmRerank(model=FakeReranker())
    documents = make_documents()
    ranked = rerank.compress_documents(documents, QUERY)
    assert texts(ranked)[0] == "The league ranked the Panthers sixth."
    assert len(ranked) == 3
    assert scores(ranked) == sorted(scores(ranked), reverse=True)
    everything = KalmRerank(model=FakeReranker(), top_n=None).compress_documents(documents, QUERY)
    assert len(everything) == len(documents)
    assert len(rerank.compress_documents(documents, QUERY, top_n=1)) == 1
    threshold = scores(everything)[1]
    above = KalmRerank(model=FakeReranker(), top_n=4, score_threshold=threshold).compress_documents(documents, QUERY)
    assert texts(above) == [d.page_content for d in everything if d.metadata["relevance_score"] >= threshold]


def test_a_retriever_s_scores_may_lie_under_any_key():
    """Also under the one that is written over, as after another reranker."""
    documents = [Document(text, metadata={"relevance_score": score}) for text, score in (("league", 2.0), ("x", 9.0))]
    rerank = KalmRerank(model=FakeReranker(), fusion="z_score", fusion_weight=0.1, first_stage_score_key="relevance_score")
    results = rerank.compress_documents(documents, "league")
    assert texts(results) == ["x", "league"]
    assert scores(results) == FakeReranker().score("league", ["x", "league"])


def test_reciprocal_ranks_take_scores_where_a_key_is_named():
    documents = [Document(text, metadata={"bm25": score}) for text, score in (("a", 1), ("b", 3), ("c", 2))]
    by_score = KalmRerank(model=FakeReranker(), fusion="reciprocal_rank", first_stage_score_key="bm25")
    assert texts(by_score.compress_documents(documents, "league")) == ["b", "c", "a"]
    by_order = KalmRerank(model=FakeReranker(), fusion="reciprocal_rank")
    assert texts(by_order.compress_documents(documents, "league")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "z_score"}, "needs first_stage_score_key, but got None; .* or use fusion='reciprocal_rank'"),
        ({"first_stage_score_key": "bm25"}, "first_stage_score_key='bm25' is for fusion, but fusion is None; set fusion too"),
    ],
)
def test_fusion_and_the_key_of_its_scores_belong_together(settings, message):
    with pytest.raises(ValueError, match=message):
        KalmRerank(model=FakeReranker(), **settings)


def test_ties_keep_their_order_and_duplicates_are_encoded_once(make_reranker: MakeReranker):
    reranker = make_reranker()
    documents = [Document("same", id=str(i)) for i in range(4)]
    results = KalmRerank(model=reranker, top_n=None).compress_documents(documents, QUERY)
    assert [document.id for document in results] == ["0", "1", "2", "3"]
    assert len(set(scores(results))) == 1
    assert reranker.stats.passages_encoded == 1


def test_nothing_in_gives_nothing_out_without_opening_a_model():
    rerank = KalmRerank(model="no/such/folder")
    assert rerank.compress_documents([], QUERY) == []
    assert asyncio.run(rerank.acompress_documents([], QUERY)) == []
    assert KalmPassageEncoder(model="no/such/folder").transform_documents([]) == []
    assert KalmCrossEncoder(model="no/such/folder").score([]) == []


# Settings


@pytest.mark.parametrize("top_n", [0, -1])
def test_top_n_that_is_not_positive_is_refused_when_it_is_set(top_n: int):
    with pytest.raises(SettingsError, match="top_n must be a positive whole number"):
        KalmRerank(top_n=top_n)
    rerank = KalmRerank(model=FakeReranker())
    with pytest.raises(SettingsError, match="top_n must be a positive whole number"):
        rerank.top_n = top_n
    assert rerank.top_n == 3
    with pytest.raises(SettingsError, match="top_n must be a positive whole number"):
        rerank.compress_documents(make_documents(), QUERY, top_n=top_n)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": 42}, "model must be an alias, a hub id, a folder, the address of a service or a reranker, but got int"),
        ({"model_kwargs": {"device": "cpu"}}, "model_kwargs must not repeat fields, but got device"),
        ({"topn": 3}, "must be out of .* but got 'topn'; did you mean 'top_n'"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        KalmRerank(**settings)


def test_components_are_cheap_and_default_to_pico():
    assert KalmRerank().model == KalmPassageEncoder().model == KalmCrossEncoder().model == "pico"
    code = "from kalm_integrations.langchain import KalmRerank; KalmRerank(); import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_reach_the_reranker(tiny_checkpoint: Path):
    rerank = KalmRerank(model=tiny_checkpoint, compression_ratio=8, device="cpu", model_kwargs={"cache_bytes": 0})
    reranker = rerank.reranker
    assert isinstance(reranker, KalmReranker)
    assert reranker.compression_ratio == 8
    for _ in range(2):
        rerank.compress_documents(make_documents()[:1], QUERY)
    assert reranker.stats.passages_encoded == 2, "cache_bytes=0 keeps nothing in memory"
    with pytest.raises(SettingsError, match="compression_ratio"):
        _ = KalmRerank(model=tiny_checkpoint, compression_ratio=0).reranker


def test_a_shared_reranker_brings_its_own_settings(make_reranker: MakeReranker):
    reranker = make_reranker()
    encoder, rerank = KalmPassageEncoder(model=reranker), KalmRerank(model=reranker, instruction="find it")
    assert encoder.reranker is rerank.reranker is reranker
    with pytest.raises(SettingsError, match="brings its own settings, but got storage_codec"):
        KalmRerank(model=reranker, storage_codec="int8").compress_documents(make_documents(), QUERY)


def test_the_reranker_is_made_once_by_many_threads_and_anew_after_a_change(tiny_checkpoint: Path):
    rerank = KalmRerank(model=tiny_checkpoint)
    barrier = threading.Barrier(8)

    def open_it(_: int) -> int:
        barrier.wait()
        return id(rerank.reranker)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(open_it, range(8)))) == 1
    first = rerank.reranker
    rerank.top_n = 1
    assert rerank.reranker is first
    rerank.compression_ratio = 16
    assert rerank.reranker is not first
    assert rerank.model_copy(update={"compression_ratio": 8}).reranker.compression_ratio == 8  # type: ignore[attr-defined]


# Encodings


def test_the_second_query_encodes_nothing(make_reranker: MakeReranker):
    reranker = make_reranker()
    rerank = KalmRerank(model=reranker)
    first = rerank.compress_documents(make_documents(), QUERY)
    assert rerank.compress_documents(make_documents(), QUERY) == first
    assert reranker.stats.passages_encoded == len(TEXTS)


def test_bad_encodings_are_counted_and_change_no_score(make_reranker: MakeReranker, other_checkpoint: Path):
    """Of another text, of another model, damaged, not a string: each is made anew."""
    good = encoded_documents(make_reranker(storage_codec="fp32"))
    [foreign] = KalmPassageEncoder(model=make_reranker(other_checkpoint)).transform_documents(make_documents()[1:2])
    value = good[2].metadata["kalm_encoding"]
    bad = [good[1].metadata["kalm_encoding"], foreign.metadata["kalm_encoding"], f"{value[:-1]}!", 7]
    documents = [
        document.model_copy(update={"metadata": {**document.metadata, "kalm_encoding": encoding}})
        for document, encoding in zip(good, bad, strict=False)
    ]

    reranker = make_reranker()
    results = KalmRerank(model=reranker, top_n=None).compress_documents(documents, QUERY)

    assert (reranker.stats.stale, reranker.stats.corrupt, reranker.stats.passages_encoded) == (2, 2, 4)
    expected = make_reranker().score(QUERY, texts(results))
    assert scores(results) == pytest.approx(expected, abs=1e-6)


def test_children_of_an_encoded_parent_do_not_use_its_encoding(make_reranker: MakeReranker):
    """Splitters copy the parent's metadata: the encoding that came along is stale, counted, and replaced by the encoder."""
    parent = Document(" ".join(TEXTS), metadata={"source": "a"})
    [parent] = KalmPassageEncoder(model=make_reranker()).transform_documents([parent])
    children = CharacterTextSplitter(separator=" ", chunk_size=60, chunk_overlap=0).split_documents([parent])
    assert all(child.metadata["kalm_encoding"] == parent.metadata["kalm_encoding"] for child in children)

    reranker = make_reranker()
    results = KalmRerank(model=reranker, top_n=None).compress_documents(children, QUERY)
    assert reranker.stats.stale == len(children) > 1
    assert scores(results) == pytest.approx(make_reranker().score(QUERY, texts(results)), abs=1e-6)

    encoder = KalmPassageEncoder(model=make_reranker())
    fresh = make_reranker()
    KalmRerank(model=fresh).compress_documents(encoder.transform_documents(children), QUERY)
    assert (fresh.stats.stale, fresh.stats.passages_encoded) == (0, 0)


def test_missing_encodings_can_be_an_error():
    documents = [*encoded_documents()[:2], *make_documents()[2:]]
    rerank = KalmRerank(model=FakeReranker(), on_missing="error")
    with pytest.raises(
        EncodingError, match=r"but 3 of 5 do not, the first being .*missing.*; encode them at ingest or run backfill"
    ):
        rerank.compress_documents(documents, QUERY)
    assert len(rerank.compress_documents(encoded_documents(), QUERY)) == 3


def test_the_instruction_may_change_per_query_without_encoding_again(make_reranker: MakeReranker):
    reranker = make_reranker()
    rerank = KalmRerank(model=reranker, top_n=None, instruction="Given a question, find the answer")
    documents = make_documents()
    default = rerank.compress_documents(documents, QUERY)
    other = rerank.compress_documents(documents, QUERY, instruction="Given a claim, find what contradicts it")
    assert dict(zip(texts(default), scores(default), strict=True)) != dict(zip(texts(other), scores(other), strict=True))
    assert reranker.stats.passages_encoded == len(documents)
    expected = reranker.score(QUERY, texts(default), "Given a question, find the answer")
    assert scores(default) == pytest.approx(expected, abs=1e-6)


def test_write_back_gets_copies_of_what_was_missing_after_scoring():
    received: list[Any] = []
    reranker = FakeReranker()

    def write_back(documents: Any) -> None:
        assert reranker.stats.passages_scored > 0
        received.extend(documents)

    rerank = KalmRerank(model=reranker, top_n=1, write_back=write_back)
    rerank.compress_documents(encoded_documents(), QUERY)
    assert wait_for_write_back(10)
    assert received == []
    plain = make_documents()[3:]
    rerank.compress_documents([*encoded_documents()[:3], *plain], QUERY)
    assert wait_for_write_back(10)
    assert received == encoded_documents()[3:]
    assert not any("kalm_encoding" in document.metadata for document in plain)


def test_a_failing_write_back_is_logged_and_the_query_answered(caplog: pytest.LogCaptureFixture):
    def write_back(_: Any) -> None:
        msg = "the store is gone"
        raise ConnectionError(msg)

    results = KalmRerank(model=FakeReranker(), write_back=write_back).compress_documents(make_documents(), QUERY)
    assert len(results) == 3
    assert wait_for_write_back(10)
    assert "could not write back the encodings of 5 documents" in caplog.text
    assert "the store is gone" in caplog.text


# The ingest side


def test_the_encoder_returns_copies_and_encodes_what_it_must(make_reranker: MakeReranker):
    reranker = make_reranker()
    encoder = KalmPassageEncoder(model=reranker)
    documents = [Page("one", id="a", number=1), Document("two"), Document("one", metadata={"k": 1})]
    before = copy.deepcopy(documents)

    encoded = encoder.transform_documents(documents)
    assert documents == before
    assert reranker.stats.passages_encoded == 2
    assert isinstance(encoded[0], Page)
    assert encoded[0].id == "a"
    assert encoded[2].metadata.keys() == {"k", "kalm_encoding", "kalm_fp"}

    fresh = make_reranker()
    again = KalmPassageEncoder(model=fresh).transform_documents([*encoded, Document("three")])
    assert fresh.stats.passages_encoded == 1
    assert again[:3] == encoded


async def test_the_encoder_works_off_the_event_loop():
    loop_thread = threading.get_ident()

    class Watched(FakeReranker):
        def encode_to_metadata(self, texts: Any, show_progress: bool = False) -> Any:
            assert threading.get_ident() != loop_thread
            return super().encode_to_metadata(texts, show_progress)

    encoded = await KalmPassageEncoder(model=Watched()).atransform_documents(make_documents())
    assert encoded == encoded_documents()


def test_the_encoder_refuses_options_it_does_not_know():
    with pytest.raises(SettingsError, match="takes only documents, but got batch_size"):
        KalmPassageEncoder(model=FakeReranker()).transform_documents(make_documents(), batch_size=3)


def test_the_encoder_draws_a_progress_bar_if_asked(make_reranker: MakeReranker, capsys: pytest.CaptureFixture[str]):
    KalmPassageEncoder(model=make_reranker()).transform_documents(make_documents())
    assert capsys.readouterr().err == ""
    KalmPassageEncoder(model=make_reranker(), show_progress=True).transform_documents(make_documents())
    assert "100%" in capsys.readouterr().err


class Milvus(InMemoryVectorStore):
    """Stands for a store whose class has this name; nothing of it is called."""

    enable_dynamic_field = False


def test_an_encoding_that_the_store_would_refuse_is_an_error_before_it_is_asked(make_reranker: MakeReranker):
    long = [Document("a long passage about wings " * 60)]
    settings = {"storage_codec": "fp32", "compression_ratio": 1}
    store = Milvus(CountingEmbeddings())
    with pytest.raises(EncodingTooLargeError, match=r"Milvus takes at most 65535 characters .* max_inline_bytes=65535"):
        KalmPassageEncoder(model=make_reranker(**settings), store=store).transform_documents(long)
    fits = KalmPassageEncoder(model=make_reranker(**settings, max_inline_bytes=65_535), store=store)
    [document] = fits.transform_documents(long)
    assert len(document.metadata["kalm_encoding"]) <= 65_535
    store.enable_dynamic_field = True
    KalmPassageEncoder(model=make_reranker(**settings), store=store).transform_documents(long)


def test_the_key_encoder_sees_text_and_the_users_metadata_only():
    [document], [other] = encoded_documents()[:1], encoded_documents(FakeReranker("other"))[:1]
    plain = make_documents()[0]
    key = kalm_key_encoder(plain)
    assert str(UUID(key)) == key
    assert kalm_key_encoder(document) == kalm_key_encoder(other) == key
    assert kalm_key_encoder(plain.model_copy(update={"metadata": {"source": "elsewhere"}})) != key
    assert kalm_key_encoder(plain.model_copy(update={"page_content": "another"})) != key
    dated = Document("a", metadata={"b": Path("x"), "a": UUID(int=1)})
    assert kalm_key_encoder(dated) == kalm_key_encoder(Document("a", metadata={"a": str(UUID(int=1)), "b": "x"}))
    with pytest.raises(SettingsError, match="but got object"):
        kalm_key_encoder(Document("a", metadata={"a": object()}))


@pytest.mark.parametrize("encoding_key", ["kalm_encoding", "vec"])
def test_the_key_encoder_leaves_out_exactly_what_the_encoder_of_that_key_adds(encoding_key: str):
    theirs = {"kalm_fpath": "/a.pdf", "kalm_encoding_date": "2026", "vec_norm": 2}
    plain = Document("a", metadata={**theirs, "source": "s"})
    [encoded] = KalmPassageEncoder(model=FakeReranker(), encoding_key=encoding_key).transform_documents([plain])
    key_encoder = partial(kalm_key_encoder, encoding_key=encoding_key)
    assert key_encoder(encoded) == key_encoder(plain)
    for name in theirs:
        changed = plain.model_copy(update={"metadata": {**plain.metadata, name: "other"}})
        assert key_encoder(changed) != key_encoder(plain)
    with pytest.raises(SettingsError, match="encoding_key must be"):
        kalm_key_encoder(plain, "")


CYCLE: dict[str, Any] = {}
CYCLE["itself"] = CYCLE


@pytest.mark.parametrize(
    "metadata",
    [{("a",): 1}, {1: "a", "b": 2}, {"a": {None: 1, "b": 2}}, {"a": {1}}, {"a": b"x"}, CYCLE, {"a": object()}],
    ids=["tuple key", "mixed keys", "mixed nested keys", "set", "bytes", "cycle", "object"],
)
def test_metadata_that_has_no_lasting_text_form_is_refused_by_the_key_encoder(metadata: dict[Any, Any]):
    with pytest.raises(SettingsError, match="metadata must be made of JSON types"):
        kalm_key_encoder(Document("a", metadata=metadata))


class PineconeVectorStore(InMemoryVectorStore):
    """Named like the store that takes 40,960 bytes of metadata, the text among them."""


def test_what_belongs_to_the_document_leaves_less_for_its_encoding(make_reranker: MakeReranker):
    store = PineconeVectorStore(CountingEmbeddings())
    document = Document("a long passage about wings " * 60, metadata={"note": "n" * 20_000})
    settings = {"storage_codec": "fp32", "compression_ratio": 1}
    with pytest.raises(EncodingTooLargeError, match=r"40960 bytes of metadata, .* take 21\d\d\d, ") as caught:
        KalmPassageEncoder(model=make_reranker(**settings), store=store).transform_documents([Document("a"), document])
    assert caught.value.index == 1
    advised = int(re.search(r"max_inline_bytes=(\d+)", str(caught.value)).group(1))
    encoder = KalmPassageEncoder(model=make_reranker(**settings, max_inline_bytes=advised), store=store)
    [encoded] = encoder.transform_documents([document])
    assert len(json.dumps({**encoded.metadata, "text": encoded.page_content})) <= 40_960


# Inside LangChain


def test_contextual_compression_retriever():
    reranker = FakeReranker()
    retriever = ContextualCompressionRetriever(
        base_compressor=KalmRerank(model=reranker, top_n=2), base_retriever=make_retriever(encoded_documents())
    )
    results = retriever.invoke(QUERY)
    assert asyncio.run(retriever.ainvoke(QUERY)) == results
    assert texts(results)[0] == "The league ranked the Panthers sixth."
    assert reranker.stats.passages_encoded == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_encoder_and_reranker_in_a_compressor_pipeline(is_async: bool):
    reranker = FakeReranker()
    splitter = CharacterTextSplitter(separator=" ", chunk_size=30, chunk_overlap=0)
    pipeline = DocumentCompressorPipeline(
        transformers=[splitter, KalmPassageEncoder(model=reranker), KalmRerank(model=reranker, top_n=2)]
    )
    documents = make_documents()
    if is_async:
        results = asyncio.run(pipeline.acompress_documents(documents, QUERY))
    else:
        results = pipeline.compress_documents(documents, QUERY)
    assert len(results) == 2
    assert reranker.stats.metadata_hits == reranker.stats.passages_encoded > len(documents)


def test_ensemble_that_returns_the_document_without_encoding_encodes_it_once(make_reranker: MakeReranker):
    """The ensemble keeps the first retriever's copy of a document; the in-memory cache makes up for it."""
    plain, encoded = make_documents(), encoded_documents(make_reranker())
    first = RunnableLambda(lambda _: plain)
    ensemble = EnsembleRetriever(retrievers=[first, make_retriever(encoded)], weights=[0.5, 0.5])
    reranker = make_reranker()
    retriever = ContextualCompressionRetriever(base_compressor=KalmRerank(model=reranker), base_retriever=ensemble)
    results = retriever.invoke(QUERY)
    n_encoded = reranker.stats.passages_encoded
    assert n_encoded == len(plain), "the ensemble no longer drops encodings: drop this test"
    assert retriever.invoke(QUERY) == results
    assert reranker.stats.passages_encoded == n_encoded


def test_the_stock_cross_encoder_reranker_gives_the_same_order(make_reranker: MakeReranker):
    """LangChain's own reranker as an oracle, on our cross-encoder."""
    stock = CrossEncoderReranker(model=KalmCrossEncoder(model=make_reranker()), top_n=4)
    ours = KalmRerank(model=make_reranker(), top_n=4)
    documents = make_documents()
    assert texts(stock.compress_documents(documents, QUERY)) == texts(ours.compress_documents(documents, QUERY))


def test_the_cross_encoder_scores_pairs_in_order_and_encodes_each_text_once(make_reranker: MakeReranker):
    reranker = make_reranker()
    pairs = [(query, text) for text in TEXTS[:3] for query in ("who?", "what?")]
    results = KalmCrossEncoder(model=reranker, instruction="find it").score(pairs)
    assert [type(score) for score in results] == [float] * 6
    assert reranker.stats.passages_encoded == 3
    expected = [make_reranker().score(query, [text], "find it")[0] for query, text in pairs]
    assert results == pytest.approx(expected, abs=1e-6)


class TestKalmRetriever(RetrieversIntegrationTests):
    """LangChain's own suite for retrievers."""

    @property
    def retriever_constructor(self) -> type[KalmRetriever]:
        return KalmRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"base_retriever": make_retriever(encoded_documents()), "reranker": KalmRerank(model=FakeReranker())}

    @property
    def retriever_query_example(self) -> str:
        return QUERY


def test_the_retriever_takes_an_instruction_per_query(make_reranker: MakeReranker):
    rerank = KalmRerank(model=make_reranker())
    retriever = KalmRetriever(base_retriever=make_retriever(make_documents()), reranker=rerank, k=2)
    plain, instructed = retriever.invoke(QUERY), retriever.invoke(QUERY, instruction="Given a claim, find the opposite")
    assert len(plain) == len(instructed) == 2
    assert scores(plain) != scores(instructed)
    assert asyncio.run(retriever.ainvoke(QUERY, instruction="Given a claim, find the opposite")) == instructed
    with pytest.raises(SettingsError, match="k must be a positive whole number"):
        KalmRetriever(base_retriever=make_retriever([]), k=0)


def test_as_a_runnable_in_a_chain():
    retriever = make_retriever(encoded_documents())
    rerank = KalmRerank(model=FakeReranker(), top_n=2)
    chain = {"query": RunnablePassthrough(), "documents": retriever} | rerank.as_runnable()
    expected = rerank.compress_documents(retriever.invoke(QUERY), QUERY)
    assert chain.invoke(QUERY) == expected
    assert asyncio.run(chain.ainvoke(QUERY)) == expected
    assert chain.batch([QUERY, QUERY]) == [expected, expected]
    step = rerank.as_runnable()
    assert len(step.invoke({"query": QUERY, "documents": make_documents(), "instruction": "find it", "top_n": 1})) == 1
    assert len(step.invoke({"query": QUERY, "documents": make_documents()}, top_n=1)) == 1
    with pytest.raises(SettingsError, match=r"the input must have query and documents, .* but has question, documents"):
        step.invoke({"question": QUERY, "documents": []})


def test_the_runnable_passes_other_keys_by():
    step = KalmRerank(model=FakeReranker(), top_n=5).as_runnable()
    given = {"query": QUERY, "documents": encoded_documents(), "history": ["..."], "user": 7}
    assert step.invoke({**given, "top_n": 1}) == step.invoke(given)[:1]
    with pytest.raises(SettingsError, match="must have query and documents"):
        step.invoke({"question": QUERY, "documents": []})


@pytest.mark.parametrize("is_async", [False, True])
def test_the_runnable_works_as_a_tool(is_async: bool):
    """Its arguments are described, and come as JSON or as documents."""
    tool = KalmRerank(model=FakeReranker(), top_n=1).as_runnable().as_tool(name="rerank", description="Find the best.")
    assert {"query", "documents", "instruction", "top_n"} == set(tool.args)
    for documents in (make_documents(), [{"page_content": d.page_content} for d in make_documents()]):
        arguments = {"query": QUERY, "documents": documents}
        [best] = asyncio.run(tool.ainvoke(arguments)) if is_async else tool.invoke(arguments)
        assert (
            best.page_content == KalmRerank(model=FakeReranker()).compress_documents(make_documents(), QUERY)[0].page_content
        )


@pytest.mark.parametrize("retriever_kind", ["compression", "kalm"])
def test_no_encoding_reaches_a_prompt(retriever_kind: str):
    """The careless chain, which prints documents whole, gets none either."""
    base, rerank = make_retriever(encoded_documents()), KalmRerank(model=FakeReranker())
    if retriever_kind == "kalm":
        retriever: Any = KalmRetriever(base_retriever=base, reranker=rerank)
    else:
        retriever = ContextualCompressionRetriever(base_compressor=rerank, base_retriever=base)
    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    text = ({"context": retriever, "question": RunnablePassthrough()} | prompt).invoke(QUERY).to_string()
    assert "The league ranked the Panthers sixth." in text
    assert "kalm" not in text


# Tracing


class Recorder(BaseCallbackHandler):
    """Keeps every event of a tracer."""

    def __init__(self) -> None:
        self.runs: dict[UUID, dict[str, Any]] = {}

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kw: Any
    ) -> None:
        self.runs[run_id] = {"name": kw.get("name"), "parent": parent_run_id, "inputs": inputs}

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.runs[run_id]["outputs"] = outputs

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self.runs[run_id]["error"] = error

    def on_retriever_start(self, serialized: Any, query: str, *, run_id: UUID, **kwargs: Any) -> None:
        self.runs[run_id] = {"name": kwargs.get("name"), "inputs": query}

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.runs[run_id]["outputs"] = documents

    def named(self, name: str) -> list[dict[str, Any]]:
        return [run for run in self.runs.values() if run["name"] == name]


class AsyncRecorder(Recorder, AsyncCallbackHandler):
    """The same, called on the event loop."""

    async def on_chain_start(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        Recorder.on_chain_start(self, *args, **kwargs)

    async def on_chain_end(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        Recorder.on_chain_end(self, *args, **kwargs)

    async def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        Recorder.on_retriever_start(self, *args, **kwargs)

    async def on_retriever_end(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        Recorder.on_retriever_end(self, *args, **kwargs)


@pytest.mark.parametrize("mode", ["sync", "async", "async handler"])
def test_tracers_see_a_child_run_with_counts_and_no_payload(mode: str):
    documents = [*encoded_documents()[:3], *make_documents()[3:]]
    retriever = ContextualCompressionRetriever(
        base_compressor=KalmRerank(model=FakeReranker(), top_n=2), base_retriever=make_retriever(documents)
    )
    recorder = AsyncRecorder() if mode == "async handler" else Recorder()
    config = {"callbacks": [recorder]}
    if mode == "sync":
        retriever.invoke(QUERY, config)
    else:
        asyncio.run(retriever.ainvoke(QUERY, config))

    [run] = recorder.named("KalmRerank")
    assert run["inputs"] == {"query": QUERY, "n_documents": 5}
    assert run["outputs"] == {"n_stored": 3, "n_missing": 2, "n_returned": 2}
    parent = recorder.runs[run["parent"]]
    assert parent["name"] == "ContextualCompressionRetriever"
    assert "kalm" not in str(parent["outputs"])


@pytest.mark.parametrize("is_async", [False, True])
def test_the_runnable_hands_tracers_no_documents_of_its_own(is_async: bool):
    recorder = Recorder()
    step = KalmRerank(model=FakeReranker()).as_runnable()
    arguments: Any = ({"query": QUERY, "documents": encoded_documents()}, {"callbacks": [recorder], "run_name": "my rerank"})
    asyncio.run(step.ainvoke(*arguments)) if is_async else step.invoke(*arguments)
    assert [run["name"] for run in recorder.runs.values()] == ["my rerank"]
    assert "kalm1" not in str(recorder.runs)


def test_tracers_see_errors():
    rerank = KalmRerank(model=FakeReranker(), on_missing="error")
    recorder = Recorder()
    with pytest.raises(EncodingError):
        rerank.compress_documents(make_documents(), QUERY, [recorder])
    with pytest.raises(EncodingError):
        asyncio.run(rerank.acompress_documents(make_documents(), QUERY, [recorder]))
    assert [type(run["error"]) for run in recorder.named("KalmRerank")] == [EncodingError] * 2


# Under load


async def test_async_reranking_works_off_the_event_loop():
    loop_thread = threading.get_ident()

    class Watched(FakeReranker):
        def rank(self, *args: Any, **kwargs: Any) -> Any:
            assert threading.get_ident() != loop_thread
            return super().rank(*args, **kwargs)

    rerank = KalmRerank(model=Watched())
    assert len(await rerank.acompress_documents(make_documents(), QUERY)) == 3
    assert len(await rerank.as_runnable().ainvoke({"query": QUERY, "documents": make_documents()})) == 3


async def test_fifty_concurrent_queries_encode_each_passage_once(make_reranker: MakeReranker):
    reranker = make_reranker()
    rerank = KalmRerank(model=reranker, top_n=None)
    retriever = KalmRetriever(base_retriever=make_retriever(make_documents()), reranker=rerank, k=5)
    queries = [f"{QUERY} number {i}" for i in range(50)]
    results = await asyncio.gather(*(retriever.ainvoke(query) for query in queries))
    assert reranker.stats.passages_encoded == len(TEXTS)
    alone = make_reranker()
    for query, result in list(zip(queries, results, strict=True))[::10]:
        assert scores(result) == pytest.approx(alone.score(query, texts(result)), abs=1e-6)


# Without the extra


def test_without_langchain_core_the_import_names_the_pip_line():
    code = """
import sys
sys.modules["langchain_core"] = None
try:
    import kalm_integrations.langchain
except ImportError as error:
    from kalm_integrations.errors import MissingExtraError
    assert isinstance(error, MissingExtraError), error
    assert 'pip install "kalm-integrations[langchain]"' in str(error), error
    assert isinstance(error.__cause__, ModuleNotFoundError), error.__cause__
else:
    raise AssertionError("imported without langchain-core")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
