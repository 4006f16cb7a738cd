"""What a reranker found out on the way to a ranking: read once, encoded once, handed over."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import get_args

import pytest

from kalm_integrations import EncodedPassage, KalmReranker, Passage, Ranking, Reading
from kalm_integrations.core import passes
from kalm_integrations.core.types import RankedPassage, Status
from kalm_integrations.errors import SettingsError, StaleEncodingError

MakeReranker = Callable[..., KalmReranker]

TEXTS = ["The Panthers defense gave up just 308 points.", "Lift and drag of a slender wing.", "naïve café 東京", "a", "b"]
QUERY = "who won the super bowl?"
OTHER = "another query"


@pytest.fixture
def reranker(make_reranker: MakeReranker) -> KalmReranker:
    return make_reranker(cache_bytes=0)


def stored(reranker: KalmReranker, texts: list[str]) -> list[Passage]:
    return [Passage(t, m["kalm_encoding"]) for t, m in zip(texts, reranker.encode_to_metadata(texts), strict=True)]


def one_of_each(reranker: KalmReranker, others: KalmReranker) -> list[Passage]:
    """Stored, missing, stale by its text, stale by its model, corrupt."""
    [valid], [foreign] = stored(reranker, TEXTS[:1]), stored(others, TEXTS[3:4])
    return [valid, Passage(TEXTS[1]), Passage(TEXTS[2], valid.encoding), foreign, Passage(TEXTS[4], "kalm1.x.y")]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects every string that is decoded."""
    strings: list[str] = []
    original = EncodedPassage.from_metadata.__func__

    def from_metadata(cls, value, *arguments):
        strings.append(value)
        return original(cls, value, *arguments)

    monkeypatch.setattr(EncodedPassage, "from_metadata", classmethod(from_metadata))
    return strings


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the length of every passage that the encoder reads."""
    lengths: list[int] = []
    original = passes.encode

    def encode(token_ids, n_tokens, *args):
        lengths.extend(n_tokens)
        return original(token_ids, n_tokens, *args)

    monkeypatch.setattr(passes, "encode", encode)
    return lengths


def test_reading_says_what_each_passage_carries_and_encodes_nothing(make_reranker, other_checkpoint, encoded):
    reranker = make_reranker()
    passages = one_of_each(make_reranker(), make_reranker(other_checkpoint))
    encoded.clear()
    before = reranker.stats
    reading = reranker.read(passages)
    assert list(reading) == ["stored", "missing", "stale", "stale", "corrupt"]
    assert reading.counts == {"stored": 1, "cached": 0, "found": 0, "missing": 1, "stale": 2, "corrupt": 1}
    assert reading.not_stored == [1, 2, 3, 4]
    assert set(get_args(Status)) == reading.counts.keys()
    assert encoded == []
    assert reranker.stats == before, "counted when it is used"
    assert "1 stored, 1 missing, 2 stale, 1 corrupt" in repr(reading)


def test_what_memory_has_is_cached_but_bad_metadata_stays_what_it_is(make_reranker, encoded):
    reranker = make_reranker()
    reranker.score(QUERY, TEXTS)
    encoded.clear()
    reading = reranker.read([TEXTS[0], Passage(TEXTS[1], "bad"), "new"])
    assert list(reading) == ["cached", "corrupt", "missing"]
    ranking = reranker.rank(QUERY, reading)
    assert len(encoded) == 1, "the corrupt one is in memory"
    assert ranking.made.keys() == {2}
    assert ranking.to_metadata([0, 1]).keys() == {0, 1}, "what is in memory can be stored too"


@pytest.mark.parametrize("as_reading", [False, True])
def test_each_string_is_decoded_once_and_each_missing_passage_encoded_once(
    make_reranker, other_checkpoint, decoded, encoded, as_reading
):
    """Even without a cache, and though what was made is handed over."""
    reranker = make_reranker(cache_bytes=0)
    passages = one_of_each(make_reranker(), make_reranker(other_checkpoint))
    passages += passages
    decoded.clear()
    encoded.clear()
    ranking = reranker.rank(QUERY, reranker.read(passages) if as_reading else passages)
    made = ranking.made
    assert sorted(decoded) == sorted({p.encoding for p in passages if p.encoding is not None})
    assert len(encoded) == 4
    assert made.keys() == {1, 2, 3, 4, 6, 7, 8, 9}
    assert ranking.made is made
    stats = reranker.stats
    assert (stats.stale, stats.corrupt, stats.metadata_hits, stats.passages_encoded) == (2, 1, 1, 4)


def test_what_was_made_is_what_to_store(reranker, make_reranker):
    ranking = reranker.rank(QUERY, TEXTS, top_k=1)
    assert len(ranking) == 1
    assert ranking.made == dict(enumerate(make_reranker().encode_to_metadata(TEXTS)))
    passages = [Passage(text, ranking.made[index]["kalm_encoding"]) for index, text in enumerate(TEXTS)]
    again = reranker.rank(QUERY, passages)
    assert again.made == {}
    assert again.counts == {"stored": 5, "cached": 0, "found": 0, "missing": 0, "stale": 0, "corrupt": 0}


def test_payloads_are_written_when_what_was_made_is_asked_for(make_reranker):
    payloads: dict[str, bytes] = {}
    reranker = make_reranker(storage_mode="reference", payload_store=payloads)
    ranking = reranker.rank(QUERY, TEXTS)
    assert payloads == {}, "a ranking alone stores nothing"
    made = ranking.made
    assert len(payloads) == len(TEXTS)
    assert list(reranker.read([Passage(TEXTS[0], made[0]["kalm_encoding"])])) == ["stored"]


def test_one_valid_encoding_among_duplicates_serves_all_but_each_has_its_own_status(reranker, encoded):
    [valid] = stored(reranker, TEXTS[:1])
    encoded.clear()
    ranking = reranker.rank(QUERY, [TEXTS[0], valid, Passage(TEXTS[0], "bad")])
    assert list(ranking.reading) == ["missing", "stored", "corrupt"]
    assert encoded == []
    assert ranking.made == {}
    assert ranking.to_metadata(ranking.reading.not_stored)[0]["kalm_encoding"] == valid.encoding


def test_a_ranking_is_the_list_that_it_was(reranker):
    ranking = reranker.rank(QUERY, TEXTS)
    plain = list(ranking)
    assert isinstance(ranking, Ranking)
    assert isinstance(ranking, list)
    assert ranking == plain
    assert ranking[0] == plain[0]
    assert ranking[:2] == plain[:2]
    assert [*ranking, *plain] == ranking + plain
    assert reranker.rank(QUERY, []) == []


def test_texts_stand_in_the_ranking_where_they_were_given(reranker):
    [encoding] = reranker.encode_passages(TEXTS[1:2])
    ranking = reranker.rank(QUERY, [TEXTS[0], encoding, Passage(TEXTS[2])])
    assert {p.index: p.text for p in ranking} == {0: TEXTS[0], 1: None, 2: TEXTS[2]}
    by_text = reranker.rank(QUERY, TEXTS[1:2])
    assert by_text == reranker.rank(QUERY, [encoding]), "a text makes no other passage of it"
    assert TEXTS[1] in repr(by_text)
    assert len(repr(RankedPassage(0, 0.5, 0.0, text="long " * 1000))) < 200


def test_a_reading_may_be_used_again(reranker, encoded):
    reading = reranker.read(TEXTS)
    first, second = reranker.rank(QUERY, reading), reranker.rank(OTHER, reading)
    assert first == reranker.rank(QUERY, TEXTS)
    assert second == reranker.rank(OTHER, TEXTS)
    assert reranker.score(QUERY, reading) == reranker.score(QUERY, TEXTS)


def test_a_reading_of_another_model_or_ratio_is_refused(make_reranker, other_checkpoint, reranker):
    for other in (make_reranker(other_checkpoint), make_reranker(compression_ratio=8)):
        with pytest.raises(SettingsError, match="a reading must be of this reranker's fingerprint and ratio"):
            reranker.rank(QUERY, other.read(TEXTS))
    assert reranker.rank(QUERY, make_reranker().read(TEXTS)) == reranker.rank(QUERY, TEXTS)


def test_many_queries_share_what_was_read_and_made(reranker, decoded, encoded):
    passages = [*stored(reranker, TEXTS[:2]), *TEXTS[2:]]
    decoded.clear()
    encoded.clear()
    reading = reranker.read(passages)
    lists = [passages, reading, [], passages[::-1]]
    rankings = reranker.rank_many([QUERY, OTHER, "x", "y"], lists)
    assert len(encoded) == 3
    assert len(decoded) == 4, "two by the reading, two by the lists together"
    assert [sorted(ranking.made) for ranking in rankings] == [[2, 3, 4], [2, 3, 4], [], [0, 1, 2]]
    alone = reranker.rank(OTHER, passages)
    assert [p.index for p in rankings[1]] == [p.index for p in alone]
    assert [p.score for p in rankings[1]] == pytest.approx([p.score for p in alone], abs=1e-6)
    assert rankings[3].made[2] == rankings[0].made[2]


def test_prepare_takes_a_reading(make_reranker):
    reranker = make_reranker()
    reranker.prepare(reranker.read(TEXTS))
    assert reranker.stats.prefix_misses == len(TEXTS)
    reranker.score(QUERY, TEXTS)
    assert reranker.stats.prefix_hits == len(TEXTS)


def test_metadata_of_any_type_is_corrupt(reranker):
    class Odd:
        __hash__ = None

        def __eq__(self, other):
            raise ValueError

    odd = [b"kalm1", {"a": 1}, ["x"], 5, float("nan"), Odd(), Odd()]
    reading = reranker.read([Passage("a", value) for value in odd])
    assert list(reading) == ["corrupt"] * len(odd)


def test_everything_turns_into_json(reranker):
    reading = reranker.read(TEXTS)
    ranking = reranker.rank(QUERY, reading)
    told = json.loads(json.dumps([reading.to_dict(), ranking.to_dict(), reranker.stats.to_dict()]))
    assert told[0] == {"statuses": ["missing"] * 5, "counts": reading.counts}
    assert [result["index"] for result in told[1]["results"]] == [p.index for p in ranking]
    assert told[1]["results"][0].keys() == {"index", "score", "margin", "fused", "text"}
    assert told[2]["passages_encoded"] == 5


def test_a_ranking_travels_with_what_was_made(reranker):
    ranking = reranker.rank(QUERY, TEXTS)
    for same in (pickle.loads(pickle.dumps(ranking)), copy.deepcopy(ranking)):
        assert same == ranking
        assert same.made == ranking.made
        assert same.counts == ranking.counts


def test_a_ranking_keeps_no_encodings_that_were_stored_anyway(reranker):
    ranking = reranker.rank(QUERY, stored(reranker, TEXTS))
    assert ranking.reading.encodings == {}


# --- the reranker itself


def test_the_representation_says_what_it_is(make_reranker, tiny_checkpoint):
    assert repr(make_reranker(compression_ratio=8, storage_codec="int8")) == (
        f"KalmReranker('{tiny_checkpoint}', device='cpu', dtype='float32', compression_ratio=8, storage_codec='int8')"
    )


@pytest.mark.parametrize("arguments", [(), ("pico",), ("nano", {"device": "cpu"})])
def test_the_constructor_says_what_to_call(arguments):
    *names, settings = arguments if arguments and isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(SettingsError, match=rf"KalmReranker.from_pretrained\('{(*names, 'pico')[0]}'"):
        KalmReranker(*names, **settings)


def test_copies_are_the_reranker_and_pickles_open_it_anew(make_reranker, tmp_path):
    reranker = make_reranker(
        compression_ratio=8, payload_store=tmp_path / "payloads", calibration={"temperature": 2, "bias": 0}
    )
    expected = reranker.score(QUERY, TEXTS)
    assert copy.copy(reranker) is copy.deepcopy(reranker) is reranker
    opened = pickle.loads(pickle.dumps(reranker))
    assert opened is not reranker
    assert opened.runtime is reranker.runtime, "the weights are shared within a process"
    assert repr(opened) == repr(reranker)
    assert opened.score(QUERY, TEXTS) == expected
    assert opened.stats.passages_encoded == len(TEXTS)


@pytest.mark.parametrize("name", ["payload_store", "prefix_store"])
def test_a_store_that_cannot_travel_is_refused_at_pickling(make_reranker, name):
    with pytest.raises(SettingsError, match=rf"{name} must be the folder of an LMDB store .*but got dict.*pass a folder"):
        pickle.dumps(make_reranker(**{name: {}}))


def test_a_hub_token_does_not_travel(make_reranker):
    assert b"hf_secret" not in pickle.dumps(make_reranker(token="hf_secret"))


def test_an_encoding_of_another_model_given_as_an_object_is_an_error_at_reading(make_reranker, other_checkpoint, reranker):
    [foreign] = make_reranker(other_checkpoint).encode_passages(["a"])
    with pytest.raises(StaleEncodingError, match="fingerprint"):
        reranker.read([foreign])


def test_a_passage_that_does_not_fit_is_named_by_its_place(make_reranker):
    from kalm_integrations.errors import EncodingTooLargeError

    reranker = make_reranker(max_inline_bytes=600, storage_codec="fp32")
    with pytest.raises(EncodingTooLargeError, match="passage 1: an encoding must fit") as caught:
        reranker.encode_to_metadata(["a", "long " * 300])
    assert caught.value.index == 1


def test_ratios_beyond_what_a_checkpoint_was_trained_for_are_warned_about(caplog):
    from kalm_integrations.core.opening import _warn_of_ratio

    _warn_of_ratio.cache_clear()
    for _ in range(2):
        KalmReranker.from_pretrained("pico", compression_ratio=64)
    assert caplog.text.count("compression_ratio=64 is beyond what pico was trained for (1 to 32)") == 1
    caplog.clear()
    KalmReranker.from_pretrained("pico", compression_ratio=32)
    assert caplog.text == ""


def test_a_reading_is_public():
    assert Reading.__doc__


class TestOrigin:
    """What was fetched is remembered for passages of the same text and origin, which come without it."""

    HERE, THERE = object(), object()

    def remembering(self, make_reranker: MakeReranker) -> KalmReranker:
        reranker = make_reranker()
        fetched = [Passage(p.text, p.encoding, self.HERE) for p in stored(make_reranker(), TEXTS[:2])]
        assert list(reranker.read(fetched)) == ["stored", "stored"]
        return reranker

    def test_the_same_origin_finds_it(self, make_reranker: MakeReranker) -> None:
        reranker = self.remembering(make_reranker)
        passages = [Passage(text, origin=self.HERE) for text in TEXTS[:3]]
        assert list(reranker.read(passages)) == ["cached", "cached", "missing"]
        expected = make_reranker().score(QUERY, stored(make_reranker(), TEXTS[:2]))
        assert reranker.score(QUERY, passages[:2]) == pytest.approx(expected, abs=1e-6)
        assert (reranker.stats.passages_encoded, reranker.stats.cache_hits) == (0, 2)

    def test_no_other_does(self, make_reranker: MakeReranker) -> None:
        reranker = self.remembering(make_reranker)
        assert list(reranker.read([Passage(TEXTS[0], origin=self.THERE), Passage(TEXTS[1]), TEXTS[0]])) == ["missing"] * 3

    def test_what_was_made_here_serves_all(self, make_reranker: MakeReranker) -> None:
        reranker = self.remembering(make_reranker)
        reranker.encode_passages(TEXTS[:1])
        assert list(reranker.read([TEXTS[0], Passage(TEXTS[0], origin=self.THERE)])) == ["cached"] * 2

    def test_what_another_passage_of_the_text_came_with_is_not_its_own(self, make_reranker: MakeReranker) -> None:
        """Else whoever writes to one store would decide scores of another's documents for longer than a query."""
        reranker = make_reranker()
        [passage] = stored(make_reranker(), TEXTS[:1])
        reranker.read([passage, Passage(passage.text, passage.encoding, self.HERE)])
        assert list(reranker.read([Passage(passage.text, origin=self.HERE)])) == ["missing"]

    def test_what_is_invalid_is_not_remembered(self, make_reranker: MakeReranker) -> None:
        reranker = make_reranker()
        [valid, other] = stored(make_reranker(), TEXTS[:2])
        reranker.read([Passage(TEXTS[0], other.encoding, self.HERE), Passage(TEXTS[1], valid.encoding[:-1], self.HERE)])
        assert list(reranker.read([Passage(text, origin=self.HERE) for text in TEXTS[:2]])) == ["missing"] * 2

    def test_without_a_cache_nothing_is_remembered(self, reranker: KalmReranker, make_reranker: MakeReranker) -> None:
        [passage] = stored(make_reranker(), TEXTS[:1])
        reranker.read([Passage(passage.text, passage.encoding, self.HERE)])
        assert list(reranker.read([Passage(passage.text, origin=self.HERE)])) == ["missing"]
