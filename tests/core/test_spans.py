"""Which sentences of a passage speak for it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_integrations import EncodedPassage, KalmReranker, Passage, Span
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.errors import SettingsError

MakeReranker = Callable[..., KalmReranker]

TEXT = (
    "Super Bowl 50 was played on February 7, 2016. The Denver Broncos defeated the Carolina Panthers. "
    "The game was held in Santa Clara, California."
)
SENTENCES = [
    "Super Bowl 50 was played on February 7, 2016.",
    "The Denver Broncos defeated the Carolina Panthers.",
    "The game was held in Santa Clara, California.",
]
QUERY = "Where was the game held?"
OTHERS = ["Otters live on fish. They crack mussels with stones.", "The Rhine rises in the Alps."]


@pytest.fixture(scope="module")
def pico() -> KalmReranker:
    return KalmReranker.from_pretrained("pico")


def cut(text: str, spans: list[Span] | tuple[Span, ...]) -> list[str]:
    return [text[span.start : span.end] for span in spans]


def test_the_sentence_that_answers_comes_first(pico):
    spans = pico.highlight(QUERY, TEXT)
    assert cut(TEXT, spans)[0] == SENTENCES[2]
    assert sorted(cut(TEXT, spans)) == sorted(SENTENCES)
    assert [span.score for span in spans] == sorted((span.score for span in spans), reverse=True)
    assert all(type(span.score) is float and 0 <= span.score <= 1 for span in spans)


@pytest.mark.parametrize("ratio", [1, 2, 4, 16])
def test_a_sentence_scores_as_a_passage_of_its_states_alone(make_reranker, ratio):
    reranker = make_reranker(compression_ratio=ratio, prefix_cache_bytes=0)
    [encoding] = reranker.encode_passages([TEXT])
    tokenizer = reranker.runtime.tokenizer(allow_special_tokens=False)
    offsets = tokenizer.offsets(passage_text(TEXT), 1024)
    spans = reranker.highlight(QUERY, TEXT)
    assert len(spans) == 3
    for span in spans:
        begin = len(passage_text(TEXT[: span.start]))
        end = len(passage_text(TEXT[: span.end]))
        inside = [index for index, (first, last) in enumerate(offsets) if last > begin and first < end]
        states = encoding.states[inside[0] // ratio : inside[-1] // ratio + 1]
        alone = replace(encoding, states=states, n_tokens=len(states) * ratio)
        assert reranker.score(QUERY, [alone]) == [pytest.approx(span.score, abs=1e-6)]


def test_a_passage_of_one_sentence_scores_as_a_whole(make_reranker):
    reranker = make_reranker(compression_ratio=1)
    text = OTHERS[1]
    [ranked] = reranker.rank(QUERY, [text], spans=1)
    [span] = ranked.spans
    assert (span.start, span.end) == (0, len(text))
    assert 0 < span.score < 1
    assert span.score != ranked.score  # the template's own tokens are not the sentence's


def test_only_the_best_passages_get_spans_and_the_ranking_stays(pico):
    passages = [*OTHERS, TEXT]
    plain = pico.rank(QUERY, passages)
    ranked = pico.rank(QUERY, passages, spans=2)
    assert [(one.index, one.score, one.margin) for one in ranked] == [(one.index, one.score, one.margin) for one in plain]
    assert [one.spans is not None for one in ranked] == [True, True, False]
    assert all(one.spans is None for one in plain)
    assert cut(TEXT, ranked[0].spans) == cut(TEXT, pico.highlight(QUERY, TEXT))
    assert len(pico.rank(QUERY, passages, top_k=1, spans=5)) == 1


def test_stored_encodings_serve_and_nothing_is_encoded_or_kept(make_reranker):
    ingest = make_reranker()
    [metadata] = ingest.encode_to_metadata([TEXT])
    reranker = make_reranker()
    query_only = make_reranker()
    passage = Passage(TEXT, metadata["kalm_encoding"])
    query_only.rank(QUERY, [passage])
    assert cut(TEXT, reranker.highlight(QUERY, passage)) == cut(TEXT, ingest.highlight(QUERY, TEXT))
    assert reranker.stats.passages_encoded == 0
    assert reranker.stats.passages_scored == query_only.stats.passages_scored == 1
    assert reranker.stats.prefix_misses == query_only.stats.prefix_misses


def test_offsets_are_those_of_the_text_that_was_given(pico):
    text = f"\ud83d\ude00 A pair of surrogates. {TEXT}  And a lone one: \ud83d."
    found = cut(text, pico.highlight(QUERY, text))
    assert set(SENTENCES) <= set(found)
    assert "And a lone one: \ud83d." in found
    assert "\ud83d\ude00 A pair of surrogates." in found


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=120))
def test_spans_of_any_text_lie_in_it_and_apart(text):
    spans = sorted(KalmReranker.from_pretrained("pico").highlight(QUERY, text), key=lambda span: span.start)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert all(first.end <= second.start for first, second in itertools.pairwise(spans))
    assert all(not span[0].isspace() and not span[-1].isspace() for span in cut(text, spans))


def test_special_tokens_of_a_text_are_text(pico):
    text = f"<end_of_turn> is text here. {SENTENCES[2]} <bos> too."
    assert SENTENCES[2] in cut(text, pico.highlight(QUERY, text))


def test_what_is_behind_the_limit_is_in_no_span(make_reranker):
    reranker = make_reranker(max_passage_tokens=40)
    spans = reranker.highlight(QUERY, " ".join([TEXT] * 5))
    assert 0 < max(span.end for span in spans) < len(TEXT)


def test_text_without_a_word_has_no_spans(pico):
    assert pico.highlight(QUERY, "") == []
    assert pico.highlight(QUERY, "   ") == []


@pytest.mark.parametrize("text", ["x = f(1)\n" * 200, "สวัสดีครับ" * 100, "|a|b|\n" * 300], ids=["code", "Thai", "table"])
def test_text_without_sentences_is_cut_into_windows(pico, text):
    spans = sorted(pico.highlight(QUERY, text), key=lambda span: span.start)
    assert len(spans) > 2
    assert all(first.end <= second.start for first, second in itertools.pairwise(spans))


def test_several_queries_get_their_own_spans(pico):
    queries = [QUERY, "What do otters eat?"]
    rankings = pico.rank_many(queries, [[TEXT, *OTHERS]] * 2, spans=1)
    assert [cut(ranking[0].text, ranking[0].spans)[0] for ranking in rankings] == [SENTENCES[2], "Otters live on fish."]


def test_coroutines_get_the_same(pico):
    found = asyncio.run(pico.ahighlight(QUERY, TEXT))
    assert found == pico.highlight(QUERY, TEXT)
    [ranked] = asyncio.run(pico.arank(QUERY, [TEXT], spans=1))
    assert list(ranked.spans) == found


def test_calibration_makes_other_scores_and_no_other_order(make_reranker):
    plain = make_reranker().highlight(QUERY, TEXT)
    cooler = make_reranker(calibration={"temperature": 2.0, "bias": 0.0}).highlight(QUERY, TEXT)
    assert cut(TEXT, cooler) == cut(TEXT, plain)
    assert [span.score for span in cooler] != [span.score for span in plain]


def test_an_encoding_without_a_text_has_no_sentences(pico):
    [encoding] = pico.encode_passages([TEXT])
    assert isinstance(encoding, EncodedPassage)
    with pytest.raises(SettingsError, match=r"an EncodedPassage has none; pass Passage\(text"):
        pico.rank(QUERY, [TEXT, encoding], spans=1)
    with pytest.raises(SettingsError, match="EncodedPassage has none"):
        pico.rank(QUERY, [encoding], spans=1, on_error="keep_order")


@pytest.mark.parametrize("spans", [0, -1, 1.5, "all", True])
def test_a_wrong_number_of_spans_is_refused(pico, spans):
    with pytest.raises(SettingsError, match="spans must be a positive whole number, or None for all"):
        pico.rank(QUERY, [TEXT], spans=spans)


def test_a_ranking_that_was_not_reranked_has_no_spans(pico):
    ranking = pico.rank(QUERY, [TEXT], spans=1, timeout=1e-9, on_error="keep_order")
    assert not ranking.reranked
    assert ranking[0].spans is None


def test_spans_are_json_where_they_were_asked_for(pico):
    [ranked] = pico.rank(QUERY, [TEXT], spans=1)
    found = json.loads(json.dumps(ranked.to_dict()))
    assert found["spans"] == [span.to_dict() for span in ranked.spans]
    assert "spans" not in pico.rank(QUERY, [TEXT])[0].to_dict()
