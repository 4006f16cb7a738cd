"""Fusing the reranker's scores with the first stage's: the two methods, their limits, and rankings ordered by them."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations import KalmReranker
from kalm_integrations.core.ranking import DEFAULT_WEIGHTS, check_first_stage, check_fusion, fuse
from kalm_integrations.errors import SettingsError
from kalm_integrations.testing import FakeReranker

METHODS = ("z_score", "reciprocal_rank")
QUERY = "who won"
PASSAGES = ["nobody won", "who cares", "who won it all", "nothing here"]
"""By the fake: half the words, half, all, none."""

finite = st.floats(allow_nan=False, allow_infinity=False)


def order(values):
    return sorted(range(len(values)), key=lambda i: -values[i])


# --- the two methods


def test_z_scores_are_those_of_statistics():
    margins, scores = [1.0, 2.0, 6.0], [0.5, 0.1, 0.4]
    sides = [[(v - statistics.fmean(side)) / statistics.pstdev(side) for v in side] for side in (margins, scores)]
    for weight in (0, 0.3, 1):
        expected = [weight * a + (1 - weight) * b for a, b in zip(*sides, strict=True)]
        assert fuse(margins, scores, "z_score", weight) == pytest.approx(expected)


def test_z_scores_ignore_the_unit():
    margins, scores = [1.0, 2.0, 6.0], [0.5, 0.1, 0.4]
    moved = fuse([7 * v - 100 for v in margins], [v / 1000 for v in scores], "z_score")
    assert moved == pytest.approx(fuse(margins, scores, "z_score"))


def test_reciprocal_ranks_are_those_of_the_paper():
    """1 / (60 + rank), ranks from 1, best first, weighted."""
    fused = fuse([0.1, 9.0, 3.0], [7.0, 5.0, 6.0], "reciprocal_rank", 0.25)
    assert fused == pytest.approx([0.25 / 63 + 0.75 / 61, 0.25 / 61 + 0.75 / 63, 0.25 / 62 + 0.75 / 62])


def test_equal_values_share_the_better_rank():
    assert fuse([5.0, 5.0, 1.0], [0.0] * 3, "reciprocal_rank", 1) == pytest.approx([1 / 61, 1 / 61, 1 / 63])


def test_without_scores_the_order_stands_for_the_first_stage():
    margins = [0.5, -1.0, 3.0]
    assert fuse(margins, None, "reciprocal_rank") == fuse(margins, [30, 20, 10], "reciprocal_rank")


@pytest.mark.parametrize("method", METHODS)
def test_a_side_without_an_opinion_changes_no_order(method):
    values = [0.1, 0.3, 0.2]
    for constant in ([0.1] * 3, [0.0] * 3, [-1e300] * 3):
        assert order(fuse(values, constant, method)) == order(values)
        assert order(fuse(constant, values, method)) == order(values)


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_is_the_reranker_s_share(method):
    margins, scores = [1.0, 2.0, 3.0, 7.0], [4.0, 9.0, 1.0, 0.5]
    assert order(fuse(margins, scores, method, 1)) == order(margins)
    assert order(fuse(margins, scores, method, 0)) == order(scores)
    assert fuse(margins, scores, method) == fuse(margins, scores, method, DEFAULT_WEIGHTS[method])


@pytest.mark.parametrize("method", METHODS)
def test_one_candidate_and_none(method):
    assert fuse([], [], method) == []
    assert len(fuse([3.0], [4.0], method)) == 1


@given(st.lists(st.tuples(finite, finite), max_size=8), st.sampled_from(METHODS), st.floats(0, 1))
def test_values_are_finite_and_respect_agreement(pairs, method, weight):
    """Whatever finite scores come: a candidate that neither side puts below another is not below it."""
    fused = fuse([m for m, _ in pairs], [s for _, s in pairs], method, weight)
    assert all(map(math.isfinite, fused))
    for i, first in enumerate(pairs):
        for j, second in enumerate(pairs):
            if first[0] >= second[0] and first[1] >= second[1]:
                assert fused[i] >= fused[j]


# --- what is refused


@pytest.mark.parametrize(
    ("fusion", "weight", "message"),
    [
        ("sum", None, r"fusion must be one of z_score, reciprocal_rank or None, but got 'sum'"),
        (1, None, "fusion must be one of"),
        (None, 0.5, r"fusion_weight=0.5 needs a fusion, but got None; set fusion"),
        ("z_score", 1.01, r"fusion_weight must be a number from 0 .* to 1 .*, but got 1.01"),
        ("z_score", -0.1, "fusion_weight must be a number"),
        ("z_score", math.nan, "fusion_weight must be a number"),
        ("z_score", True, "fusion_weight must be a number"),
        ("z_score", "0.5", "fusion_weight must be a number"),
    ],
)
def test_bad_settings_are_refused(fusion, weight, message):
    with pytest.raises(SettingsError, match=message):
        check_fusion(fusion, weight)


@pytest.mark.parametrize(
    ("scores", "fusion", "message"),
    [
        (None, "z_score", "'z_score' needs first_stage_scores, but got None; .* or use fusion='reciprocal_rank'"),
        ([1.0], "z_score", "one score for each of 2 passages, but hold 1"),
        ([1.0, None], "z_score", "finite numbers, but passage 1 has None; leave out"),
        ([math.inf, 1.0], "z_score", "passage 0 has inf"),
        ([1.0, math.nan], "reciprocal_rank", "passage 1 has nan"),
        ([1.0, "0.5"], "z_score", "passage 1 has '0.5'"),
        ([1.0, 2.0], None, "first_stage_scores are for fusion, but fusion is None; set fusion, or leave them out"),
    ],
)
def test_bad_first_stage_scores_are_refused(scores, fusion, message):
    with pytest.raises(SettingsError, match=message):
        check_first_stage(scores, 2, fusion)


def test_scores_of_numpy_become_floats():
    checked = check_first_stage(np.array([1, 2], dtype=np.float32), 2, "z_score")
    assert checked == [1.0, 2.0]
    assert all(type(score) is float for score in checked)


# --- rankings


@pytest.fixture(params=["real", "fake"])
def reranker(request, make_reranker):
    return make_reranker() if request.param == "real" else FakeReranker()


@pytest.mark.parametrize("method", METHODS)
def test_a_fused_ranking_is_ordered_by_the_fused_value(reranker, method):
    """Score and margin stay the model's own."""
    scores = [3.0, 1.0, 0.5, 9.0]
    plain = {p.index: p for p in reranker.rank(QUERY, PASSAGES)}
    ranked = reranker.rank(QUERY, PASSAGES, first_stage_scores=scores, fusion=method, fusion_weight=0.4)
    fused = fuse([plain[i].margin for i in range(4)], scores, method, 0.4)
    assert [p.fused for p in ranked] == pytest.approx(sorted(fused, reverse=True))
    assert {p.index: p.fused for p in ranked} == pytest.approx(dict(enumerate(fused)))
    assert {p.index: (p.score, p.margin) for p in ranked} == {i: (p.score, p.margin) for i, p in plain.items()}
    assert all(p.fused is None for p in plain.values())


@pytest.mark.parametrize("method", METHODS)
def test_many_rankings_are_fused_as_one_is(reranker, method):
    queries, lists = [QUERY, "nothing", QUERY], [PASSAGES, PASSAGES[:2], []]
    scores = [[3.0, 1.0, 0.5, 9.0], [1.0, 2.0], []]
    ask = {"fusion": method, "fusion_weight": 0.4}
    together = reranker.rank_many(queries, lists, 3, first_stage_scores=scores, **ask)
    assert [len(ranked) for ranked in together] == [3, 2, 0]
    for query, passages, of_query, ranked in zip(queries, lists, scores, together, strict=True):
        alone = reranker.rank(query, passages, 3, first_stage_scores=of_query, **ask)
        assert [p.index for p in ranked] == [p.index for p in alone]
        assert [p.fused for p in ranked] == pytest.approx([p.fused for p in alone], abs=1e-6)


def test_many_rankings_need_scores_for_each_query(reranker):
    for scores, message in (
        (None, "'z_score' needs first_stage_scores"),
        ([[1.0] * 4], "a list for each of 2 queries, but hold 1"),
        ([[1.0] * 4, [1.0]], "one score for each of 2 passages, but hold 1"),
    ):
        with pytest.raises(SettingsError, match=message):
            reranker.rank_many([QUERY, "nothing"], [PASSAGES, PASSAGES[:2]], fusion="z_score", first_stage_scores=scores)
    assert reranker.stats.passages_scored == 0


def test_a_tie_goes_to_the_reranker_then_to_the_input_order():
    """Ranks 1 and 2 against 2 and 1 tie; so do passages that are the same to both sides."""
    fake = FakeReranker()
    ranked = fake.rank(QUERY, PASSAGES[1:3], fusion="reciprocal_rank", fusion_weight=0.5)
    assert ranked[0].fused == ranked[1].fused
    assert [p.index for p in ranked] == [1, 0]
    ranked = fake.rank(QUERY, ["same", "same", "won"], first_stage_scores=[1, 1, 1], fusion="z_score")
    assert [p.index for p in ranked] == [2, 0, 1]


def test_the_threshold_is_one_of_probability_and_the_cut_one_of_the_fused_order():
    """The first stage's favourite is far below the threshold; it still took part in the scaling."""
    fake = FakeReranker()
    ask = {"first_stage_scores": [2.0, 3.0, 1.0, 90.0], "fusion": "z_score", "fusion_weight": 0.1}
    whole = fake.rank(QUERY, PASSAGES, **ask)
    assert [p.index for p in whole] == [3, 2, 1, 0]
    assert [p.index for p in fake.rank(QUERY, PASSAGES, 2, **ask)] == [3, 2]
    assert fake.rank(QUERY, PASSAGES, score_threshold=0.4, **ask) == whole[1:]
    assert fake.rank(QUERY, PASSAGES, 1, 0.4, **ask) == whole[1:2]


def test_nothing_is_scored_if_the_fusion_is_wrong(reranker):
    for wrong in (
        {"fusion": "z_score"},
        {"fusion": "sum"},
        {"fusion_weight": 0.5},
        {"first_stage_scores": [1.0] * 4},
        {"fusion": "z_score", "first_stage_scores": [1.0, 2.0, math.nan, 3.0]},
    ):
        with pytest.raises(SettingsError):
            reranker.rank(QUERY, PASSAGES, **wrong)
    assert reranker.stats.passages_scored == 0


def test_passages_may_be_an_iterator(make_reranker):
    reranker: KalmReranker = make_reranker()
    ask = {"first_stage_scores": [1.0, 2.0, 3.0, 4.0], "fusion": "z_score"}
    assert len(reranker.rank(QUERY, iter(PASSAGES), **ask)) == 4


def test_nothing_in_nothing_out(reranker):
    assert reranker.rank(QUERY, [], fusion="z_score", first_stage_scores=[]) == []
    assert reranker.rank(QUERY, [], fusion="reciprocal_rank") == []
