"""The Haystack components: the contract of Haystack's own rankers and embedders, and what encodings add to it."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from haystack import Document, Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.joiners import DocumentJoiner
from haystack.components.preprocessors import DocumentSplitter
from haystack.core.errors import DeserializationError
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import ComponentDevice, Device, DeviceMap, Secret

from haystack_integrations.components.embedders.kalm import KalmDocumentEncoder
from haystack_integrations.components.rankers.kalm import KalmRanker
from kalm_integrations import KalmReranker
from kalm_integrations.errors import CheckpointNotFoundError, EncodingError, SettingsError
from kalm_integrations.hosting import wait_for_write_back
from kalm_integrations.testing import FakeReranker

TEXTS = ["Berlin is large", "Belgrade lies on the Danube", "Sarajevo is the capital of Bosnia"]
QUERY = "capital of Bosnia"
DEFAULT_TOKEN = {"type": "env_var", "env_vars": ["HF_API_TOKEN", "HF_TOKEN"], "strict": False}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Whatever a test does, it causes no warning; Haystack warns of documents that are changed in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def in_memory_store() -> InMemoryDocumentStore:
    return InMemoryDocumentStore()


def documents(*texts: str, **meta: object) -> list[Document]:
    return [Document(content=text, meta=dict(meta)) for text in texts or TEXTS]


def contents(result: dict[str, list[Document]]) -> list[str | None]:
    return [document.content for document in result["documents"]]


def encoded(reranker: object, *texts: str) -> list[Document]:
    return KalmDocumentEncoder(model=reranker, progress_bar=False).run(documents(*texts))["documents"]


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    offline = {"PATH": "", "HF_HUB_OFFLINE": "1", "HAYSTACK_TELEMETRY_ENABLED": "false"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**offline, **environment})


class TestRankerConstruction:
    def test_defaults(self) -> None:
        ranker = KalmRanker()
        assert (ranker.model, ranker.top_k, ranker.score_threshold, ranker.device) == ("pico", 10, None, None)
        assert (ranker.meta_fields_to_embed, ranker.embedding_separator, ranker.strip_encodings) == ([], "\n", True)
        assert ranker.token == Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False)

    def test_a_missing_checkpoint_is_no_matter_until_warm_up(self, tmp_path: Path) -> None:
        ranker = KalmRanker(model=tmp_path / "nowhere")
        with pytest.raises(CheckpointNotFoundError):
            ranker.warm_up()

    @pytest.mark.parametrize("top_k", [0, -1])
    def test_top_k_must_be_positive(self, top_k: int) -> None:
        with pytest.raises(ValueError, match=f"top_k must be a positive whole number, or None for all, but got {top_k}"):
            KalmRanker(top_k=top_k)

    def test_a_store_that_cannot_be_updated_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="document_store must have update_by_filter, but object has not"):
            KalmRanker(document_store=object())

    @pytest.mark.parametrize("kind", [KalmRanker, KalmDocumentEncoder])
    @pytest.mark.parametrize(
        ("parameters", "rule"),
        [
            ({"meta_fields_to_embed": "title"}, "must be a list of strings, but got 'title'; put the name into a list"),
            ({"meta_fields_to_embed": ["title", 5]}, "meta_fields_to_embed.1: Input should be a valid string, but got 5"),
            ({"embedding_separator": None}, "embedding_separator: Input should be a valid string, but got None"),
            ({"device": "nonsense"}, "device must be None, one ComponentDevice, or a name .* but got 'nonsense'"),
            ({"device": ComponentDevice.from_multiple(DeviceMap({"a": Device.cpu()}))}, "device must be None, one Comp"),
            ({"token": 5}, "token: Input should be an instance of Secret, but got int"),
        ],
    )
    def test_a_bad_shared_value_is_refused(self, kind: Any, parameters: dict[str, object], rule: str) -> None:
        """Before anything is loaded, with the name of the component and of the parameter."""
        with pytest.raises(SettingsError, match=f"of {kind.__name__}\\b.*{rule}"):
            kind(**parameters)

    @pytest.mark.parametrize(
        ("batch_size", "rule"), [(0, "should be greater than 0"), (True, "valid integer"), ("2", "valid integer")]
    )
    def test_a_bad_batch_size_is_refused(self, batch_size: object, rule: str) -> None:
        with pytest.raises(SettingsError, match=f"batch_size: .*{rule}, but got {batch_size!r}"):
            KalmDocumentEncoder(batch_size=batch_size)
        with pytest.raises(SettingsError, match="model_kwargs must not repeat batch_size"):
            KalmDocumentEncoder(model_kwargs={"encode_batch_size": 2})

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), ComponentDevice.from_str("cpu")])
    def test_a_device_is_kept_as_haystacks(self, tiny_checkpoint: Path, device: object) -> None:
        ranker = KalmRanker(model=tiny_checkpoint, device=device)
        assert ranker.device == ComponentDevice.from_str("cpu")
        assert ranker.to_dict()["init_parameters"]["device"] == {"type": "single", "device": "cpu"}
        assert ranker.reranker.runtime.device.type == "cpu"

    def test_two_ways_to_write_back_are_refused(self, in_memory_store: InMemoryDocumentStore) -> None:
        with pytest.raises(SettingsError, match="got both"):
            KalmRanker(document_store=in_memory_store, write_back=print)

    def test_fetching_needs_one_way_to_fetch(self, in_memory_store: InMemoryDocumentStore) -> None:
        with pytest.raises(SettingsError, match="got both"):
            KalmRanker(document_store=in_memory_store, fetch_encodings=True, fetch=print)
        with pytest.raises(SettingsError, match="fetch_encodings=True needs document_store"):
            KalmRanker(fetch_encodings=True)

    def test_parameters_are_keyword_only(self) -> None:
        with pytest.raises(TypeError):
            KalmRanker("pico")

    def test_warm_up_opens_the_checkpoint_once_and_loads_the_decoder_only(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        # A copy, because rerankers of the same folder share their weights with other tests.
        own = shutil.copytree(tiny_checkpoint, tmp_path / "own")
        ranker = KalmRanker(model=own, dtype="float32", device=ComponentDevice.from_str("cpu"))
        ranker.warm_up()
        reranker = ranker.reranker
        ranker.warm_up()
        assert ranker.reranker is reranker
        assert reranker.runtime.loaded == ("decoder",)

    def test_settings_reach_the_model(self, tiny_checkpoint: Path) -> None:
        ranker = KalmRanker(model=tiny_checkpoint, compression_ratio=8, max_passage_tokens=7, model_kwargs={"cache_bytes": 0})
        assert ranker.reranker.compression_ratio == 8
        assert ranker.reranker.fingerprint != KalmRanker(model=tiny_checkpoint).reranker.fingerprint


class TestAssignment:
    """Parameters are attributes, which may be assigned at any time."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("meta_fields_to_embed", "title"),
            ("write_back", print),  # there is a document_store
            ("device", "nonsense"),
            ("reranker", FakeReranker()),
        ],
    )
    def test_what_is_refused_changes_nothing(self, in_memory_store: InMemoryDocumentStore, name: str, value: object) -> None:
        ranker = KalmRanker(document_store=in_memory_store)
        before = ranker.to_dict()
        with pytest.raises(SettingsError):
            setattr(ranker, name, value)
        assert ranker.to_dict() == before

    @pytest.mark.parametrize(
        ("settings", "off"),
        [
            ({"fusion": "z_score", "fusion_weight": 0.9}, {"fusion": None}),
            ({"prune": True, "prune_threshold": 0.1}, {"prune": False}),
        ],
    )
    def test_what_is_left_without_effect_does_not_enter_yaml(
        self, settings: dict[str, object], off: dict[str, object]
    ) -> None:
        """The constructor would refuse it."""
        ranker = KalmRanker(**settings)
        [(name, value)] = off.items()
        setattr(ranker, name, value)
        assert KalmRanker.from_dict(ranker.to_dict()).to_dict() == ranker.to_dict()

    def test_fetching_may_be_left_without_a_store(self, in_memory_store: InMemoryDocumentStore) -> None:
        """It does not enter YAML then, for the constructor would refuse it."""
        ranker = KalmRanker(model=FakeReranker(), document_store=in_memory_store, fetch_encodings=True)
        ranker.document_store = None
        assert len(ranker.run(QUERY, documents())["documents"]) == len(documents())
        ranker.model = "pico"
        assert KalmRanker.from_dict(ranker.to_dict()).fetch_encodings is False

    def test_a_missing_attribute_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no_such_parameter"):
            _ = KalmRanker().no_such_parameter


COPIES = [copy.copy, copy.deepcopy, lambda component: pickle.loads(pickle.dumps(component))]


class TestCopies:
    @pytest.mark.parametrize("copied", COPIES)
    def test_components_of_a_pipeline_can_be_copied_after_use(
        self, copied: Callable[[Any], Any], tiny_checkpoint: Path
    ) -> None:
        """The copy has the parameters, and is in no pipeline."""
        pipeline = Pipeline()
        pipeline.add_component("encoder", KalmDocumentEncoder(model=tiny_checkpoint, progress_bar=False, batch_size=2))
        pipeline.add_component("ranker", KalmRanker(model=tiny_checkpoint, top_k=2, model_kwargs={"cache_bytes": 0}))
        pipeline.connect("encoder", "ranker")
        arguments = {"encoder": {"documents": documents()}, "ranker": {"query": QUERY}}
        expected = pipeline.run(arguments)
        other = Pipeline()
        for name in ("encoder", "ranker"):
            other.add_component(name, copied(pipeline.get_component(name)))
        other.connect("encoder", "ranker")
        assert other.run(arguments) == expected
        assert other.dumps() == pipeline.dumps()
        other.get_component("ranker").top_k = 1
        assert pipeline.get_component("ranker").top_k == 2

    def test_a_pipeline_can_be_copied_after_use(self, tiny_checkpoint: Path) -> None:
        pipeline = Pipeline()
        pipeline.add_component("encoder", KalmDocumentEncoder(model=tiny_checkpoint, progress_bar=False))
        pipeline.add_component("ranker", KalmRanker(model=tiny_checkpoint))
        pipeline.connect("encoder", "ranker")
        arguments = {"encoder": {"documents": documents()}, "ranker": {"query": QUERY}}
        expected = pipeline.run(arguments)
        copied = copy.deepcopy(pipeline)
        assert copied.run(arguments) == expected
        assert copied.get_component("ranker").reranker is pipeline.get_component("ranker").reranker
        copied.remove_component("encoder")
        assert pipeline.run(arguments) == expected

    def test_a_document_store_is_shared_by_copies_and_refused_by_pickles(self, in_memory_store: InMemoryDocumentStore) -> None:
        ranker = KalmRanker(document_store=in_memory_store)
        assert copy.copy(ranker).document_store is copy.deepcopy(ranker).document_store is in_memory_store
        with pytest.raises(SettingsError, match=r"must have no document_store .* but got a InMemoryDocumentStore"):
            pickle.dumps(ranker)


class TestRankerRun:
    def test_best_first_with_float_scores(self, make_reranker: Callable[..., KalmReranker]) -> None:
        """Order and scores are the reranker's own, and the scores are Python floats that JSON takes."""
        ranked = KalmRanker(model=make_reranker()).run(query=QUERY, documents=documents())["documents"]
        expected = make_reranker().rank(QUERY, TEXTS)
        assert [(d.content, d.score) for d in ranked] == [(TEXTS[r.index], r.score) for r in expected]
        assert all(type(document.score) is float for document in ranked)
        json.dumps([document.to_dict() for document in ranked])

    def test_inputs_are_untouched_and_ids_kept(self, make_reranker: Callable[..., KalmReranker]) -> None:
        given = [replace(document, score=0.1, embedding=[1.0]) for document in encoded(make_reranker(), *TEXTS)]
        before = copy.deepcopy(given)
        ranked = KalmRanker(model=make_reranker()).run(query=QUERY, documents=given)["documents"]
        assert given == before
        assert {d.id for d in ranked} == {d.id for d in given}
        assert all(d.embedding == [1.0] for d in ranked)
        ranked[0].meta["new"] = 1
        assert given == before

    def test_no_documents_no_loading(self, tmp_path: Path) -> None:
        ranker = KalmRanker(model=tmp_path / "nowhere")
        assert ranker.run(query=QUERY, documents=[]) == {"documents": []}

    def test_an_empty_query_is_refused(self) -> None:
        with pytest.raises(ValueError, match="query must be a non-empty string, but got ''"):
            KalmRanker(model=FakeReranker()).run(query="", documents=documents())

    @pytest.mark.parametrize("top_k", [0, -3])
    def test_runtime_top_k_must_be_positive(self, top_k: int) -> None:
        """A zero does not fall back to the instance's top_k, with documents or without."""
        for given in (documents(), []):
            with pytest.raises(ValueError, match=f"top_k must be a positive whole number, .*but got {top_k}"):
                KalmRanker(model=FakeReranker()).run(query=QUERY, documents=given, top_k=top_k)

    def test_top_k_cuts_and_the_call_overrides_the_instance(self) -> None:
        ranker = KalmRanker(model=FakeReranker(), top_k=2)
        assert len(ranker.run(query=QUERY, documents=documents())["documents"]) == 2
        assert contents(ranker.run(query=QUERY, documents=documents(), top_k=1)) == [TEXTS[2]]
        assert len(ranker.run(query=QUERY, documents=documents(), top_k=99)["documents"]) == 3
        eleven = documents(*map(str, range(11)))
        assert len(KalmRanker(model=FakeReranker(), top_k=None).run(QUERY, eleven)["documents"]) == 11

    def test_a_single_document(self) -> None:
        assert contents(KalmRanker(model=FakeReranker()).run(query=QUERY, documents=documents("Berlin"))) == ["Berlin"]

    def test_the_threshold_applies_before_the_cut(self) -> None:
        ranker = KalmRanker(model=FakeReranker(), score_threshold=0.5, top_k=2)
        assert contents(ranker.run(query=QUERY, documents=documents())) == [TEXTS[2]]

    def test_a_threshold_of_zero_overrides_the_instance(self) -> None:
        ranker = KalmRanker(model=FakeReranker(), score_threshold=0.5)
        assert len(ranker.run(query=QUERY, documents=documents(), score_threshold=0.0)["documents"]) == 3

    def test_ties_keep_their_order(self) -> None:
        texts = ["same words a", "same words b", "same words c"]
        assert contents(KalmRanker(model=FakeReranker()).run(query="same", documents=documents(*texts))) == texts

    def test_duplicates_by_id_keep_the_highest_retrieval_score(self) -> None:
        given = [
            Document(id="duplicate", content="drop me", score=0.1),
            Document(id="unscored", content="keep the first"),
            Document(id="duplicate", content="keep me", score=0.9),
            Document(id="unscored", content="drop the second"),
        ]
        ranked = KalmRanker(model=FakeReranker()).run(query="keep", documents=given)
        assert sorted(contents(ranked)) == ["keep me", "keep the first"]

    def test_documents_without_text_are_scored_as_empty(self, make_reranker: Callable[..., KalmReranker]) -> None:
        given = [Document(content=None, meta={"image": "a.png"}), *documents()]
        ranked = KalmRanker(model=make_reranker()).run(query=QUERY, documents=given)["documents"]
        expected = make_reranker().score(QUERY, [""])
        assert [d.score for d in ranked if d.content is None] == pytest.approx(expected, abs=1e-6)

    def test_the_instruction_changes_scores_and_no_encoding(self, make_reranker: Callable[..., KalmReranker]) -> None:
        reranker = make_reranker()
        given = encoded(reranker, *TEXTS)
        plain, instance, call = (
            KalmRanker(model=make_reranker(), instruction=own).run(query=QUERY, documents=given, instruction=runtime)
            for own, runtime in ((None, None), ("Find cities.", None), ("Find cities.", "Find rivers."))
        )
        expected = {i: make_reranker().score(QUERY, TEXTS, instruction=i) for i in (None, "Find cities.", "Find rivers.")}
        for result, scores in (
            (plain, expected[None]),
            (instance, expected["Find cities."]),
            (call, expected["Find rivers."]),
        ):
            assert sorted(d.score for d in result["documents"]) == pytest.approx(sorted(scores), abs=1e-3)
        assert len({result["documents"][0].score for result in (plain, instance, call)}) == 3
        assert reranker.stats.passages_encoded == 3


class TestPassageText:
    """Ranker and encoder read the same text, as Haystack's own components put it together."""

    @pytest.mark.parametrize(
        ("meta", "fields", "separator", "expected"),
        [
            ({"title": "Cities"}, ["title"], "\n", "Cities\nSarajevo"),
            ({"title": "Cities"}, ["title"], " | ", "Cities | Sarajevo"),
            ({"rating": 0, "free": False, "none": None}, ["rating", "free", "missing", "none"], "\n", "0\nFalse\nSarajevo"),
            ({"a": "x", "b": "y"}, ["b", "a"], "\n", "y\nx\nSarajevo"),
            ({"a": "x", "kalm_fp": "f", "kalm_encoding": "e"}, ["kalm_encoding", "a", "kalm_fp"], "\n", "x\nSarajevo"),
        ],
    )
    def test_meta_fields_come_first(self, meta: dict[str, object], fields: list[str], separator: str, expected: str) -> None:
        reranker = FakeReranker()
        layout = {"meta_fields_to_embed": fields, "embedding_separator": separator}
        encoder = KalmDocumentEncoder(model=reranker, progress_bar=False, **layout)
        made = encoder.run([Document(content="Sarajevo", meta=meta)])["documents"]
        assert made[0].meta["kalm_encoding"] == FakeReranker().encode_to_metadata([expected])[0]["kalm_encoding"]
        KalmRanker(model=reranker, on_missing="error", **layout).run(query=QUERY, documents=made)

    def test_another_layout_is_another_text(self) -> None:
        """An encoding made without a meta field does not serve a ranker that reads it."""
        given = encoded(FakeReranker(), "Sarajevo")
        given = [replace(document, meta={**document.meta, "title": "Cities"}) for document in given]
        with pytest.raises(EncodingError):
            KalmRanker(model=FakeReranker(), meta_fields_to_embed=["title"], on_missing="error").run(QUERY, given)

    def test_spans_are_places_in_the_content(self) -> None:
        """What the ranker reads in front of it is in none of them, and is never cut."""
        layout = {"meta_fields_to_embed": ["title"], "embedding_separator": " "}
        ranker = KalmRanker(model=FakeReranker(), highlight=True, prune=True, prune_threshold=0.6, **layout)
        text = "It is wet here. Who won the game? Nobody."
        [document] = ranker.run("who won the game", [Document(content=text, meta={"title": "The game"})])["documents"]
        assert [text[span["start"] : span["end"]] for span in document.meta["relevant_spans"]] == [
            "Who won the game?",
            "It is wet here.",
            "Nobody.",
        ]
        assert (document.content, document.meta["title"]) == ("Who won the game?", "The game")

    def test_without_content_there_are_no_spans(self) -> None:
        ranker = KalmRanker(model=FakeReranker(), highlight=True, prune=True, meta_fields_to_embed=["title"])
        [document] = ranker.run(QUERY, [Document(content=None, meta={"title": "A title. Another."})])["documents"]
        assert document.content is None
        assert (document.meta["relevant_spans"], document.meta["kept_spans"]) == ([], [])


class TestEncodings:
    def test_encoded_documents_cost_no_encoder(self, make_reranker: Callable[..., KalmReranker]) -> None:
        given = encoded(make_reranker(), *TEXTS)
        reranker = make_reranker()
        KalmRanker(model=reranker).run(query=QUERY, documents=given)
        assert (reranker.stats.passages_encoded, reranker.stats.metadata_hits) == (0, 3)

    def test_what_is_missing_is_encoded(self, make_reranker: Callable[..., KalmReranker]) -> None:
        given = [*encoded(make_reranker(), *TEXTS[:2]), *documents(TEXTS[2])]
        reranker = make_reranker()
        assert len(KalmRanker(model=reranker).run(query=QUERY, documents=given)["documents"]) == 3
        assert (reranker.stats.passages_encoded, reranker.stats.metadata_hits) == (1, 2)

    def test_a_hundred_copies_are_encoded_once(self, make_reranker: Callable[..., KalmReranker]) -> None:
        reranker = make_reranker()
        given = [Document(id=str(index), content=TEXTS[0]) for index in range(100)]
        ranked = KalmRanker(model=reranker, top_k=100).run(query=QUERY, documents=given)["documents"]
        assert [document.id for document in ranked] == [str(index) for index in range(100)]
        assert reranker.stats.passages_encoded == 1

    @pytest.mark.parametrize("value", ["nonsense", "kalm1.e30.AAAA", "", 7, None, b"bytes", ["list"]])
    def test_a_corrupt_value_is_a_miss(self, make_reranker: Callable[..., KalmReranker], value: object) -> None:
        reranker = make_reranker()
        ranked = KalmRanker(model=reranker).run(query=QUERY, documents=documents(TEXTS[0], kalm_encoding=value))["documents"]
        assert ranked[0].score == make_reranker().score(QUERY, [TEXTS[0]])[0]
        assert (reranker.stats.passages_encoded, reranker.stats.corrupt) == (1, int(value is not None))

    def test_changed_text_is_stale(self, make_reranker: Callable[..., KalmReranker]) -> None:
        given = [replace(document, content=TEXTS[1]) for document in encoded(make_reranker(), TEXTS[0])]
        reranker = make_reranker()
        ranked = KalmRanker(model=reranker).run(query=QUERY, documents=given)["documents"]
        assert ranked[0].score == make_reranker().score(QUERY, [TEXTS[1]])[0]
        assert (reranker.stats.passages_encoded, reranker.stats.stale) == (1, 1)

    def test_another_model_is_stale(self, make_reranker: Callable[..., KalmReranker], other_checkpoint: Path) -> None:
        given = encoded(make_reranker(other_checkpoint), TEXTS[0])
        reranker = make_reranker()
        ranked = KalmRanker(model=reranker).run(query=QUERY, documents=given)["documents"]
        assert ranked[0].score == make_reranker().score(QUERY, [TEXTS[0]])[0]
        assert reranker.stats.stale == 1

    def test_encodings_are_stripped_from_what_is_returned(self) -> None:
        given = [replace(document, meta={**document.meta, "page": 1}) for document in encoded(FakeReranker(), TEXTS[0])]
        assert KalmRanker(model=FakeReranker()).run(QUERY, given)["documents"][0].meta == {"page": 1}

    def test_encodings_can_be_kept(self) -> None:
        given = encoded(FakeReranker(), TEXTS[0])
        ranked = KalmRanker(model=FakeReranker(), strip_encodings=False).run(QUERY, given)["documents"]
        assert ranked[0].meta == given[0].meta
        assert ranked[0].meta is not given[0].meta

    def test_prompts_stay_clean(self, make_reranker: Callable[..., KalmReranker]) -> None:
        """Even a template that prints whole documents holds no encoding."""
        pipeline = Pipeline()
        pipeline.add_component("ranker", KalmRanker(model=make_reranker()))
        template = "{% for d in documents %}{{ d }} {{ d.meta }}{% endfor %} {{ documents }}"
        pipeline.add_component("prompt", PromptBuilder(template, required_variables=["documents"]))
        pipeline.connect("ranker.documents", "prompt.documents")
        given = encoded(make_reranker(), *TEXTS)
        prompt = pipeline.run({"ranker": {"query": QUERY, "documents": given}})["prompt"]["prompt"]
        assert TEXTS[0] in prompt
        assert "kalm" not in prompt

    def test_another_key(self) -> None:
        encoder = KalmDocumentEncoder(model=FakeReranker(), encoding_key="my_key", progress_bar=False)
        given = encoder.run(documents(TEXTS[0]))["documents"]
        assert given[0].meta.keys() == {"my_key", "my_key_fp"}
        ranker = KalmRanker(model=FakeReranker(), encoding_key="my_key", on_missing="error")
        assert ranker.run(QUERY, given)["documents"][0].meta == {}

    def test_on_missing_error_names_the_document(self) -> None:
        given = [*encoded(FakeReranker(), TEXTS[0]), Document(id="the-bare-one", content="text")]
        with pytest.raises(EncodingError, match=r"1 of 2 do not, .* the-bare-one \(missing\)"):
            KalmRanker(model=FakeReranker(), on_missing="error").run(query=QUERY, documents=given)

    def test_splitting_after_encoding_is_caught(self, make_reranker: Callable[..., KalmReranker]) -> None:
        """A splitter copies the parent's encoding into each part; all are found stale, counted, and made anew."""
        parent = encoded(make_reranker(), "one two three four five six")
        parts = DocumentSplitter(split_by="word", split_length=2).run(documents=parent)["documents"]
        assert [part.meta["kalm_encoding"] for part in parts] == [parent[0].meta["kalm_encoding"]] * 3
        reranker = make_reranker()
        ranked = KalmRanker(model=reranker).run(query=QUERY, documents=parts)["documents"]
        assert {d.content: d.score for d in ranked} == {
            part.content: score
            for part, score in zip(parts, make_reranker().score(QUERY, [p.content for p in parts]), strict=True)
        }
        assert (reranker.stats.stale, reranker.stats.passages_encoded) == (3, 3)

    def test_a_joiner_that_drops_the_encoded_copy_costs_one_encode(self, make_reranker: Callable[..., KalmReranker]) -> None:
        """A joiner keeps the higher-scored copy, which may lack the encoding; memory serves it from the second query on."""
        bare = replace(documents(TEXTS[0])[0], id="same", score=0.9)
        with_encoding = replace(encoded(make_reranker(), TEXTS[0])[0], id="same", score=0.1)
        reranker = make_reranker()
        ranker = KalmRanker(model=reranker)
        for _ in range(2):
            joined = DocumentJoiner().run(documents=[[bare], [with_encoding]])["documents"]
            assert joined == [bare]
            assert len(ranker.run(query=QUERY, documents=joined)["documents"]) == 1
        assert reranker.stats.passages_encoded == 1


class TestWriteBack:
    def test_a_callable_gets_the_documents_that_were_encoded(self, make_reranker: Callable[..., KalmReranker]) -> None:
        received: list[Document] = []
        reranker = make_reranker()
        given = [*encoded(make_reranker(), TEXTS[0]), *documents(*TEXTS[1:])]
        before = copy.deepcopy(given)
        ranker = KalmRanker(model=reranker, write_back=received.extend)
        ranker.run(query=QUERY, documents=given, top_k=1)
        assert wait_for_write_back(10)
        assert [d.id for d in received] == [d.id for d in given[1:]]
        assert given == before
        assert reranker.stats.passages_encoded == 2
        ranker.run(query=QUERY, documents=[given[0], *received])
        assert wait_for_write_back(10)
        assert len(received) == 2

    def test_a_failure_is_logged_and_the_query_answered(self, caplog: pytest.LogCaptureFixture) -> None:
        def fail(_: list[Document]) -> None:
            msg = "the store is away"
            raise ConnectionError(msg)

        ranker = KalmRanker(model=FakeReranker(), write_back=fail)
        assert contents(ranker.run(query=QUERY, documents=documents()))[0] == TEXTS[2]
        assert wait_for_write_back(10)
        assert "could not write back the encodings of 3 documents" in caplog.text
        assert "the store is away" in caplog.text

    def test_an_encoding_too_large_to_store_fails_no_query(
        self, make_reranker: Callable[..., KalmReranker], caplog: pytest.LogCaptureFixture
    ) -> None:
        ranker = KalmRanker(model=make_reranker(max_inline_bytes=10), write_back=print)
        assert len(ranker.run(query=QUERY, documents=documents())["documents"]) == 3
        assert wait_for_write_back(10)
        assert "max_inline_bytes=10" in caplog.text


class TestAsync:
    async def test_run_async_gives_what_run_gives(self, make_reranker: Callable[..., KalmReranker]) -> None:
        ranker = KalmRanker(model=make_reranker())
        arguments = {"query": QUERY, "documents": documents(), "top_k": 2, "score_threshold": 0.0, "instruction": "Find it."}
        assert await ranker.run_async(**arguments) == ranker.run(**arguments)

    async def test_fifty_concurrent_queries(self, tiny_checkpoint: Path) -> None:
        """Concurrent pipeline runs share one reranker, encode each text once, and get each the answer to its own query."""
        pipeline = Pipeline()
        pipeline.add_component("ranker", KalmRanker(model=tiny_checkpoint))
        queries = [f"query number {index}" for index in range(50)]
        results = await asyncio.gather(
            *(pipeline.run_async({"ranker": {"query": query, "documents": documents()}}) for query in queries)
        )
        reranker = pipeline.get_component("ranker").reranker
        assert reranker.stats.passages_encoded == 3
        for query, result in zip(queries, results, strict=True):
            expected = reranker.rank(query, TEXTS)
            assert [d.content for d in result["ranker"]["documents"]] == [TEXTS[r.index] for r in expected]
            assert [d.score for d in result["ranker"]["documents"]] == pytest.approx([r.score for r in expected], abs=1e-6)

    async def test_the_event_loop_goes_on(self) -> None:
        """While a query is scored, other coroutines run."""
        may_score = threading.Event()

        class Waiting(FakeReranker):
            def rank(self, *arguments: object, **settings: object) -> list[object]:
                assert may_score.wait(10)
                return super().rank(*arguments, **settings)

        async def give_leave() -> None:
            may_score.set()

        await asyncio.gather(KalmRanker(model=Waiting()).run_async(QUERY, documents()), give_leave())


class TestSerialisation:
    def test_defaults(self) -> None:
        assert KalmRanker().to_dict() == {
            "type": "haystack_integrations.components.rankers.kalm.ranker.KalmRanker",
            "init_parameters": {
                "model": "pico",
                "revision": None,
                "device": None,
                "dtype": None,
                "token": DEFAULT_TOKEN,
                "top_k": 10,
                "score_threshold": None,
                "fusion": None,
                "fusion_weight": None,
                "instruction": None,
                "system_instruction": None,
                "meta_fields_to_embed": [],
                "embedding_separator": "\n",
                "compression_ratio": None,
                "storage_codec": None,
                "max_inline_bytes": None,
                "max_passage_tokens": None,
                "long_passages": None,
                "max_windows": None,
                "max_query_tokens": None,
                "calibration": None,
                "highlight": False,
                "prune": False,
                "prune_threshold": None,
                "strip_encodings": True,
                "encoding_key": "kalm_encoding",
                "on_missing": "encode",
                "timeout": None,
                "on_error": "raise",
                "document_store": None,
                "fetch_encodings": False,
                "write_back": None,
                "fetch": None,
                "model_kwargs": None,
            },
        }
        assert KalmDocumentEncoder().to_dict() == {
            "type": "haystack_integrations.components.embedders.kalm.document_encoder.KalmDocumentEncoder",
            "init_parameters": {
                "model": "pico",
                "revision": None,
                "device": None,
                "dtype": None,
                "token": DEFAULT_TOKEN,
                "batch_size": None,
                "progress_bar": True,
                "meta_fields_to_embed": [],
                "embedding_separator": "\n",
                "compression_ratio": None,
                "storage_codec": None,
                "max_inline_bytes": None,
                "max_passage_tokens": None,
                "long_passages": None,
                "max_windows": None,
                "encoding_key": "kalm_encoding",
                "model_kwargs": None,
            },
        }

    def test_custom_parameters_survive_a_pipeline_without_allow_list(
        self, tiny_checkpoint: Path, in_memory_store: InMemoryDocumentStore
    ) -> None:
        shared = {
            "model": tiny_checkpoint,
            "revision": None,
            "device": ComponentDevice.from_str("cpu"),
            "dtype": "float32",
            "token": Secret.from_env_var("MY_TOKEN", strict=False),
            "meta_fields_to_embed": ["title"],
            "embedding_separator": " | ",
            "compression_ratio": 8,
            "storage_codec": "int8",
            "max_inline_bytes": 30_000,
            "max_passage_tokens": 300,
            "long_passages": "windows",
            "max_windows": 7,
            "encoding_key": "my_key",
            "model_kwargs": {"cache_bytes": 0},
        }
        ranking = {
            "top_k": 3,
            "score_threshold": 0.25,
            "fusion": "z_score",
            "fusion_weight": 0.25,
            "instruction": "Find it.",
            "system_instruction": "Judge.",
            "max_query_tokens": 40,
            "calibration": {"temperature": 2.0, "bias": -1.0},
            "highlight": True,
            "prune": True,
            "prune_threshold": 0.125,
            "strip_encodings": False,
            "on_missing": "error",
            "document_store": in_memory_store,
        }
        pipeline = Pipeline()
        pipeline.add_component("encoder", KalmDocumentEncoder(**shared, batch_size=4, progress_bar=False))
        pipeline.add_component("ranker", KalmRanker(**shared, **ranking))
        loaded = Pipeline.loads(pipeline.dumps())
        assert loaded == pipeline
        ranker, encoder = loaded.get_component("ranker"), loaded.get_component("encoder")
        for name, value in {**shared, **ranking}.items():
            if name not in ("model", "document_store"):
                assert getattr(ranker, name) == value
        assert (ranker.model, encoder.model) == (str(tiny_checkpoint),) * 2
        assert (encoder.batch_size, encoder.progress_bar) == (4, False)
        assert ranker.document_store.index == in_memory_store.index

    def test_from_dict_with_no_parameters_gives_the_defaults(self) -> None:
        for kind in (KalmRanker, KalmDocumentEncoder):
            described = kind().to_dict()
            assert kind.from_dict({"type": described["type"], "init_parameters": {}}).to_dict() == described

    @pytest.mark.parametrize("token", ["hf_secret", Secret.from_token("hf_secret")])
    def test_a_plain_token_enters_neither_yaml_nor_messages(self, token: object) -> None:
        ranker = KalmRanker(token=token)
        assert ranker.token == Secret.from_token("hf_secret")
        with pytest.raises(SettingsError, match=r"Secret\.from_env_var") as caught:
            ranker.to_dict()
        with pytest.raises(SettingsError) as refused:
            KalmRanker(token=token, top_k=0)
        shown = [repr(ranker), str(vars(ranker)), *map(traceback.format_exception, (caught.value, refused.value))]
        assert "hf_secret" not in str(shown)

    def test_a_token_is_resolved_when_the_model_is_opened(self, tiny_checkpoint: Path) -> None:
        """A pipeline can be made, copied and written where its secrets are not."""
        ranker = KalmRanker(model=tiny_checkpoint, token=Secret.from_env_var("NO_SUCH_TOKEN"))
        assert copy.deepcopy(ranker).to_dict() == pickle.loads(pickle.dumps(ranker)).to_dict()
        with pytest.raises(ValueError, match="NO_SUCH_TOKEN"):
            ranker.warm_up()
        ranker.token = None
        ranker.warm_up()

    def test_what_lives_in_this_process_cannot_be_serialised(self) -> None:
        for kind in (KalmRanker, KalmDocumentEncoder):
            with pytest.raises(SettingsError, match=r"must have an alias, a hub id or a folder as model .* but got a Fake"):
                kind(model=FakeReranker()).to_dict()
            with pytest.raises(SettingsError, match=r"payload_store must be the folder of an LMDB store .* but got dict"):
                kind(model_kwargs={"payload_store": {}}).to_dict()
            stored = kind(model_kwargs={"payload_store": Path("payloads")}).to_dict()
            assert stored["init_parameters"]["model_kwargs"] == {"payload_store": "payloads"}

    def test_write_back_is_kept_by_name(self) -> None:
        ranker = KalmRanker(write_back=json.dumps)
        with pytest.raises(DeserializationError, match="json"):
            KalmRanker.from_dict(ranker.to_dict())
        pipeline = Pipeline()
        pipeline.add_component("ranker", ranker)
        assert Pipeline.loads(pipeline.dumps(), allowed_modules=["json"]).get_component("ranker").write_back is json.dumps
        with pytest.raises(SettingsError, match="write_back must be a function that can be imported by its name"):
            KalmRanker(write_back=lambda _: None).to_dict()

    def test_fetch_is_kept_by_name_and_fetch_encodings_with_its_store(self, in_memory_store: InMemoryDocumentStore) -> None:
        described = KalmRanker(fetch=print).to_dict()
        assert described["init_parameters"]["fetch"] == "builtins.print"
        with pytest.raises(SettingsError, match="fetch must be a function that can be imported by its name"):
            KalmRanker(fetch=lambda _: None).to_dict()
        pipeline = Pipeline()
        pipeline.add_component("ranker", KalmRanker(document_store=in_memory_store, fetch_encodings=True))
        assert Pipeline.loads(pipeline.dumps()).get_component("ranker").fetch_encodings is True

    def test_a_dictionary_can_be_loaded_twice(self) -> None:
        described = KalmRanker(device=ComponentDevice.from_str("cpu"), write_back=print).to_dict()
        before = copy.deepcopy(described)
        KalmRanker.from_dict(described)
        assert described == before

    def test_yaml_works_in_a_fresh_process(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        """A process that knows only the YAML gives the same scores, with zero encodes."""
        pipeline = Pipeline()
        pipeline.add_component("ranker", KalmRanker(model=tiny_checkpoint))
        given = KalmDocumentEncoder(model=tiny_checkpoint, progress_bar=False).run(documents())["documents"]
        expected = pipeline.run({"ranker": {"query": QUERY, "documents": given}})["ranker"]["documents"]
        (tmp_path / "pipeline.yaml").write_text(pipeline.dumps())
        (tmp_path / "documents.json").write_text(json.dumps([document.to_dict() for document in given]))
        code = f"""
import json, warnings
from pathlib import Path
from haystack import Document, Pipeline
folder = Path({str(tmp_path)!r})
warnings.simplefilter("error")
pipeline = Pipeline.loads((folder / "pipeline.yaml").read_text())
documents = [Document.from_dict(d) for d in json.loads((folder / "documents.json").read_text())]
ranked = pipeline.run({{"ranker": {{"query": {QUERY!r}, "documents": documents}}}})["ranker"]["documents"]
stats = pipeline.get_component("ranker").reranker.stats
print(json.dumps([stats.passages_encoded, [[d.id, d.score] for d in ranked]]))
"""
        process = in_new_process(code)
        assert process.returncode == 0, process.stderr
        n_encoded, ranked = json.loads(process.stdout)
        assert n_encoded == 0
        assert [document_id for document_id, _ in ranked] == [d.id for d in expected]
        assert [score for _, score in ranked] == pytest.approx([d.score for d in expected], abs=1e-6)

    def test_telemetry_names_the_model(self) -> None:
        assert KalmRanker()._get_telemetry_data() == {"model": "pico"}
        assert KalmRanker(model=FakeReranker())._get_telemetry_data() == {"model": "FakeReranker"}


class TestDocumentEncoder:
    def test_copies_with_encoding_and_fingerprint(self, make_reranker: Callable[..., KalmReranker]) -> None:
        given = documents(page=1)
        before = copy.deepcopy(given)
        made = KalmDocumentEncoder(model=make_reranker(), progress_bar=False).run(given)["documents"]
        assert given == before
        assert [d.id for d in made] == [d.id for d in given]
        assert [d.meta for d in made] == [{"page": 1, **metadata} for metadata in make_reranker().encode_to_metadata(TEXTS)]

    def test_encoded_documents_are_skipped(self, make_reranker: Callable[..., KalmReranker]) -> None:
        given = encoded(make_reranker(), *TEXTS)
        reranker = make_reranker()
        again = KalmDocumentEncoder(model=reranker, progress_bar=False).run([*given, Document(content="new")])["documents"]
        assert again[:3] == given
        assert reranker.stats.passages_encoded == 1

    def test_stale_and_corrupt_encodings_are_replaced(
        self, make_reranker: Callable[..., KalmReranker], other_checkpoint: Path
    ) -> None:
        stale = encoded(make_reranker(other_checkpoint), TEXTS[0])
        corrupt = documents(TEXTS[1], kalm_encoding="nonsense")
        made = KalmDocumentEncoder(model=make_reranker(), progress_bar=False).run([*stale, *corrupt])["documents"]
        assert [d.meta for d in made] == make_reranker().encode_to_metadata(TEXTS[:2])

    def test_a_lost_companion_is_put_back(self, make_reranker: Callable[..., KalmReranker]) -> None:
        whole = encoded(make_reranker(), TEXTS[0])
        bare = [replace(document, meta={"kalm_encoding": document.meta["kalm_encoding"]}) for document in whole]
        reranker = make_reranker()
        assert KalmDocumentEncoder(model=reranker, progress_bar=False).run(bare)["documents"] == whole
        assert reranker.stats.passages_encoded == 0

    def test_no_documents_no_loading(self, tmp_path: Path) -> None:
        assert KalmDocumentEncoder(model=tmp_path / "nowhere").run([]) == {"documents": []}

    @pytest.mark.parametrize("shown", [True, False])
    def test_progress_bar(
        self, make_reranker: Callable[..., KalmReranker], capsys: pytest.CaptureFixture[str], shown: bool
    ) -> None:
        KalmDocumentEncoder(model=make_reranker(), progress_bar=shown).run(documents())
        assert ("Encoding" in capsys.readouterr().err) is shown

    def test_settings_reach_the_model(self, tiny_checkpoint: Path) -> None:
        encoder = KalmDocumentEncoder(
            model=tiny_checkpoint, compression_ratio=16, storage_codec="int8", batch_size=2, progress_bar=False
        )
        made = encoder.run(documents())["documents"]
        expected = KalmReranker.from_pretrained(tiny_checkpoint, compression_ratio=16, storage_codec="int8")
        assert [d.meta for d in made] == expected.encode_to_metadata(TEXTS)

    def test_reference_mode(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        """With a payload store the documents carry short references, which a ranker with the same store reads."""
        reference = {"storage_mode": "reference", "payload_store": str(tmp_path / "payloads")}
        encoder = KalmDocumentEncoder(model=tiny_checkpoint, model_kwargs=reference, progress_bar=False)
        made = encoder.run(documents())["documents"]
        assert all(d.meta["kalm_encoding"].startswith("kalm1r.") for d in made)
        ranker = KalmRanker(model=tiny_checkpoint, model_kwargs=reference, on_missing="error")
        assert len(ranker.run(query=QUERY, documents=made)["documents"]) == 3

    def test_its_batch_size_is_not_for_a_shared_reranker(self) -> None:
        with pytest.raises(SettingsError, match="brings its own settings, but got encode_batch_size"):
            KalmDocumentEncoder(model=FakeReranker(), batch_size=4)


@pytest.mark.parametrize(
    "module",
    [
        "kalm_integrations.haystack",
        "haystack_integrations.components.rankers.kalm.ranker",
        "haystack_integrations.components.embedders.kalm",
    ],
)
def test_without_haystack_the_error_says_what_to_install(module: str) -> None:
    code = f"""
import sys
sys.modules["haystack"] = None
from kalm_integrations.errors import MissingExtraError
try:
    import {module}
except MissingExtraError as error:
    assert 'pip install "kalm-integrations[haystack]"' in str(error), error
    assert isinstance(error.__cause__, ModuleNotFoundError), error.__cause__
else:
    raise SystemExit("no error")
"""
    process = in_new_process(code)
    assert process.returncode == 0, process.stderr


def test_one_import_path_holds_everything() -> None:
    from kalm_integrations import haystack

    assert (haystack.KalmRanker, haystack.KalmDocumentEncoder) == (KalmRanker, KalmDocumentEncoder)
    assert {"BackfillReport", "KalmDocumentEncoder", "KalmRanker", "backfill", "wait_for_write_back"} <= set(haystack.__all__)


def test_the_token_reaches_the_hub_and_nothing_else() -> None:
    """A component's Secret authorises the fetch of its checkpoint, and goes nowhere else."""
    received: list[tuple[str, str | None]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            received.append((self.path, self.headers.get("Authorization")))
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            del arguments

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
import os
from haystack.utils import Secret
from haystack_integrations.components.rankers.kalm import KalmRanker
from kalm_integrations.errors import CheckpointNotFoundError
try:
    KalmRanker(model="owner/private", token=Secret.from_token("hf_secret")).warm_up()
except CheckpointNotFoundError as error:
    assert "hf_secret" not in str(error)
assert "HF_TOKEN" not in os.environ
"""
    try:
        process = in_new_process(
            code, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1"
        )
    finally:
        server.shutdown()
        server.server_close()
    assert process.returncode == 0, process.stderr
    assert "hf_secret" not in process.stdout + process.stderr
    authorisations = [value for path, value in received if "owner/private" in path]
    assert authorisations == ["Bearer hf_secret"]
