"""What of an evaluation occurs in training data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kalm_integrations.corpora import overlap
from kalm_integrations.corpora.overlap import Overlap, find_overlap

LONG = "Otters live on fish and crabs, and they sleep on their backs in beds of kelp near the coast"
FOREIGN = "ラッコは魚やカニを食べて暮らし、海岸に近い昆布の茂みの中で仰向けになって眠ることで知られている。手をつないで眠る。"


def find(training: list[str], passages: list[str], queries: tuple[str, ...] = ()) -> Overlap:
    asked = ["What do otters eat?"]
    return find_overlap(training_queries=asked, training_passages=training, queries=queries, passages=passages)


def test_case_and_spaces_do_not_count() -> None:
    found = find(["Snow  falls.\n"], ["snow falls.", "Snow fell."], ("what do OTTERS eat?", "Who eats?"))
    assert found == Overlap(n_queries=2, n_passages=2, same_queries=1, same_passages=1, n_compared=2, near_passages=1)


@pytest.mark.parametrize(
    ("passage", "n_near"),
    [
        (f"It is said: {' '.join(LONG.split()[3:15])} in Alaska.", 1),
        (f"It is said: {' '.join(LONG.split()[3:14])} in Alaska.", 0),
        (f"聞いた話、{FOREIGN[4:40]}らしい", 1),
        (f"聞いた話、{FOREIGN[4:39]}らしい", 0),
    ],
)
def test_a_run_of_twelve_words_or_36_characters_is_shared(passage: str, n_near: int) -> None:
    found = find(["Snow falls.", LONG, FOREIGN], ["The Rhine rises in the Alps.", passage])
    assert (found.same_passages, found.near_passages) == (0, n_near)


def test_a_run_does_not_go_over_the_end_of_a_text() -> None:
    words = LONG.split()
    assert find([LONG], [" ".join(words[:8]), " ".join(words[8:])]).near_passages == 0
    assert find([" ".join(words[:8]), " ".join(words[8:])], [LONG]).near_passages == 0


def test_training_data_may_be_a_stream_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "TEXTS_PER_BLOCK", 2)

    def stream() -> Iterator[str]:
        yield from ("Snow falls.", "a b", "c d", LONG, FOREIGN)

    passages = [f"{i} {LONG if i % 2 else FOREIGN if i % 3 else 'else'}" for i in range(9)]
    found = find_overlap(training_queries=iter(()), training_passages=stream(), queries=[], passages=passages)
    assert found.near_passages == sum(LONG in passage or FOREIGN in passage for passage in passages)


def test_of_a_large_collection_a_sample_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "TEXTS_PER_BLOCK", 2)
    monkeypatch.setattr(overlap, "MAX_RUNS", 20)
    found = find([LONG], [f"{i} {LONG}" for i in range(100)])
    assert (found.n_passages, found.n_compared, found.near_passages) == (100, 4, 4)
    assert "4 passages, of a sample of 4, share a run of 12 words" in str(found)


def test_it_is_a_sentence() -> None:
    assert str(find([LONG], [LONG, "x"], ("What do otters eat?",))) == (
        "1 of 1 queries and 1 of 2 passages are in the training data; 1 passages share a run of 12 words with it"
    )


def test_nothing_overlaps_with_nothing() -> None:
    assert find([], []) == Overlap(0, 0, 0, 0, 0, 0)
    assert find([LONG], ["short"]).near_passages == 0
