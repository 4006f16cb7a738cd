"""Spans by way of a service: those of the reranker behind it, or a clear error, never those of something else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tools.services import in_process
from tools.stub_service import Service, as_json, refusal

from kalm_integrations import Passage, RemoteReranker
from kalm_integrations.errors import DeadlineExceededError, ServiceError, SettingsError
from kalm_integrations.remote import scoring
from kalm_integrations.remote.protocol import ScoreAnswer
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings

QUERY = "who won the super bowl?"
TEXTS = [
    "The Panthers defense gave up 308 points. It ranked sixth in scoring.",
    "Lift and drag of a wing. A wing stalls.",
    "naïve \ud83d 🪽. Denver won \ud83e\udebd! So what?",
    "",
]


def places(ranking: Any) -> list[Any]:
    return [
        (passage.index, None if passage.spans is None else [(span.start, span.end) for span in passage.spans])
        for passage in ranking
    ]


def scores(ranking: Any) -> list[float]:
    return [span.score for passage in ranking for span in passage.spans or ()]


def asked_for_spans(service: Service) -> list[bool]:
    """Whether each request for scores asked for spans."""
    return [body.get("spans", False) for body in service.sent("/v1/score")]


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 1}, {"fusion": "reciprocal_rank", "fusion_weight": 0.3}, {"instruction": "Find the opposite."}],
    ids=str,
)
async def test_spans_are_those_of_the_reranker_behind_the_service(tiny, make_reranker, settings) -> None:
    local, remote = make_reranker(), RemoteReranker(tiny.url)
    given = [*TEXTS, TEXTS[2], TEXTS[2].replace("\ud83d", "�")]
    for n_spans in (1, 3, 99):
        expected = local.rank(QUERY, given, spans=n_spans, **settings)
        for ranking in (
            remote.rank(QUERY, given, spans=n_spans, **settings),
            await remote.arank(QUERY, given, spans=n_spans, **settings),
        ):
            assert places(ranking) == places(expected)
            assert scores(ranking) == pytest.approx(scores(expected), abs=1e-6)
    assert remote.rank(QUERY, [], spans=3) == []


def test_highlight(tiny, make_reranker) -> None:
    local, remote = make_reranker(), RemoteReranker(tiny.url)
    for text in TEXTS:
        spans, expected = remote.highlight(QUERY, text), local.highlight(QUERY, text)
        assert [(span.start, span.end) for span in spans] == [(span.start, span.end) for span in expected]
        assert asyncio.run(remote.ahighlight(QUERY, text)) == spans
    assert {TEXTS[2][span.start : span.end] for span in remote.highlight(QUERY, TEXTS[2])} == {
        "naïve \ud83d 🪽.",
        "Denver won \ud83e\udebd!",
        "So what?",
    }


def test_only_the_best_are_asked_for_their_spans(tiny) -> None:
    remote = RemoteReranker(tiny.url)
    ranking = remote.rank(QUERY, TEXTS[:3], spans=2)
    first, second = tiny.sent("/v1/score")
    assert "spans" not in first, "services before spans refuse what they do not know"
    assert second["spans"] is True
    assert [passage["text"] for passage in second["passages"]] == [
        passage.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for passage in ranking[:2]
    ]
    remote.rank(QUERY, TEXTS[:3], spans=2, score_threshold=1.0)
    assert asked_for_spans(tiny) == [False, True, False]
    assert remote.stats.passages_scored == 6


def test_many_queries_in_several_slices(tiny, make_reranker, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "MAX_PASSAGES", 1)
    queries, lists = [QUERY, "wings"], [TEXTS[:3], TEXTS[1:]]
    found = RemoteReranker(tiny.url).rank_many(queries, lists, spans=2)
    expected = make_reranker().rank_many(queries, lists, spans=2)
    assert [places(ranking) for ranking in found] == [places(ranking) for ranking in expected]
    assert sum(asked_for_spans(tiny)) == 4


def test_encodings_that_came_with_documents(make_reranker) -> None:
    """They are what is scored; each is sent once to a service that keeps what it is sent."""
    made = make_reranker(storage_codec="rot2").encode_to_metadata(TEXTS)
    given = [Passage(text, metadata["kalm_encoding"]) for text, metadata in zip(TEXTS, made, strict=True)]
    expected = make_reranker().rank(QUERY, given, spans=2)
    with in_process(create_app(ServiceSettings.make(model="tiny"), lambda _: make_reranker())) as url:
        remote = RemoteReranker(url)
        for _ in range(2):
            ranking = remote.rank(QUERY, given, spans=2)
            assert places(ranking) == places(expected)
            assert scores(ranking) == pytest.approx(scores(expected), abs=1e-6)
            assert list(ranking.reading) == ["stored"] * 4
    assert scores(ranking) != pytest.approx(scores(make_reranker().rank(QUERY, TEXTS, spans=2)), abs=1e-5)


def test_encodings_are_sent_again_to_a_service_that_has_lost_them(tiny, make_reranker) -> None:
    """The stub keeps nothing, so it wants them for the ranking and once more for the spans."""
    made = make_reranker(storage_codec="rot2").encode_to_metadata(TEXTS)
    given = [Passage(text, metadata["kalm_encoding"]) for text, metadata in zip(TEXTS, made, strict=True)]
    assert places(RemoteReranker(tiny.url).rank(QUERY, given, spans=1)) == places(make_reranker().rank(QUERY, given, spans=1))
    assert asked_for_spans(tiny) == [False, False, True, True]


# --- services that do not have them


def test_an_older_service_is_not_asked(tiny) -> None:
    tiny.spans = False
    remote = RemoteReranker(tiny.url)
    with pytest.raises(SettingsError, match=r"older than that \(version 0\); upgrade kalm-integrations"):
        remote.rank(QUERY, TEXTS, spans=1, on_error="keep_order")
    assert not tiny.sent("/v1/score")
    assert len(remote.rank(QUERY, TEXTS)) == 4
    tiny.spans = True
    assert remote.highlight(QUERY, TEXTS[0]), "it was upgraded meanwhile"


def test_an_older_machine_beside_newer_ones_is_told(tiny) -> None:
    refused = refusal(422, "spans: Extra inputs are not permitted")
    remote = RemoteReranker(tiny.url)
    remote.warm_up()
    tiny.instead.extend([lambda _: None, refused])
    with pytest.raises(SettingsError, match="spans: Extra inputs are not permitted"):
        remote.rank(QUERY, TEXTS, spans=1)


@pytest.mark.parametrize(
    "spans", [[], [[], []], [[{"start": 3, "end": 999, "score": 0.5}]], [[{"start": 3, "end": 3, "score": 0.5}]]], ids=str
)
def test_what_a_service_says_of_spans_is_checked(tiny, spans) -> None:
    remote = RemoteReranker(tiny.url)
    ranking = remote.rank(QUERY, TEXTS[:1])
    answer = ScoreAnswer.model_validate(
        {
            "fingerprint": remote.fingerprint,
            "windows_fingerprint": remote.fingerprints[1],
            "margins": [ranking[0].margin],
            "scores": [ranking[0].score],
            "statuses": ["cached"],
            "spans": spans,
        }
    )
    tiny.instead.extend([lambda _: None, lambda _: as_json(answer)])
    with pytest.raises(ServiceError, match="sent spans"):
        remote.rank(QUERY, TEXTS[:1], spans=1)


def test_another_model_between_ranking_and_spans(tiny, make_reranker, other_checkpoint) -> None:
    """Ranking and spans are of one model: what was ranked by the first is ranked anew."""
    remote, other = RemoteReranker(tiny.url), make_reranker(other_checkpoint)
    remote.warm_up()

    def change(_: Any) -> None:
        tiny.reranker = other

    tiny.instead.extend([lambda _: None, change])
    ranking = remote.rank(QUERY, TEXTS, spans=2)
    assert places(ranking) == places(other.rank(QUERY, TEXTS, spans=2))
    assert remote.fingerprint == other.fingerprint


def test_the_deadline_bounds_both_requests(tiny) -> None:
    remote = RemoteReranker(tiny.url)
    remote.warm_up()
    tiny.instead.extend([lambda _: None, refusal(503, "busy", retry_after="60")])
    with pytest.raises(DeadlineExceededError):
        remote.rank(QUERY, TEXTS, spans=2, timeout=30)
    assert len(tiny.sent("/v1/score")) == 2


def test_requests_hold_nothing_more_unless_spans_are_asked_for(tiny) -> None:
    RemoteReranker(tiny.url).rank(QUERY, TEXTS[:1])
    [body] = tiny.sent("/v1/score")
    assert "spans" not in json.dumps(body)
