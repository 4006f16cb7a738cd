"""The facade: what it returns, what it encodes, and what it makes of stored encodings."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest

from kalm_integrations import EncodedPassage, KalmReranker, Passage, RankedPassage, Reranker
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.settings import COMPRESSION_RATIOS
from kalm_integrations.errors import EncodingTooLargeError, SettingsError, StaleEncodingError
from kalm_integrations.hosting import as_reranker
from kalm_integrations.testing import FakeReranker

MakeReranker = Callable[..., KalmReranker]

QUERY = "who won the Super Bowl?"
TEXTS = [
    "The Panthers defense gave up just 308 points, ranking sixth in the league.",
    "A slender wing in a slipstream.",
    "naïve café 東京",
    "",
    "The American Football Conference champion defeated the National Football Conference champion. " * 3,
]


def stored(reranker: KalmReranker, texts: list[str]) -> list[Passage]:
    """Return passages as they come from a docstore."""
    metadata = reranker.encode_to_metadata(texts)
    return [Passage(text, entry["kalm_encoding"]) for text, entry in zip(texts, metadata, strict=True)]


@pytest.fixture
def reranker(make_reranker: MakeReranker) -> KalmReranker:
    return make_reranker(storage_codec="fp32")


# --- order


def test_scores_come_in_the_order_of_the_passages_as_plain_floats(reranker):
    scores = reranker.score(QUERY, TEXTS)
    assert [type(score) for score in scores] == [float] * len(TEXTS)
    assert all(0 < score < 1 for score in scores)
    assert len(set(scores)) == len(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        assert reranker.score(QUERY, [text]) == [pytest.approx(score, abs=1e-6)]


def test_rank_sorts_scores_best_first(reranker):
    scores = reranker.score(QUERY, TEXTS)
    ranked = reranker.rank(QUERY, TEXTS)
    assert [passage.index for passage in ranked] == sorted(range(len(TEXTS)), key=lambda i: -scores[i])
    assert [passage.score for passage in ranked] == sorted(scores, reverse=True)
    assert all(isinstance(passage, RankedPassage) for passage in ranked)


def test_score_is_the_sigmoid_of_the_margin(reranker):
    for passage in reranker.rank(QUERY, TEXTS):
        assert passage.score == pytest.approx(1 / (1 + math.exp(-passage.margin)), abs=1e-6)


def test_ties_keep_the_order_of_the_passages(reranker):
    low, high = (TEXTS[ranked.index] for ranked in reranker.rank(QUERY, TEXTS)[:-3:-1])
    ranked = reranker.rank(QUERY, [low, high, low, high, low])
    assert [passage.index for passage in ranked] == [1, 3, 0, 2, 4]
    assert len({passage.margin for passage in ranked}) == 2


def test_top_k_cuts_and_may_be_more_than_there_are(reranker):
    ranked = reranker.rank(QUERY, TEXTS)
    assert reranker.rank(QUERY, TEXTS, top_k=2) == ranked[:2]
    assert reranker.rank(QUERY, TEXTS, top_k=100) == ranked


def test_the_threshold_is_inclusive_and_applied_before_the_cut(reranker):
    ranked = reranker.rank(QUERY, TEXTS)
    third = ranked[2].score
    assert reranker.rank(QUERY, TEXTS, score_threshold=third) == ranked[:3]
    assert reranker.rank(QUERY, TEXTS, score_threshold=third, top_k=1) == ranked[:1]
    assert reranker.rank(QUERY, TEXTS, score_threshold=third, top_k=4) == ranked[:3]
    assert reranker.rank(QUERY, TEXTS, score_threshold=1) == []
    assert reranker.rank(QUERY, TEXTS, score_threshold=0) == ranked


# --- arguments


def test_empty_input_returns_empty_and_loads_nothing(other_checkpoint):
    reranker = KalmReranker.from_pretrained(other_checkpoint)
    assert reranker.encode_passages([]) == []
    assert reranker.encode_to_metadata([]) == []
    assert reranker.score(QUERY, []) == []
    assert reranker.rank(QUERY, (), top_k=3) == []
    assert reranker.find_unencoded([]) == []
    assert reranker.runtime.loaded == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.score(None, TEXTS), "query must be a string, but got NoneType"),
        (lambda r: r.score(b"bytes", []), "query must be a string, but got bytes"),
        (lambda r: r.score(QUERY, "one passage"), "passages must be a list, but got one str"),
        (lambda r: r.score(QUERY, Passage("one")), "passages must be a list, but got one Passage"),
        (lambda r: r.score(QUERY, r.encode_passages(["one"])[0]), "passages must be a list, but got one EncodedPassage"),
        (lambda r: r.score(QUERY, None), r"passages must be a list, but got one NoneType; give \[\] for no passages"),
        (lambda r: r.score(QUERY, {"text": "one"}), "passages must be a list, but got one dict"),
        (lambda r: r.score(QUERY, [*TEXTS, {"text": "one"}]), rf"got dict at place {len(TEXTS)}; .*Passage\(text, encoding\)"),
        (lambda r: r.score(QUERY, [None]), "passages must be str, EncodedPassage or Passage .* got NoneType"),
        (lambda r: r.score(QUERY, [b"bytes"]), "passages must be str, EncodedPassage or Passage .* got bytes"),
        (lambda r: r.score(QUERY, [Passage(5)]), "passages must be str, .* got a Passage of int"),
        (lambda r: r.score(QUERY, TEXTS, instruction=5), "instruction must be a string or None, but got int"),
        (lambda r: r.rank(QUERY, TEXTS, top_k=0), "top_k must be a positive whole number, or None for all, but got 0"),
        (lambda r: r.rank(QUERY, TEXTS, top_k=-1), "top_k must be a positive whole number, or None for all, but got -1"),
        (lambda r: r.rank(QUERY, TEXTS, top_k=2.0), "top_k must be a positive whole number, or None for all, but got 2.0"),
        (lambda r: r.rank(QUERY, TEXTS, top_k=True), "top_k must be a positive whole number, or None for all, but got True"),
        (lambda r: r.rank(QUERY, TEXTS, score_threshold="0.5"), "score_threshold must be a number or None, but got '0.5'"),
        (lambda r: r.rank(QUERY, TEXTS, score_threshold=math.nan), "score_threshold must be a number or None, but got nan"),
        (lambda r: r.encode_passages("one text"), "texts must be a list, but got one str"),
        (lambda r: r.encode_passages(["a", 5]), "texts must be strings, but got int"),
        (lambda r: r.encode_to_metadata([None]), "texts must be strings, but got NoneType"),
    ],
)
def test_wrong_arguments_are_refused_with_the_rule_and_the_value(reranker, call, message):
    with pytest.raises(SettingsError, match=message):
        call(reranker)


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array], ids=["list", "tuple", "iterator", "array"])
def test_passages_may_come_in_any_ordered_collection(reranker, kind):
    right = reranker.score(QUERY, TEXTS)
    assert reranker.score(QUERY, kind(TEXTS)) == right
    assert [e.n_tokens for e in reranker.encode_passages(kind(TEXTS))] == [e.n_tokens for e in reranker.encode_passages(TEXTS)]


def test_encodings_that_are_made_while_they_are_read_keep_their_places(make_reranker, reranker):
    """An iterator may drop each encoding at once, and Python reuses the identities of dropped objects."""
    values = [passage.encoding for passage in stored(make_reranker(storage_codec="fp32", compression_ratio=2), TEXTS)]
    right = reranker.score(QUERY, [EncodedPassage.from_metadata(value) for value in values])
    assert reranker.score(QUERY, map(EncodedPassage.from_metadata, values)) == right


def test_lone_surrogates_and_control_characters_are_scored(reranker):
    """Text from broken sources must not take a query down."""
    assert all(0 < score < 1 for score in reranker.score("a\x00\ud800", ["\ud800", "\x00", "\ufeff\u202e"]))


# --- encode once


def test_duplicates_are_encoded_and_counted_once(reranker):
    scores = reranker.score(QUERY, ["a", "b", "a", Passage("a"), "b"])
    assert scores[0] == scores[2] == scores[3]
    assert scores[1] == scores[4] != scores[0]
    stats = reranker.stats
    assert (stats.passages_encoded, stats.cache_misses, stats.cache_hits, stats.passages_scored) == (2, 2, 0, 2)


def test_duplicate_texts_share_an_encoding(reranker):
    first, _, again = reranker.encode_passages(["a", "b", "a"])
    assert first is again
    assert reranker.stats.passages_encoded == 2


def test_a_second_call_encodes_nothing(reranker):
    first = reranker.score(QUERY, TEXTS)
    assert reranker.score(QUERY, TEXTS) == first
    stats = reranker.stats
    assert (stats.passages_encoded, stats.cache_misses, stats.cache_hits) == (len(TEXTS), len(TEXTS), len(TEXTS))
    assert stats.metadata_hits == 0


def test_without_a_cache_every_call_encodes(make_reranker):
    reranker = make_reranker(cache_bytes=0)
    assert reranker.score(QUERY, ["a"]) == reranker.score(QUERY, ["a"])
    assert reranker.stats.passages_encoded == 2


def test_an_instruction_per_call_changes_scores_and_encodes_nothing(reranker):
    before = reranker.score(QUERY, TEXTS)
    encoded = reranker.stats.passages_encoded
    other = reranker.score(QUERY, TEXTS, instruction="Find the opposite.")
    assert other != before
    assert reranker.stats.passages_encoded == encoded
    assert reranker.score(QUERY, TEXTS) == before
    assert [p.score for p in reranker.rank(QUERY, TEXTS, instruction="Find the opposite.")] == sorted(other, reverse=True)


def test_an_empty_instruction_is_not_the_default_one(reranker):
    assert reranker.score(QUERY, TEXTS, instruction="") != reranker.score(QUERY, TEXTS)


def test_query_settings_do_not_change_the_fingerprint(make_reranker):
    plain = make_reranker()
    same = make_reranker(
        instruction="Other.",
        system_instruction="Judge.",
        max_query_tokens=9,
        encode_batch_size=1,
        score_batch_size=1,
        cache_bytes=0,
        compression_ratio=8,
        storage_codec="rot2",
        max_inline_bytes=9_000,
        dtype="bfloat16",
    )
    assert plain.fingerprint == same.fingerprint


def test_the_fingerprint_is_made_as_the_specification_says(reranker):
    """Other facts, or the same in another order, would make every stored encoding stale."""
    facts = (
        f'{{"checkpoint":"{reranker.runtime.checkpoint.identity}","format":1,'
        '"settings":{"allow_special_tokens":false,"max_passage_tokens":1024},"template":"<Document>: {passage}"}'
    )
    assert reranker.fingerprint == hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize("settings", [{"max_passage_tokens": 100}, {"allow_special_tokens": True}])
def test_encoder_settings_change_the_fingerprint(make_reranker, settings):
    assert make_reranker().fingerprint != make_reranker(**settings).fingerprint


def test_other_weights_change_the_fingerprint(make_reranker, other_checkpoint):
    assert make_reranker().fingerprint != make_reranker(other_checkpoint).fingerprint


def test_batch_sizes_do_not_change_scores(make_reranker, reranker):
    one_by_one = make_reranker(encode_batch_size=1, score_batch_size=1)
    assert one_by_one.score(QUERY, TEXTS) == pytest.approx(reranker.score(QUERY, TEXTS), abs=1e-6)


def test_long_passages_are_cut_counted_and_warned_about_once(make_reranker, caplog):
    reranker = make_reranker(max_passage_tokens=8)
    with caplog.at_level(logging.WARNING):
        reranker.encode_passages(["word " * 50, "x"])
        reranker.encode_passages(["other " * 50])
    assert reranker.stats.truncated == 2
    assert [e.n_tokens for e in reranker.encode_passages(["word " * 50])] == [8]
    assert sum("max_passage_tokens=8" in record.message for record in caplog.records) == 1


def test_stats_are_a_snapshot_and_time_is_counted(reranker):
    before = reranker.stats
    reranker.score(QUERY, TEXTS)
    assert before.passages_encoded == 0
    assert reranker.stats.encode_seconds > 0
    assert reranker.stats.score_seconds > 0


# --- stored encodings


def test_stored_encodings_serve_a_reranker_that_never_encodes(make_reranker, reranker):
    """Also under another instruction, codec and batch size: what is stored depends on the passage alone."""
    right = make_reranker().score(QUERY, TEXTS)
    passages = stored(reranker, TEXTS)
    fresh = make_reranker(storage_codec="int8", encode_batch_size=1)
    assert fresh.score(QUERY, passages) == pytest.approx(right, abs=1e-6)
    stats = fresh.stats
    assert (stats.passages_encoded, stats.cache_misses, stats.cache_hits, stats.metadata_hits) == (0, 0, 5, 5)
    assert (stats.encode_seconds, fresh.stats.passages_scored) == (0, 5)


def test_an_encoding_scores_like_its_text(reranker):
    encodings = reranker.encode_passages(TEXTS)
    mixed = [encodings[0], TEXTS[1], Passage(TEXTS[2]), *stored(reranker, TEXTS[3:])]
    assert reranker.score(QUERY, mixed) == pytest.approx(reranker.score(QUERY, TEXTS), abs=1e-6)


@pytest.mark.parametrize(
    ("make_value", "counter"),
    [
        (lambda value, others: None, None),
        (lambda value, others: value, "metadata_hits"),
        (lambda value, others: value[:-1], "corrupt"),
        (lambda value, others: "", "corrupt"),
        (lambda value, others: {"kalm": 1}, "corrupt"),
        (lambda value, others: value.replace("kalm1.", "kalm2."), "corrupt"),
        (lambda value, others: others["text"], "stale"),
        (lambda value, others: others["checkpoint"], "stale"),
        (lambda value, others: others["setting"], "stale"),
        (lambda value, others: others["reference"], "corrupt"),
    ],
    ids=["none", "valid", "cut", "empty", "dict", "version", "other text", "other checkpoint", "other setting", "no payload"],
)
def test_hits_misses_stale_and_corrupt_are_told_apart(make_reranker, other_checkpoint, make_value, counter):
    text = TEXTS[0]
    others = {
        "text": stored(make_reranker(), [TEXTS[1]])[0].encoding,
        "checkpoint": stored(make_reranker(other_checkpoint), [text])[0].encoding,
        "setting": stored(make_reranker(max_passage_tokens=500), [text])[0].encoding,
        "reference": stored(make_reranker(storage_mode="reference", payload_store={}), [text])[0].encoding,
    }
    [valid] = stored(make_reranker(), [text])
    reranker = make_reranker()
    passage = Passage(text, make_value(valid.encoding, others))
    assert reranker.find_unencoded([passage]) == ([] if counter == "metadata_hits" else [0])
    assert reranker.stats.cache_misses == reranker.stats.corrupt == reranker.stats.stale == 0
    [right] = make_reranker().score(QUERY, [text])
    assert reranker.score(QUERY, [passage]) == [pytest.approx(right, abs=1e-3 if counter == "metadata_hits" else 1e-7)]
    counts = {name: getattr(reranker.stats, name) for name in ("metadata_hits", "stale", "corrupt")}
    assert counts == {name: int(name == counter) for name in counts}
    assert reranker.stats.cache_misses == reranker.stats.passages_encoded == int(counter != "metadata_hits")
    assert reranker.stats.cache_hits == int(counter == "metadata_hits")


def test_duplicates_with_the_same_bad_encoding_are_counted_once(reranker):
    reranker.score(QUERY, [Passage("a", "bad"), Passage("a", "bad"), Passage("a")])
    assert (reranker.stats.corrupt, reranker.stats.cache_misses) == (1, 1)


def test_one_sound_encoding_among_duplicates_serves_all(make_reranker, reranker):
    [valid] = stored(reranker, ["a"])
    fresh = make_reranker()
    scores = fresh.score(QUERY, [Passage("a", "bad"), Passage("a"), valid, "a"])
    assert len(set(scores)) == 1
    assert (fresh.stats.passages_encoded, fresh.stats.corrupt, fresh.stats.metadata_hits) == (0, 1, 1)


def test_a_corrupt_encoding_is_warned_about_once(reranker, caplog):
    with caplog.at_level(logging.WARNING):
        reranker.score(QUERY, [Passage("a", "bad"), Passage("b", "bad too")])
        reranker.score(QUERY, [Passage("c", "bad")])
    assert sum("stats.corrupt" in record.message for record in caplog.records) == 1


def test_an_encoding_of_another_model_given_as_an_object_is_an_error(make_reranker, other_checkpoint):
    """An object is no untrusted metadata: without its text it could not be made anew."""
    [foreign] = make_reranker(other_checkpoint).encode_passages(["a"])
    with pytest.raises(StaleEncodingError, match=r"fingerprint .* encode the text again"):
        make_reranker().score(QUERY, [foreign])


def test_a_finer_stored_encoding_is_pooled_to_the_rerankers_ratio(make_reranker):
    passages = stored(make_reranker(compression_ratio=1, storage_codec="fp32"), TEXTS)
    coarse = make_reranker(compression_ratio=8)
    right = make_reranker(compression_ratio=8).score(QUERY, TEXTS)
    assert coarse.score(QUERY, passages) == pytest.approx(right, abs=1e-5)
    assert (coarse.stats.passages_encoded, coarse.stats.coarser) == (0, 0)


def test_a_coarser_stored_encoding_is_scored_as_it_is_and_counted(make_reranker):
    passages = stored(make_reranker(compression_ratio=16, storage_codec="fp32"), TEXTS)
    fine = make_reranker(compression_ratio=2)
    right = make_reranker(compression_ratio=16).score(QUERY, TEXTS)
    assert fine.score(QUERY, passages) == pytest.approx(right, abs=1e-5)
    assert (fine.stats.passages_encoded, fine.stats.coarser) == (0, len(TEXTS))


def test_a_stored_ratio_that_does_not_divide_is_scored_as_it_is(make_reranker):
    passages = stored(make_reranker(compression_ratio=3, storage_codec="fp32"), TEXTS)
    reranker = make_reranker(compression_ratio=4)
    assert reranker.score(QUERY, passages) == pytest.approx(make_reranker(compression_ratio=3).score(QUERY, TEXTS), abs=1e-5)
    assert (reranker.stats.passages_encoded, reranker.stats.coarser) == (0, 0)


def test_the_same_text_may_be_scored_at_several_ratios_in_one_call(make_reranker):
    reranker = make_reranker(compression_ratio=1, storage_codec="fp32")
    [fine] = reranker.encode_passages([TEXTS[4]])
    scores = reranker.score(QUERY, [fine, fine.pool(8), fine])
    assert scores[0] == scores[2] != scores[1]
    assert reranker.stats.coarser == 1


def test_find_unencoded_names_what_a_query_would_encode_and_counts_nothing(make_reranker, other_checkpoint):
    reranker = make_reranker()
    [valid] = stored(make_reranker(), ["a"])
    [foreign] = stored(make_reranker(other_checkpoint), ["a"])
    passages = [valid, Passage("a"), Passage("b", valid.encoding), foreign, Passage("a", "bad"), valid]
    assert reranker.find_unencoded(passages) == [1, 2, 3, 4]
    assert reranker.stats == make_reranker().stats


def test_encode_to_metadata_returns_flat_strings_in_order(reranker):
    metadata = reranker.encode_to_metadata([*TEXTS, TEXTS[0]])
    assert metadata[0] == metadata[-1]
    for entry, text in zip(metadata, TEXTS, strict=False):
        assert list(entry) == ["kalm_encoding", "kalm_fp"]
        assert entry["kalm_fp"] == reranker.fingerprint
        assert reranker.find_unencoded([Passage(text, entry["kalm_encoding"])]) == []


def test_progress_is_drawn_only_when_asked_for(reranker, capsys):
    reranker.encode_passages(["a"])
    assert capsys.readouterr().err == ""
    reranker.encode_passages(["b"], show_progress=True)
    assert "Encoding" in capsys.readouterr().err


# --- the size of what is stored


def lengths(make_reranker: MakeReranker, text: str) -> dict[int, int]:
    """Return the length of the text's metadata string by ratio."""
    [encoding] = make_reranker(compression_ratio=1).encode_passages([text])
    return {ratio: len(encoding.pool(ratio).to_metadata()) for ratio in COMPRESSION_RATIOS}


def test_max_inline_bytes_takes_the_finest_ratio_that_fits(make_reranker):
    text = TEXTS[4]
    by_ratio = lengths(make_reranker, text)
    assert by_ratio[1] > by_ratio[2] > by_ratio[4] > by_ratio[8] > by_ratio[16]
    for ratio in (1, 2, 8, 16):
        for limit, chosen in ((by_ratio[ratio], ratio), (by_ratio[ratio] - 1, ratio * 2)):
            reranker = make_reranker(compression_ratio=1, max_inline_bytes=limit)
            [passage] = stored(reranker, [text])
            assert len(passage.encoding) <= limit
            assert EncodedPassage.from_metadata(passage.encoding).compression_ratio == chosen
            assert [e.compression_ratio for e in reranker.encode_passages([text])] == [chosen]


def test_max_inline_bytes_never_takes_a_finer_ratio_than_the_rerankers(make_reranker):
    reranker = make_reranker(compression_ratio=4, max_inline_bytes=10**6)
    assert [e.compression_ratio for e in reranker.encode_passages(TEXTS)] == [4] * len(TEXTS)


def test_max_inline_bytes_is_decided_for_each_passage(make_reranker):
    limit = lengths(make_reranker, TEXTS[4])[8]
    reranker = make_reranker(compression_ratio=1, max_inline_bytes=limit)
    ratios = [encoding.compression_ratio for encoding in reranker.encode_passages(TEXTS)]
    assert ratios[4] == 8
    assert min(ratios) < 8
    assert all(len(passage.encoding) <= limit for passage in stored(reranker, TEXTS))


def test_a_budget_that_no_ratio_fits_is_an_error_with_the_remedies(make_reranker):
    reranker = make_reranker(max_inline_bytes=200)
    rule = "max_inline_bytes=200, .* even at ratio 128; raise max_inline_bytes, use a smaller storage_codec, or give a payload"
    with pytest.raises(EncodingTooLargeError, match=rule):
        reranker.encode_passages(["a"])
    with pytest.raises(EncodingTooLargeError, match=rule):
        reranker.encode_to_metadata(["a"])
    # The query path writes nothing.
    assert len(reranker.score(QUERY, ["a"])) == 1


def test_what_max_inline_bytes_does_not_fit_goes_to_the_payload_store(make_reranker):
    store: dict[str, bytes] = {}
    short, long = "a", TEXTS[4] * 2
    limit = lengths(make_reranker, short)[128]
    assert limit < lengths(make_reranker, long)[128]
    passages = stored(make_reranker(max_inline_bytes=limit, payload_store=store), [short, long])
    assert [passage.encoding.split(".")[0] for passage in passages] == ["kalm1", "kalm1r"]
    assert len(store) == 1
    # Kept at the reranker's own ratio, since its size does not matter there.
    assert EncodedPassage.from_metadata(passages[1].encoding, store).compression_ratio == 4


def test_storage_mode_inline_never_refers(make_reranker):
    reranker = make_reranker(storage_mode="inline", max_inline_bytes=200, payload_store={})
    with pytest.raises(EncodingTooLargeError):
        reranker.encode_to_metadata(["a"])


def test_references_serve_every_reranker_with_the_store(make_reranker, tmp_path):
    writer = make_reranker(storage_mode="reference", payload_store=tmp_path / "payloads", storage_codec="fp32")
    passages = stored(writer, TEXTS)
    assert all(passage.encoding.startswith("kalm1r.") and len(passage.encoding) < 250 for passage in passages)
    assert len(LmdbPayloadStore(tmp_path / "payloads")) == len(TEXTS)

    reader = make_reranker(payload_store=str(tmp_path / "payloads"))
    assert reader.score(QUERY, passages) == pytest.approx(make_reranker().score(QUERY, TEXTS), abs=1e-6)
    assert (reader.stats.passages_encoded, reader.stats.metadata_hits) == (0, len(TEXTS))
    assert reader.find_unencoded(passages) == []


def test_a_reference_without_its_payload_is_a_counted_miss(make_reranker):
    store: dict[str, bytes] = {}
    passages = stored(make_reranker(storage_mode="reference", payload_store=store), TEXTS)
    del store[sorted(store)[0]]
    right = make_reranker().score(QUERY, TEXTS)
    for reranker, n_missing in ((make_reranker(payload_store=store), 1), (make_reranker(), len(TEXTS))):
        assert reranker.score(QUERY, passages) == pytest.approx(right, abs=1e-3)
        assert (reranker.stats.corrupt, reranker.stats.cache_misses) == (n_missing, n_missing)


def test_encoding_a_text_again_keeps_its_reference_and_its_older_copies_alive(make_reranker):
    """The last bits of states depend on the batch; what is written for a text must not."""
    store: dict[str, bytes] = {}
    settings = {"storage_mode": "reference", "payload_store": store, "storage_codec": "fp32"}
    older = stored(make_reranker(**settings), TEXTS)
    newer = [stored(make_reranker(**settings, encode_batch_size=1), [text])[0] for text in TEXTS]
    assert older == newer
    reader = make_reranker(payload_store=store)
    reader.score(QUERY, older)
    assert (reader.stats.metadata_hits, reader.stats.corrupt) == (len(TEXTS), 0)


def test_encode_passages_keeps_full_encodings_in_reference_mode(make_reranker):
    store: dict[str, bytes] = {}
    reranker = make_reranker(storage_mode="reference", payload_store=store, max_inline_bytes=200)
    assert [encoding.compression_ratio for encoding in reranker.encode_passages(TEXTS)] == [4] * len(TEXTS)
    assert store == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage_mode": "reference"}, "storage_mode='reference' needs a payload_store"),
        ({"payload_store": 5}, "payload_store must be a mapping .* but got int"),
        ({"payload_store": []}, "payload_store must be a mapping .* but got list"),
    ],
)
def test_an_unusable_payload_store_is_refused_before_a_checkpoint_is_opened(settings, message):
    with pytest.raises(SettingsError, match=message):
        KalmReranker.from_pretrained("no/such-checkpoint", **settings)


# --- what adapters use


def test_as_reranker_takes_a_reranker_as_it_is_or_opens_one(tiny_checkpoint, reranker):
    assert isinstance(reranker, Reranker)
    fake = FakeReranker()
    assert as_reranker(fake) is fake
    assert as_reranker(reranker, compression_ratio=None) is reranker
    opened = as_reranker(str(tiny_checkpoint), compression_ratio=8)
    assert (opened.runtime, opened.compression_ratio) == (reranker.runtime, 8)


def test_as_reranker_refuses_settings_for_a_reranker_that_has_its_own(reranker):
    with pytest.raises(SettingsError, match="brings its own settings, but got compression_ratio, dtype too"):
        as_reranker(reranker, compression_ratio=8, dtype="bfloat16", device=None)


def test_the_representation_of_an_encoding_is_short(reranker):
    [encoding] = reranker.encode_passages([TEXTS[4]])
    assert "tensor" not in repr(encoding)
    assert len(repr(encoding)) < 250
