"""Long passages made of articles, the program that measures ways to read them at toy size, and its place on the page."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from benchmarks import long_passages, long_passages_page
from benchmarks.long_passages import (
    COMPARED,
    CUT,
    FIRST_STAGE,
    HALF,
    NDCG,
    REACHES,
    SLOW,
    TOP,
    WARM,
    WAYS,
    WHOLE,
    WINDOWS,
    Question,
)
from benchmarks.span_cases import answered
from tools import long_articles
from tools.long_articles import FEWEST_TOKENS, MOST_TOKENS, divide

from kalm_integrations.corpora.beir import Collection

ARTICLES = {
    "Otters": ("Otters live on fish. ", "They sleep in dens. "),
    "Rhine": ("The Rhine rises in the Alps. ", "It flows into the North Sea. "),
}
ANSWERS = ("fish", "dens", "Alps", "North Sea")
REPEATS = 250
"""Of a sentence: two paragraphs have over 2,000 tokens, and none of them as many."""


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two articles as a passage each, with four questions."""
    source = tmp_path_factory.mktemp("articles")
    paragraphs = [(title, text * REPEATS) for title, texts in ARTICLES.items() for text in texts]
    write(source, "corpus.jsonl", [{"_id": f"p{i}", "title": t, "text": text} for i, (t, text) in enumerate(paragraphs)])
    write(source, "queries.jsonl", [{"_id": f"q{i}", "text": f"what about {answer}?"} for i, answer in enumerate(ANSWERS)])
    places = [text.rindex(answer) for (_, text), answer in zip(paragraphs, ANSWERS, strict=True)]
    ranges = [[place, place + len(answer)] for place, answer in zip(places, ANSWERS, strict=True)]
    write(
        source, "answers.jsonl", [{"_id": f"q{i}", "passage": f"p{i}", "answers": [place]} for i, place in enumerate(ranges)]
    )
    made = source / "long"
    said = long_articles.make(source, made, long_articles.tokens_of("pico"))
    assert said == "2 passages, 4 questions; left out: 0 paragraphs at the ends of articles, 0 questions about them"
    return made


def test_articles_are_divided_at_paragraphs_and_remainders_joined_or_left_out():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(20, 900) for _ in range(draw.randint(1, 80))]
        ranges, n_left_out = divide(lengths, draw)
        assert [place for a, b in ranges for place in range(a, b)] == list(range(len(lengths) - n_left_out))
        assert all(FEWEST_TOKENS <= sum(lengths[a:b]) <= MOST_TOKENS for a, b in ranges)
        assert sum(lengths[len(lengths) - n_left_out :]) < FEWEST_TOKENS
    assert divide([1999], draw) == ([], 1)


def test_answers_keep_their_places_in_the_joined_text(folder):
    """The token is that of the passage as the encoder reads it, the template's among them."""
    tokens = long_articles.tokens_of("pico")
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    cases = answered(folder)
    assert [case.text[slice(*case.answers[0])] for case in cases] == list(ANSWERS)
    for row, case in zip(rows, cases, strict=True):
        places = tokens(case.text)
        assert len(places) == row["tokens"]
        assert places[row["token"]][0] <= case.answers[0][0] < places[row["token"]][1]
    assert cases[0].text == (ARTICLES["Otters"][0] * REPEATS + "\n\n" + ARTICLES["Otters"][1] * REPEATS)
    assert Collection.read(folder).qrels == {"q0": {"long0": 1}, "q1": {"long0": 1}, "q2": {"long1": 1}, "q3": {"long1": 1}}


def question(name: str, token: int, n_tokens: int = 6000) -> Question:
    return Question(name, "otters", "p", ((0, 5),), token, n_tokens)


def test_questions_are_grouped_by_the_place_of_the_answer():
    assert question("q", 1023).groups == ("all", "early third", "first 1,024 tokens")
    assert question("q", 2000).groups == ("all", "middle third", "1,024 to 4,095")
    assert question("q", 5999).groups == ("all", "late third", "4,096 and later")
    drawn = long_passages.sample([question(str(token), token) for token in range(0, 6000, 10)], 30)
    assert [sum(third in one.groups for one in drawn) for third in long_passages.THIRDS] == [10, 10, 10]


def test_the_own_passage_is_always_a_candidate():
    passages = {"a": "otters eat fish", "b": "otters otters", "p": "the Rhine"}
    collection = Collection("c", passages, {"q": "otters"}, {"q": {"p": 1}})
    assert long_passages.find_candidates(collection, [question("q", 0)], 2) == ({"q": ["b", "p"]}, 0)


def test_orders_are_compared_group_by_group():
    rankings = {way: {"q": ["a", "p"], "r": ["p", "a"]} for way in (FIRST_STAGE, CUT, HALF, WHOLE)}
    rankings[WINDOWS] = {"q": ["p", "a"], "r": ["p", "a"]}
    groups = long_passages.by_group([question("q", 5000), question("r", 0)], rankings)
    assert list(groups) == ["all", "early third", "late third", "first 1,024 tokens", "4,096 and later"]
    assert groups["late third"]["ways"][WINDOWS] == {NDCG: 1, TOP: 1}
    assert groups["all"]["ways"][CUT][TOP] == 0.5
    gain = groups["late third"]["differences"][0]["mean"]
    assert gain == pytest.approx(1 - groups["late third"]["ways"][CUT][NDCG])
    assert groups["early third"]["differences"][0]["mean"] == 0


def test_a_window_holds_an_answer_whole():
    assert long_passages.holds_answer((10, 20), [(0, 5), (12, 20)])
    assert not long_passages.holds_answer((10, 20), [(0, 5), (12, 21)])


def test_all_ways_are_measured(folder, tmp_path):
    output = tmp_path / "long_passages.json"
    long_passages.main([str(folder), "--questions", "6", "--top-k", "2", "--output", str(output)])
    measured = json.loads(output.read_text())
    assert measured["groups"]["all"]["questions"] == 4
    assert list(measured["groups"]["all"]["ways"]) == [FIRST_STAGE, *WAYS]
    costs = measured["costs"]
    assert list(costs) == list(WAYS)
    assert costs[CUT]["bytes"] < costs[HALF]["bytes"] == costs[WHOLE]["bytes"] < costs[WINDOWS]["bytes"]
    assert all(row[kind] > 0 for row in costs.values() for kind in ("encode", WARM, SLOW))
    page = long_passages_page.updated(measured)
    assert "| windows | " in page
    assert "| late third | 2 |" in page


def test_the_page_shows_what_was_measured():
    assert long_passages_page.updated() == long_passages_page.PAGE.read_text(encoding="utf-8"), (
        "run, from tests/: python -m benchmarks.long_passages_page"
    )


def test_the_words_of_the_page_are_those_of_the_figures():
    """Windows find answers anywhere, lose nothing where the cut reads, and are above one pass; one pass is below the cut."""
    groups = json.loads(long_passages_page.MEASURED.read_text(encoding="utf-8"))["groups"]
    differences = {name: dict(zip(COMPARED, row["differences"], strict=True)) for name, row in groups.items()}
    read_by_all, *behind = REACHES
    assert min(row["ways"][WINDOWS][NDCG] for row in groups.values()) > 0.92
    assert differences[read_by_all][WINDOWS, CUT]["high"] > 0
    assert differences[read_by_all][WHOLE, CUT]["high"] < differences[read_by_all][HALF, CUT]["mean"] < 0
    for name, found in differences.items():
        assert min(found[WINDOWS, way]["low"] for way in (HALF, WHOLE)) > 0, name
    for name in behind:
        assert groups[name]["ways"][CUT][NDCG] < groups[name]["ways"][FIRST_STAGE][NDCG] - 0.2
