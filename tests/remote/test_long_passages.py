"""Long passages by way of a service: those of the reranker behind it, and a change of how they are read is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from tools.services import in_process
from tools.stub_service import as_json, serve

from kalm_integrations import Passage, RemoteReranker
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import ServiceError
from kalm_integrations.remote import scoring
from kalm_integrations.remote.protocol import ScoreAnswer
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings

LIMIT = 64
WINDOWS = {"max_passage_tokens": LIMIT, "long_passages": "windows"}
CUT = {"max_passage_tokens": LIMIT, "long_passages": "cut"}

QUERY = "who won the super bowl?"
# No two windows are alike, so that which is the best does not hang on the last bit.
OTHER, ANOTHER = (
    "".join(f"Wing {n} stalls when it is held too steep! " for n in numbers) for numbers in (range(20), range(20, 40))
)
TEXTS = [
    "Denver won.",
    f"{OTHER}Denver won Super Bowl 50.",
    # A pair, halves of pairs, and a character that is one code point anyway.
    f"\ud83e\udebd \ud83d {OTHER}naïve 🪽 \ud83e\udebd. Denver won \ud83d it. {ANOTHER}",
    ANOTHER,
]


@pytest.fixture
def service(make_reranker):
    with serve(make_reranker(**WINDOWS)) as service:
        yield service


def stored(reranker: Any, texts: list[str] = TEXTS) -> list[Passage]:
    return [Passage(t, m[ENCODING_KEY]) for t, m in zip(texts, reranker.encode_to_metadata(texts), strict=True)]


def filling(reranker: Any) -> str:
    """A text that fills a passage, and no more."""
    [text] = reranker.truncate([OTHER], LIMIT - reranker.encode_passages([""])[0].n_tokens)
    assert reranker.encode_passages([text])[0].n_tokens == LIMIT
    return text


# --- windows


async def test_windows_are_those_of_the_reranker_behind_the_service(service, make_reranker, monkeypatch):
    local, remote = make_reranker(**WINDOWS), RemoteReranker(service.url)
    given = [*TEXTS, TEXTS[2].replace("\ud83d ", "� "), TEXTS[1]]
    for most in (1000, 2):
        monkeypatch.setattr(scoring, "MAX_PASSAGES", most)
        expected = local.rank(QUERY, given, spans=3)
        assert [place.window is None for place in sorted(expected, key=lambda place: place.index)] == [True] + [False] * 5
        for ranking in (remote.rank(QUERY, given, spans=3), await remote.arank(QUERY, given, spans=3)):
            assert [(place.index, place.window) for place in ranking] == [(place.index, place.window) for place in expected]
            assert [place.score for place in ranking] == pytest.approx([place.score for place in expected], abs=1e-6)
            for place, wanted in zip(ranking, expected, strict=True):
                assert [(s.start, s.end) for s in place.spans or ()] == [(s.start, s.end) for s in wanted.spans or ()]
                if place.window is not None:
                    assert all(place.window[0] <= s.start < s.end <= place.window[1] for s in place.spans or ())


def test_the_service_itself(make_reranker):
    """Not only the stub of it."""
    with in_process(create_app(ServiceSettings.make(model="tiny"), lambda _: make_reranker(**WINDOWS))) as url:
        remote, expected = RemoteReranker(url), make_reranker(**WINDOWS).rank(QUERY, TEXTS)
        ranking = remote.rank(QUERY, TEXTS)
        assert [(place.index, place.window) for place in ranking] == [(place.index, place.window) for place in expected]
        assert remote.fingerprints == make_reranker(**WINDOWS).fingerprints
        assert "window" not in next(place for place in ranking if place.index == 0).to_dict()


@pytest.mark.parametrize("windows", [[], [[0, 5]] * 2, [[3, 999_999]], [[5, 3]]], ids=str)
def test_what_a_service_says_of_windows_is_checked(service, windows):
    remote = RemoteReranker(service.url)
    own, of_windows = remote.fingerprints
    told = {"margins": [1.0], "scores": [0.7], "statuses": ["cached"], "windows": windows}
    answer = ScoreAnswer.model_validate({"fingerprint": own, "windows_fingerprint": of_windows, **told})
    service.instead.append(lambda _: as_json(answer))
    if windows:
        with pytest.raises(ServiceError, match="sent windows"):
            remote.rank(QUERY, TEXTS[1:2])
    else:
        assert remote.rank(QUERY, TEXTS[1:2])[0].window is None


# --- encodings


def test_encodings_of_a_service_are_valid_here_and_those_of_here_there(service, make_reranker):
    local, remote = make_reranker(**WINDOWS), RemoteReranker(service.url)
    made = remote.encode_to_metadata(TEXTS)
    assert made == local.encode_to_metadata(TEXTS)
    assert {metadata[FINGERPRINT_KEY] for metadata in made} == set(remote.fingerprints) == set(local.fingerprints)
    given = stored(remote)
    assert list(local.read(given)) == list(remote.read(given)) == ["stored"] * 4
    assert list(remote.rank(QUERY, stored(local)).reading) == ["stored"] * 4
    # Short ones are worth the same to both.
    cutting = make_reranker(**CUT)
    for passages, reranker in ((given, cutting), (stored(cutting), local)):
        with serve(reranker) as other:
            assert list(RemoteReranker(other.url).read(passages)) == list(reranker.read(passages))
            assert reranker.read(passages).counts == {**dict.fromkeys(reranker.read([]).counts, 0), "stored": 1, "stale": 3}


def test_what_fills_a_passage_may_have_been_cut(service, make_reranker):
    cutting, local = make_reranker(**CUT), make_reranker(**WINDOWS)
    given = stored(cutting, [filling(cutting), TEXTS[0]])
    remote = RemoteReranker(service.url)
    assert list(remote.read(given)) == list(local.read(given)) == ["stale", "stored"]
    ranking = remote.rank(QUERY, given)
    assert ranking.counts["stale"] == 1
    assert ranking.made == local.rank(QUERY, given).made
    assert list(ranking.made) == [0]


# --- older services


def test_a_service_from_before_windows_cuts(service, make_reranker):
    service.windows = False
    service.reranker = cutting = make_reranker(**CUT)
    remote = RemoteReranker(service.url)
    given = stored(cutting, [*TEXTS, filling(cutting)])
    assert list(remote.read(given)) == ["stored"] * 5
    ranking = remote.rank(QUERY, given)
    assert [place.window for place in ranking] == [None] * 5
    assert remote.fingerprints == cutting.fingerprints
    assert list(remote.read(stored(make_reranker(**WINDOWS)))) == ["stored", "stale", "stale", "stale"]
    # Upgraded meanwhile: it has the same model, and reads the same long passages in another way.
    service.windows, service.reranker = True, make_reranker(**WINDOWS)
    assert list(remote.rank(QUERY, given).reading) == ["stored", "stale", "stale", "stale", "stale"]


# --- another mode


def test_a_service_that_is_started_in_the_other_mode_is_read_for_anew(service, make_reranker):
    windows, cutting = service.reranker, make_reranker(**CUT)
    remote = RemoteReranker(service.url)
    given = stored(windows)
    reading = remote.read(given)
    assert list(remote.rank(QUERY, given).reading) == ["stored"] * 4
    assert remote.rank(QUERY, TEXTS).counts["missing"] == 0
    assert remote.read(TEXTS).counts["cached"] == 4
    service.reranker = cutting
    ranking = remote.rank(QUERY, given)
    assert list(ranking.reading) == ["stored", "stale", "stale", "stale"]
    assert [place.window for place in ranking] == [None] * 4
    assert [place.score for place in ranking] == pytest.approx([place.score for place in cutting.rank(QUERY, given)], abs=1e-6)
    assert remote.fingerprints == cutting.fingerprints
    with pytest.raises(ServiceError, match="read the passages again"):
        remote.rank(QUERY, reading)
    reading = remote.read(TEXTS)
    service.reranker = windows
    with pytest.raises(ServiceError, match="its way to read long passages"):
        remote.rank(QUERY, reading)
    assert list(remote.rank(QUERY, given).reading) == ["stored"] * 4
