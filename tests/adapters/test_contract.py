"""One contract for all adapters: what a user may rely on, whatever the host."""

from __future__ import annotations

import copy

import pytest
from tools.hosts import HOSTS, Host, gather

from kalm_integrations import KalmReranker
from kalm_integrations.core.ranking import DEFAULT_WEIGHTS
from kalm_integrations.core.settings import DEFAULT_CODEC
from kalm_integrations.errors import EncodingError, SettingsError

TEXTS = [
    "The Panthers defense gave up just 308 points.",
    "Lift and drag of a slender wing.",
    "Super Bowl 50 was played in 2015.",
    "naïve café 東京",
    "a",
]
QUERY = "who won the super bowl?"


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture
def reranker(make_reranker) -> KalmReranker:
    return make_reranker(storage_codec="fp32")


def documents(host: Host, texts=TEXTS):
    return [host.document(f"id-{i}", text, {"page": i}) for i, text in enumerate(texts)]


def expected(reranker: KalmReranker, texts=TEXTS):
    return sorted(zip(reranker.score(QUERY, texts), range(len(texts)), strict=True), key=lambda pair: -pair[0])


def test_order_scores_ids_and_metadata(host, reranker):
    """Best first, P(yes) as a plain float, ids and metadata of the originals."""
    ranked = host.rerank(reranker, QUERY, documents(host), top=10)
    assert [host.key(d) for d in ranked] == [f"id-{i}" for _, i in expected(reranker)]
    assert [host.score(d) for d in ranked] == pytest.approx([score for score, _ in expected(reranker)], abs=1e-6)
    assert all(type(host.score(d)) is float for d in ranked)
    assert [host.metadata(d)["page"] for d in ranked] == [i for _, i in expected(reranker)]


def test_inputs_stay_as_they_are(host, reranker):
    """Neither ingest nor query changes what it is given, down to the metadata."""
    given = documents(host)
    before = copy.deepcopy(given)
    encoded = host.ingest(reranker, given)
    assert given == before
    before = copy.deepcopy(encoded)
    host.rerank(reranker, QUERY, encoded, top=3)
    assert encoded == before


def test_ingested_documents_cost_no_encode_and_come_back_without_encodings(host, make_reranker):
    stored = host.ingest(make_reranker(), documents(host))
    assert all({"kalm_encoding", "kalm_fp"} <= host.metadata(d).keys() for d in stored)
    querying = make_reranker()
    for query in (QUERY, "another query"):
        ranked = host.rerank(querying, query, stored, top=3)
        assert len(ranked) == 3
        assert not any(key.startswith("kalm") for d in ranked for key in host.metadata(d))
    assert querying.stats.passages_encoded == 0


def test_encodings_are_kept_if_asked(host, reranker):
    stored = host.ingest(reranker, documents(host))
    ranked = host.rerank(reranker, QUERY, stored, top=2, strip_encodings=False)
    assert all("kalm_encoding" in host.metadata(d) for d in ranked)


def test_a_second_query_encodes_nothing_even_without_ingest(host, reranker):
    host.rerank(reranker, QUERY, documents(host), top=3)
    host.rerank(reranker, "another query", documents(host), top=3)
    assert reranker.stats.passages_encoded == len(TEXTS)


def test_duplicates_are_encoded_once_and_tie_in_input_order(host, reranker):
    texts = ["the same text", "other", "the same text", "the same text"]
    ranked = host.rerank(reranker, QUERY, documents(host, texts), top=10)
    assert reranker.stats.passages_encoded == 2
    same = [d for d in ranked if host.key(d) != "id-1"]
    assert [host.key(d) for d in same] == ["id-0", "id-2", "id-3"]
    assert len({host.score(d) for d in same}) == 1


def test_nothing_in_nothing_out_nothing_loaded(host, tiny_checkpoint):
    assert host.rerank(str(tiny_checkpoint), QUERY, [], top=3) == []
    fresh = KalmReranker.from_pretrained(tiny_checkpoint, dtype="bfloat16")
    assert host.rerank(fresh, QUERY, [], top=3) == []
    assert host.ingest(fresh, []) == []
    assert fresh.runtime.loaded == ()


@pytest.mark.parametrize("top", [0, -1])
def test_top_must_be_positive(host, reranker, top):
    with pytest.raises(ValueError, match=r"top_[nk]"):
        host.rerank(reranker, QUERY, documents(host), top=top)


def test_threshold_comes_before_the_cut(host, reranker):
    """A threshold leaves out by score, wherever the cut is; both together return the best of what is left."""
    scores = [score for score, _ in expected(reranker)]
    threshold = (scores[2] + scores[3]) / 2
    assert len(host.rerank(reranker, QUERY, documents(host), top=10, score_threshold=threshold)) == 3
    assert len(host.rerank(reranker, QUERY, documents(host), top=2, score_threshold=threshold)) == 2
    assert host.rerank(reranker, QUERY, documents(host), top=10, score_threshold=1.01) == []


FIRST_STAGE = [3.0, 9.5, 0.0, 4.0, 1.0]


@pytest.mark.parametrize("fusion_weight", [None, 0.2])
@pytest.mark.parametrize("fusion", DEFAULT_WEIGHTS)
def test_fusion_orders_by_both_stages(host, reranker, fusion, fusion_weight):
    """As the core does it: the host's scores for z_score, the host's order for reciprocal_rank; the score stays P(yes)."""
    retrieved = [host.retrieved(d, score) for d, score in zip(documents(host), FIRST_STAGE, strict=True)]
    ranked = host.fuse(reranker, QUERY, retrieved, fusion=fusion, fusion_weight=fusion_weight)
    scores = FIRST_STAGE if fusion == "z_score" else [5, 4, 3, 2, 1]
    expected = reranker.rank(QUERY, TEXTS, first_stage_scores=scores, fusion=fusion, fusion_weight=fusion_weight)
    assert [host.key(d) for d in ranked] == [f"id-{p.index}" for p in expected]
    assert [host.score(d) for d in ranked] == pytest.approx([p.score for p in expected], abs=1e-6)
    assert [host.metadata(d)["fused_score"] for d in ranked] == pytest.approx([p.fused for p in expected], abs=1e-6)
    assert all(type(host.metadata(d)["fused_score"]) is float for d in ranked)
    cut = host.fuse(reranker, QUERY, retrieved, fusion=fusion, fusion_weight=fusion_weight, score_threshold=1.01)
    assert cut == []


def test_without_fusion_nothing_is_added(host, reranker):
    assert all("fused_score" not in host.metadata(d) for d in host.rerank(reranker, QUERY, documents(host), top=10))


def test_z_scores_without_scores_are_an_error(host, reranker):
    """Before any work, and never silently something else; ranks need none."""
    scores = [1.0, None, 2.0, None, 3.0]
    retrieved = [host.retrieved(d, score) for d, score in zip(documents(host), scores, strict=True)]
    with pytest.raises(SettingsError, match=r"2 of 5 .*fusion='reciprocal_rank'"):
        host.fuse(reranker, QUERY, retrieved, fusion="z_score")
    assert reranker.stats.passages_encoded == 0
    assert len(host.fuse(reranker, QUERY, retrieved, fusion="reciprocal_rank")) == len(TEXTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "sum"}, "z_score"),
        ({"fusion": "z_score", "fusion_weight": 2.0}, "from 0 .* to 1"),
        ({"fusion": None, "fusion_weight": 0.5}, "needs a fusion"),
    ],
)
def test_bad_fusion_is_refused_when_a_component_is_made(host, reranker, settings, message):
    """Without documents nothing else would notice."""
    with pytest.raises(ValueError, match=message):
        host.fuse(reranker, QUERY, [], **settings)


def test_calibration_goes_through_to_the_reranker(host, make_reranker, tiny_checkpoint):
    calibration = {"temperature": 3.0, "bias": -1.0}
    ranked = host.rerank(str(tiny_checkpoint), QUERY, documents(host), top=10, calibration=calibration)
    expected = make_reranker(storage_codec=DEFAULT_CODEC, calibration=calibration).rank(QUERY, TEXTS)
    assert [host.key(d) for d in ranked] == [f"id-{p.index}" for p in expected]
    assert [host.score(d) for d in ranked] == pytest.approx([p.score for p in expected], abs=1e-6)
    with pytest.raises(SettingsError, match="calibration=True needs one in the checkpoint"):
        host.rerank(str(tiny_checkpoint), QUERY, documents(host), top=10, calibration=True)


def test_stale_text_after_an_upsert(host, reranker):
    """An encoding that stayed behind when the text changed is noticed, counted, and not used."""
    stored = host.ingest(reranker, documents(host))
    changed = [host.with_text(stored[0], TEXTS[2] + " Indeed."), *stored[1:]]
    ranked = host.rerank(reranker, QUERY, changed, top=10)
    score = next(host.score(d) for d in ranked if host.key(d) == "id-0")
    assert score == pytest.approx(reranker.score(QUERY, [TEXTS[2] + " Indeed."])[0], abs=1e-6)
    assert reranker.stats.stale == 1


@pytest.mark.parametrize(
    "damage", [lambda v: v[:-1], lambda v: v + "A", lambda v: "nonsense", lambda v: v.replace("kalm1", "kalm9")]
)
def test_corrupt_encodings_are_made_anew(host, reranker, damage):
    stored = host.ingest(reranker, documents(host))
    metadata = {**host.metadata(stored[0])}
    metadata["kalm_encoding"] = damage(metadata["kalm_encoding"])
    broken = host.document("id-0", TEXTS[0], metadata)
    ranked = host.rerank(reranker, QUERY, [broken, *stored[1:]], top=10)
    assert [host.key(d) for d in ranked] == [f"id-{i}" for _, i in expected(reranker)]
    assert reranker.stats.corrupt == 1


def test_encodings_of_another_model_are_made_anew(host, make_reranker, other_checkpoint, reranker):
    stored = host.ingest(make_reranker(other_checkpoint), documents(host))
    ranked = host.rerank(reranker, QUERY, stored, top=10)
    assert [host.key(d) for d in ranked] == [f"id-{i}" for _, i in expected(reranker)]
    assert (reranker.stats.stale, reranker.stats.passages_encoded) == (len(TEXTS), len(TEXTS))


def test_missing_encodings_can_be_an_error(host, reranker):
    stored = host.ingest(reranker, documents(host))
    assert len(host.rerank(reranker, QUERY, stored, top=10, on_missing="error")) == len(TEXTS)
    with pytest.raises(EncodingError, match="1 of 5"):
        host.rerank(reranker, QUERY, [documents(host)[0], *stored[1:]], top=10, on_missing="error")


def test_the_instruction_of_a_query_invalidates_nothing(host, reranker):
    stored = host.ingest(reranker, documents(host))
    encoded = reranker.stats.passages_encoded
    plain = host.rerank(reranker, QUERY, stored, top=10)
    instructed = host.rerank(reranker, QUERY, stored, top=10, instruction="Find wings.")
    assert {host.score(d) for d in plain} != {host.score(d) for d in instructed}
    assert reranker.stats.passages_encoded == encoded
    assert reranker.stats.stale == 0


async def test_fifty_concurrent_queries(host, make_reranker):
    """Results are those of one query after the other, and every passage is encoded once."""
    reranker = make_reranker()
    queries = [f"query number {i}" for i in range(50)]
    together = await gather(host, reranker, queries, documents(host), top=3)
    assert reranker.stats.passages_encoded == len(TEXTS)
    for query, ranked in zip(queries, together, strict=True):
        alone = host.rerank(reranker, query, documents(host), top=3)
        assert [host.key(d) for d in ranked] == [host.key(d) for d in alone]
        # Batches that are shared round their last bit in another way.
        assert [host.score(d) for d in ranked] == pytest.approx([host.score(d) for d in alone], abs=1e-6)


@pytest.mark.parametrize("reader", HOSTS, ids=lambda host: f"read by {host.name}")
def test_one_format_three_hosts(host, reader, make_reranker):
    """What one host stored is read by every other with zero encodes and the same scores."""
    stored = host.ingest(make_reranker(), documents(host))
    moved = [reader.document(host.key(d), text, host.metadata(d)) for d, text in zip(stored, TEXTS, strict=True)]
    querying = make_reranker()
    here = host.rerank(querying, QUERY, stored, top=10)
    there = reader.rerank(querying, QUERY, moved, top=10)
    assert [(host.key(d), host.score(d)) for d in here] == [(reader.key(d), reader.score(d)) for d in there]
    assert querying.stats.passages_encoded == 0
