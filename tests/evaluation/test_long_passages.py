"""Evaluation of passages that are longer than the limit: in windows, and cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kalm_integrations import KalmReranker
from kalm_integrations.core.passages.strings import hash_text
from kalm_integrations.core.settings import DEFAULT_CODEC
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import find_candidates
from kalm_integrations.evaluation.compression import measure_costs, to_report
from kalm_integrations.evaluation.mteb import MtebReranker
from kalm_integrations.evaluation.report import evaluate
from kalm_integrations.evaluation.scoring import encode_candidates, score_settings
from kalm_integrations.evaluation.stored import StoredEncodings
from kalm_integrations.samples import XQUAD_EN

LIMIT = 64
N_ARTICLES = 12


@pytest.fixture(scope="module")
def collection() -> Collection:
    """Passages of two paragraphs that have nothing to do with each other; the second one answers."""
    whole = Collection.read(XQUAD_EN)
    ids = list(whole.passages)
    targets, others = ids[:: len(ids) // N_ARTICLES][:N_ARTICLES], ids[3 :: len(ids) // N_ARTICLES][:N_ARTICLES]
    pairs = zip(targets, others, strict=True)
    passages = {target: f"{whole.passages[other]} {whole.passages[target]}" for target, other in pairs}
    qrels = {query: judged for query, judged in whole.qrels.items() if set(judged) & set(passages)}
    return Collection("late", passages, {query: whole.queries[query] for query in qrels}, qrels)


def _open(**settings: Any) -> KalmReranker:
    return KalmReranker.from_pretrained(
        "pico", **{"max_passage_tokens": LIMIT, "storage_codec": "fp32", "device": "cpu", **settings}
    )


def test_windows_find_what_lies_behind_the_cut(collection: Collection) -> None:
    openers = {name: partial(_open, long_passages=name) for name in ("cut", "windows")}
    report = evaluate(openers, collection, ratios=[4, 16], codecs=["rot4"], top_k=N_ARTICLES)
    assert report.n_queries > 20
    for ratio in (4, 16):
        cut, windows = (
            next(s for s in report.systems if (s.model, s.ratio) == (name, ratio) and "+" not in s.name) for name in openers
        )
        assert windows.means["nDCG@10"] > cut.means["nDCG@10"] + 0.1
        assert windows.to_first_model is not None
        assert windows.to_first_model.low > 0


def test_windows_are_scored_alike_whether_pooled_here_or_encoded_so(collection: Collection) -> None:
    """At another ratio and codec, after the way through the string."""
    reranker = _open(compression_ratio=1)
    candidates = find_candidates(collection, "bm25", 3, 4, 0)
    encoded = encode_candidates(reranker, collection, candidates)
    assert all(len(encoding.windows or ()) > 1 for encoding in encoded.values())
    [scored] = score_settings(reranker, candidates, encoded, [8], ["int8"])
    direct = _open(compression_ratio=8, storage_codec="int8")
    values = direct.encode_to_metadata([collection.passages[i] for i in encoded])
    assert scored.mean_bytes == pytest.approx(sum(len(value["kalm_encoding"]) for value in values) / len(values))
    for query, found in candidates.items():
        ranked = direct.rank(found.query, [collection.passages[i] for i in found.ids])
        margins = {passage.index: passage.margin for passage in ranked}
        assert scored.margins[query] == pytest.approx([margins[i] for i in range(len(found.ids))], abs=0.05)


def test_costs_of_windows_are_measured(collection: Collection) -> None:
    reranker = _open(compression_ratio=1)
    costs = measure_costs(reranker, collection, ratios=[4], codecs=["rot4"], top_k=3, n_queries=4, rounds=1)
    one, four = ({cost.codec: cost for cost in costs.costs if cost.ratio == ratio} for ratio in (1, 4))
    assert one["fp32"].difference.mean == one["fp32"].max_score_change == 0
    assert four["rot4"].mean_bytes < one["rot4"].mean_bytes / 3
    facts = to_report("pico", reranker, [costs])
    assert (facts["fingerprint"], facts["windows_fingerprint"]) == reranker.fingerprints
    assert to_report("pico", _open(long_passages="cut"), [costs])["windows_fingerprint"] is None


def test_results_of_cut_passages_are_filed_where_they_were() -> None:
    """Under the fingerprint; those of windows apart, and by the number of windows."""
    settings: list[dict[str, Any]] = [{"long_passages": "cut"}, {}, {"max_windows": 2}]
    cut, windows, few = (MtebReranker(_open(**each)).mteb_model_meta.revision for each in settings)
    assert cut == _open().fingerprint
    assert len({cut, windows, few}) == 3


def test_stored_encodings_of_short_passages_serve_both_ways(tmp_path: Path, collection: Collection) -> None:
    """What an earlier version has stored is found where passages are cut, and is not overwritten by windows."""
    long, short = next(iter(collection.passages.values())), "a short passage"
    stored: Callable[[KalmReranker], StoredEncodings] = partial(StoredEncodings, folder=tmp_path, setting="4:fp32")
    cut = _open(long_passages="cut")
    made = stored(cut).get_many([long, short])
    [name] = [key for key in stored(cut)._store if key.endswith(hash_text(long))]
    assert name == f"passage:{cut.fingerprint}:4:fp32:{hash_text(long)}"
    for n_windows, n_encoded in ((64, 1), (64, 0), (2, 1), (2, 0), (64, 0)):
        windows = _open(max_windows=n_windows)
        found = stored(windows).get_many([long, short])
        assert windows.stats.passages_encoded == n_encoded
        assert list(windows.read(found.values())) == ["stored", "stored"]
        assert found[short] == made[short]
    again = _open(long_passages="cut")
    assert stored(again).get_many([long, short]) == made
    assert again.stats.passages_encoded == 0


@pytest.mark.parametrize("value", [b"", b"kalm1", b"kalm1.x.y", b"\xff.\xff.\xff"])
def test_what_is_damaged_in_the_folder_is_made_anew(tmp_path: Path, value: bytes) -> None:
    reranker = _open()
    stored = StoredEncodings(reranker, tmp_path, "4:fp32")
    made = stored.get_many(["a short passage"])
    [name] = [key for key in stored._store if key.startswith("passage:")]
    stored._store[name] = value
    assert stored.get_many(["a short passage"]) == made
    assert stored.get_many(["a short passage"]) == made


def test_mteb_s_second_run_encodes_no_windows(tmp_path: Path, collection: Collection) -> None:
    texts = list(collection.passages.values())[:3]
    inputs = [[{"text": ["who won?"] * 3}], [{"text": texts}]]
    settings = {"max_passage_tokens": LIMIT, "storage_codec": DEFAULT_CODEC, "encodings": tmp_path}
    first, second, cut = (MtebReranker("pico", **settings, long_passages=way) for way in ("windows", "windows", "cut"))
    scores = first.predict(*inputs)
    assert second.predict(*inputs) == pytest.approx(scores, abs=1e-6)
    assert (first.reranker.stats.windowed, second.reranker.stats.passages_encoded) == (3, 0)
    assert cut.predict(*inputs) != pytest.approx(scores, abs=1e-6)
    assert cut.reranker.stats.truncated == 3
