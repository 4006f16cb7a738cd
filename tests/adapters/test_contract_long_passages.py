"""One contract for passages over `max_passage_tokens`, under all hosts and in their stores: cut, or read in windows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from haystack.document_stores.in_memory import InMemoryDocumentStore
from langchain_chroma import Chroma
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core.storage.docstore import SimpleDocumentStore
from tools import hosts
from tools.hosts import HOSTS, Host

from kalm_integrations import KalmReranker, haystack, langchain, llama_index
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import wait_for_write_back

QUERY = "What do otters eat?"
ANSWER = "Otters live on fish, crabs and frogs."
FILLER = "The road to the market was closed. A storm had come in from the north. "
TEXTS = {"deep": f"{FILLER * 20}{ANSWER} {FILLER * 6}", "long": FILLER * 20, "short": "The Rhine rises in the Swiss Alps."}
LONG = ("deep", "long")
SETTINGS = {"max_passage_tokens": 128, "max_windows": 20}
CUT, WINDOWS = ({**SETTINGS, "long_passages": mode} for mode in ("cut", "windows"))


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture(params=["thread", "coroutine"])
def use(request, host):
    """Reranks in one of two ways."""

    async def call(component, documents):
        return (
            await host.ause(component, QUERY, documents)
            if request.param == "coroutine"
            else host.use(component, QUERY, documents)
        )

    return call


def open_pico(settings) -> KalmReranker:
    return KalmReranker.from_pretrained("pico", **settings)


def documents(host: Host) -> list[Any]:
    return [host.document(key, text, {"page": i}) for i, (key, text) in enumerate(TEXTS.items())]


def make(host: Host, **settings):
    return host.reranker(**{"model": "pico", host.top: None, **settings})


async def test_an_answer_behind_the_limit_is_found_in_windows_only(host, use):
    best = {}
    for settings in (CUT, WINDOWS):
        stored = host.encode(host.encoder(model="pico", **settings), documents(host))
        component = make(host, on_missing="error", **settings)
        ranked = await use(component, stored)
        best[settings["long_passages"]] = host.key(ranked[0])
        assert component.reranker.stats.passages_encoded == 0
        assert [host.key(d) for d in ranked] == [host.key(d) for d in await use(make(host, **settings), documents(host))]
    assert best == {"cut": "short", "windows": "deep"}


async def test_what_was_cut_is_encoded_anew_and_what_is_short_stays(host, use):
    """And the other way round."""
    for first, then in ((CUT, WINDOWS), (WINDOWS, CUT)):
        stored = host.ingest(open_pico(first), documents(host))
        written: list[Any] = []
        reranker = open_pico(then)
        component = make(host, model=reranker, write_back=written.extend)
        for _ in range(2):
            await use(component, stored)
            assert wait_for_write_back(20)
        stats = reranker.stats
        assert (stats.passages_encoded, stats.windowed) == (2, 2 if then is WINDOWS else 0)
        # Memory serves the second query, and the store still has what it had.
        assert (stats.stale, stats.metadata_hits) == (4, 2)
        assert [host.key(document) for document in written] == [*LONG, *LONG]
        assert {host.metadata(document)[FINGERPRINT_KEY] for document in written} == {reranker.fingerprints[-1]}
        kept = {host.key(document): document for document in [*stored, *written]}
        fresh = open_pico({**then, "cache_bytes": 0})
        await use(make(host, model=fresh, on_missing="error"), list(kept.values()))
        assert fresh.stats.passages_encoded == 0


async def test_an_encoding_that_is_kept_gets_its_own_fingerprint(host):
    reranker = open_pico(WINDOWS)
    encoder = host.encoder(model=reranker)
    stored = host.encode(encoder, documents(host))
    fingerprints = [reranker.fingerprints[1], reranker.fingerprints[1], reranker.fingerprint]
    assert [host.metadata(document)[FINGERPRINT_KEY] for document in stored] == fingerprints
    bare = [host.document(host.key(d), host.text(d), {ENCODING_KEY: host.metadata(d)[ENCODING_KEY]}) for d in stored]
    for again in (host.encode(encoder, bare), await host.aencode(encoder, bare)):
        assert [host.metadata(document)[FINGERPRINT_KEY] for document in again] == fingerprints
    assert reranker.stats.passages_encoded == len(TEXTS)


@pytest.mark.parametrize("settings", [{"highlight": True}, {"prune": True}, {"highlight": True, "prune": True}], ids=str)
async def test_sentences_are_those_of_the_best_window(host, use, settings):
    ranked = await use(
        make(host, prune_threshold=0.5 if "prune" in settings else None, **settings, **WINDOWS), documents(host)
    )
    by_key = {host.key(document): document for document in ranked}
    metadata = host.metadata(by_key["deep"])
    start = TEXTS["deep"].index(ANSWER)
    if "highlight" in settings:
        window, (best, *others) = metadata["relevant_window"], metadata["relevant_spans"]
        assert (best["start"], best["end"]) == (start, start + len(ANSWER))
        assert 0 < window["start"] < start < window["end"] < len(TEXTS["deep"])
        assert all(window["start"] <= span["start"] < span["end"] <= window["end"] for span in others)
        assert "relevant_window" not in host.metadata(by_key["short"])
    else:
        assert "relevant_window" not in metadata
    if "prune" in settings:
        assert host.text(by_key["deep"]) == ANSWER
        assert metadata["kept_spans"] == [{"start": start, "end": start + len(ANSWER)}]
        assert host.text(by_key["short"]) == TEXTS["short"]
    else:
        assert host.text(by_key["deep"]) == TEXTS["deep"]
    # What this reranker says is of this query: the next one takes it away, and reads what it would have read.
    reranker = open_pico(WINDOWS)
    given = [host.document(host.key(d), TEXTS[host.key(d)], host.metadata(d)) for d in ranked]
    again = await use(make(host, model=reranker), given)
    assert all(host.metadata(document).keys() == {"page"} for document in again)
    assert [host.score(d) for d in again] == pytest.approx([host.score(d) for d in ranked], abs=1e-6)


async def test_of_the_other_windows_nothing_is_left_where_nothing_is_taken_out(host, use):
    ranked = await use(make(host, prune=True, prune_threshold=0, highlight=True, **WINDOWS), documents(host))
    for document in ranked:
        metadata, text = host.metadata(document), TEXTS[host.key(document)]
        window = metadata.get("relevant_window", {"start": 0, "end": len(text)})
        assert metadata["kept_spans"] == [window]
        assert host.text(document) == text[window["start"] : window["end"]]
    assert [len(host.text(d)) < len(TEXTS[host.key(d)]) for d in ranked] == [host.key(d) in LONG for d in ranked]


def test_settings_travel(host):
    for component in (make(host, **WINDOWS), host.encoder(model="pico", **WINDOWS)):
        dumped = host.dump(component)
        found = dumped.get("init_parameters", dumped)
        assert {name: found[name] for name in WINDOWS} == WINDOWS
        assert pickle.loads(pickle.dumps(component)).reranker.fingerprints == open_pico(WINDOWS).fingerprints
        component.long_passages = "cut"
        assert copy.deepcopy(component).reranker.fingerprints == open_pico(CUT).fingerprints
        with pytest.raises(SettingsError, match="max_windows"):
            component.max_windows = 0
        assert (component.long_passages, component.max_windows) == ("cut", 20)
        kind = type(component)
        made = kind.from_dict(dumped) if hasattr(kind, "from_dict") else kind(**dumped)
        assert made.reranker.fingerprints == open_pico(WINDOWS).fingerprints


@pytest.mark.parametrize("host", HOSTS[:2], ids=lambda host: host.name)
def test_a_reranker_that_reads_windows_is_dumped_as_another_one(host):
    """Caches of ingestion pipelines are keyed by it: what one has cut must not serve the other. Haystack dumps none."""
    dumped = [host.dump(host.encoder(model=open_pico(settings)))["model"] for settings in (CUT, WINDOWS)]
    assert dumped[0] != dumped[1]


@pytest.mark.parametrize("text", ["x" * 2**20, "\u200d" * 2**20, "é" * 2**20], ids=["letters", "joiners", "accents"])
async def test_a_giant_without_blanks_is_read_as_far_as_windows_go(host, use, text):
    reranker = open_pico({**WINDOWS, "max_windows": 2})
    [stored] = host.ingest(reranker, [host.document("giant", text, {})])
    assert reranker.stats.truncated == 1
    ranked = await use(make(host, model=reranker, highlight=True, prune=True), [stored, *documents(host)])
    found = {host.key(document): host.text(document) for document in ranked}
    assert found.keys() == {"giant", *TEXTS}
    assert 0 < len(found["giant"]) < 2**14
    assert reranker.stats.passages_encoded == 4


# --- in stores


@dataclass(frozen=True)
class Collection:
    """The documents in a store of a host."""

    host: Host
    retrieve: Callable[[], list[Any]]
    """All documents, as a query gets them."""
    write_back: dict[str, Any]
    """Settings of a reranker that writes back."""
    backfill: Callable[..., Any]
    load: Callable[[list[dict[str, Any]]], Any]
    drop: Callable[[], Any]


def on_langchain(store: Any) -> Collection:
    host = hosts.LangChain()
    return Collection(
        host,
        lambda: sorted(store.similarity_search(QUERY, k=len(TEXTS)), key=lambda document: document.metadata["page"]),
        {"write_back": langchain.write_back_to(store)},
        lambda encoder, **settings: langchain.backfill(store, encoder, show_progress=False, **settings),
        lambda rows: langchain.load_encodings(store, rows, show_progress=False),
        lambda: langchain.drop_encodings(store, show_progress=False),
    )


def in_langchain_memory(given: Callable[[Host], list[Any]]) -> Collection:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    collection = on_langchain(store)
    store.add_documents(given(collection.host))
    return collection


def in_chroma(given: Callable[[Host], list[Any]]) -> Collection:
    # It asks for the label itself, and knows one fingerprint only.
    store = Chroma(f"long-{id(given)}", DeterministicFakeEmbedding(size=8))
    collection = on_langchain(store)
    store.add_documents(given(collection.host))
    return collection


def in_llama_index(given: Callable[[Host], list[Any]]) -> Collection:
    store, host = SimpleDocumentStore(), hosts.LlamaIndex()
    store.add_documents(given(host))
    return Collection(
        host,
        lambda: store.get_nodes(list(TEXTS)),
        {"write_back": llama_index.write_back_to(store)},
        lambda encoder, **settings: llama_index.backfill(store, encoder, show_progress=False, **settings),
        lambda rows: llama_index.load_encodings(store, rows, show_progress=False),
        lambda: llama_index.drop_encodings(store, show_progress=False),
    )


def in_haystack(given: Callable[[Host], list[Any]]) -> Collection:
    store, host = InMemoryDocumentStore(), hosts.Haystack()
    store.write_documents(given(host))
    return Collection(
        host,
        lambda: sorted(store.filter_documents(), key=lambda document: document.meta["page"]),
        {"document_store": store},
        lambda encoder, **settings: haystack.backfill(store, encoder, progress_bar=False, **settings),
        lambda rows: haystack.load_encodings(store, rows, progress_bar=False),
        lambda: haystack.drop_encodings(store, progress_bar=False),
    )


STORES = pytest.mark.parametrize("fill", [in_langchain_memory, in_chroma, in_llama_index, in_haystack])


def in_store(collection: Collection) -> list[dict[str, Any]]:
    return [dict(collection.host.metadata(document)) for document in collection.retrieve()]


def ask(collection: Collection, model: KalmReranker, **settings: Any) -> str:
    host = collection.host
    return host.key(host.use(make(host, model=model, **settings), QUERY, collection.retrieve())[0])


@STORES
def test_what_was_ingested_costs_no_encode(fill):
    collection = fill(lambda host: host.ingest(open_pico(WINDOWS), documents(host)))
    reranker = open_pico(WINDOWS)
    assert ask(collection, reranker, on_missing="error") == "deep"
    assert (reranker.stats.passages_encoded, reranker.stats.metadata_hits) == (0, len(TEXTS))


@STORES
def test_a_query_writes_back_what_was_cut(fill):
    collection = fill(lambda host: host.ingest(open_pico(CUT), documents(host)))
    before = in_store(collection)
    assert ask(collection, open_pico(WINDOWS), **collection.write_back) == "deep"
    assert wait_for_write_back(20)
    reranker = open_pico(WINDOWS)
    assert ask(collection, reranker, on_missing="error") == "deep"
    assert (reranker.stats.passages_encoded, reranker.stats.stale) == (0, 0)
    after = in_store(collection)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]


@STORES
def test_backfill_finds_what_was_cut_if_it_reads_all_and_changes_nothing_twice(fill):
    collection = fill(lambda host: host.ingest(open_pico(CUT), documents(host)))
    host, cut = collection.host, in_store(collection)

    def run(settings, **how):
        report = collection.backfill(host.encoder(model=open_pico(settings)), **how)
        return report.n_missing, report.n_stale, report.n_failed

    # The label does not say that a passage was cut.
    assert run(WINDOWS, check_texts=False) == (0, 0, 0)
    assert in_store(collection) == cut
    assert run(WINDOWS) == (0, 2, 0)
    windows = in_store(collection)
    assert [metadata[FINGERPRINT_KEY] for metadata in windows] == [
        *open_pico(WINDOWS).fingerprints[1:] * 2,
        cut[2][FINGERPRINT_KEY],
    ]
    for check_texts in (True, False):
        assert run(WINDOWS, check_texts=check_texts) == (0, 0, 0)
        assert in_store(collection) == windows
    # It does say that one was not.
    assert run(CUT, check_texts=False) == (0, 2, 0)
    assert in_store(collection) == cut


@STORES
def test_backfill_labels_an_encoding_with_its_own_fingerprint(fill):
    def without_labels(host: Host) -> list[Any]:
        stored = host.ingest(open_pico(WINDOWS), documents(host))
        fields = [{**host.metadata(document)} for document in stored]
        for metadata in fields:
            del metadata[FINGERPRINT_KEY]
        return [host.document(host.key(d), host.text(d), m) for d, m in zip(stored, fields, strict=True)]

    collection = fill(without_labels)
    reranker = open_pico(WINDOWS)
    collection.backfill(collection.host.encoder(model=reranker))
    short, long = reranker.fingerprints
    assert [metadata[FINGERPRINT_KEY] for metadata in in_store(collection)] == [long, long, short]
    assert reranker.stats.passages_encoded == 0


@STORES
def test_encodings_that_were_made_elsewhere_are_loaded_and_dropped(fill):
    collection = fill(documents)
    bare = in_store(collection)
    made = open_pico(WINDOWS).encode_to_metadata(TEXTS.values())
    rows = [{"id": key, **metadata} for key, metadata in zip(TEXTS, made, strict=True)]
    for expected in ((3, 0), (0, 3)):
        report = collection.load(rows)
        assert (report.n_written, report.n_present, report.n_bad) == (*expected, 0)
    reranker = open_pico(WINDOWS)
    assert ask(collection, reranker, on_missing="error") == "deep"
    assert collection.drop().n_written == len(TEXTS)
    assert in_store(collection) == bare
