"""Training data that is read: what is united, what is left out, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tools.training_data import PASSAGES, QUERIES, examples, write_collection, write_lines

from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import CollectionConfig
from kalm_integrations.training.sources import Query, TrainingSet, read_training_set

OTTERS, RHINE, SEALS, SNOW = PASSAGES
EAT, RISE = QUERIES


def read(path: Path, **settings: Any) -> TrainingSet:
    return read_training_set(CollectionConfig(path=path, name="data", **settings))


def read_lines(folder: Path, *rows: Any) -> TrainingSet:
    return read(write_lines(folder / "lines.jsonl", rows))


def texts_of(texts: TrainingSet, positions: Sequence[int]) -> list[str]:
    return [texts.passages[position] for position in positions]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of each collection, without its path."""
    return [record.getMessage().split(": ", 1)[1] for record in caplog.records]


def test_a_beir_folder_and_its_lines_are_the_same_training_set(tmp_path):
    folder = write_collection(tmp_path / "beir")
    lines = [{"query": query, "positives": [PASSAGES[i]]} for i, query in enumerate(QUERIES)]
    from_folder, from_lines = read(folder), read(write_lines(tmp_path / "lines.jsonl", lines))
    assert from_folder.queries == from_lines.queries
    # Lines know the passages they name, a folder all.
    assert from_folder.passages == PASSAGES
    assert from_lines.passages == PASSAGES[:2]


def test_an_instruction_is_the_line_s_own_or_the_collection_s(tmp_path):
    texts = read(write_lines(tmp_path / "lines.jsonl", examples()), instruction="Find an answer.")
    assert [query.instruction for query in texts.queries] == ["Find an answer.", "Find the river."]


GOOD = {"query": "q", "positives": ["a"], "negatives": ["b"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a line must be a JSON object, but it cannot be parsed"),
        ({"query": "q"}, "a row must have the columns of a known layout .*, but has 'query'; rename them"),
        ({**GOOD, "positives": []}, "positives: List should have at least 1 item"),
        ({**GOOD, "query": None}, "query: Input should be a valid string"),
        ({**GOOD, "negative": ["c"]}, "negative: Extra inputs are not permitted"),
        ({**GOOD, "negatives": [1]}, r"negatives.0: Input should be a valid string, but got 1"),
        ({**GOOD, "positive_scores": [1.0]}, "positive_scores and negative_scores come together"),
        (
            {**GOOD, "positive_scores": [1.0], "negative_scores": [1.0, 2.0]},
            "negative_scores must be one for each of negatives, but are 2 for 1",
        ),
        ({**GOOD, "positive_scores": [float("nan")], "negative_scores": [1.0]}, "Input should be a finite number"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, line, message):
    path = tmp_path / "lines.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(SettingsError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_a_collection_without_a_query_or_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"a collection must be a file or a folder, but .* is not there"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(SettingsError, match=r"a query with a relevant passage at least, but .* holds none"):
        read(write_lines(tmp_path / "empty.jsonl", []))


# --- uniting


def test_one_positive_a_line_gives_one_query_with_all(tmp_path, caplog):
    """The layout of pairs. White space at the ends of a text does not make it another; the first one stays as it is."""
    rows = [
        {"query": EAT, "positives": [OTTERS]},
        {"query": RISE, "positives": [RHINE], "negatives": [SNOW]},
        {"query": f"{EAT} ", "positives": [SEALS, f"{OTTERS}\n"], "negatives": [SNOW]},
    ]
    texts = read_lines(tmp_path, *rows)
    assert texts.passages == [OTTERS, RHINE, SNOW, SEALS]
    assert texts.queries == [Query(EAT, None, (0, 3), (2,)), Query(RISE, None, (1,), (2,))]
    assert texts.n_real == 2
    assert told(caplog) == ["rows united with an earlier row of the same query: 1; passages that the query had already: 1"]


def test_the_same_query_with_another_instruction_is_another(tmp_path, caplog):
    """A line without one has the collection's."""
    rows = [{"query": EAT, "positives": [text], "instruction": i} for text, i in ((OTTERS, "A"), (SEALS, "B"), (SNOW, None))]
    texts = read(write_lines(tmp_path / "lines.jsonl", rows), instruction="B")
    assert texts.queries == [Query(EAT, "A", (0,)), Query(EAT, "B", (1, 2))]


def test_a_positive_of_one_line_is_no_negative_of_another(tmp_path, caplog):
    rows = [
        {"query": EAT, "positives": [OTTERS], "negatives": [SEALS, SNOW, RHINE]},
        {"query": EAT, "positives": [SEALS], "negatives": [OTTERS, SNOW]},
        {"query": RISE, "positives": [RHINE], "negatives": [RHINE, SNOW]},
    ]
    texts = read_lines(tmp_path, *rows)
    found = [(texts_of(texts, query.positives), texts_of(texts, query.negatives)) for query in texts.queries]
    assert found == [([OTTERS, SEALS], [SNOW, RHINE]), ([RHINE], [SNOW])]
    assert "negatives dropped because they are positives of the same query: 3" in told(caplog)[0]


def test_a_teacher_s_margins_are_kept(tmp_path, caplog):
    """Of a passage that a query has twice, the first."""
    rows = [
        {"query": EAT, "positives": [OTTERS], "negatives": [SNOW], "positive_scores": [4.0], "negative_scores": [-3.0]},
        {
            "query": EAT,
            "positives": [SEALS],
            "negatives": [SNOW, " "],
            "positive_scores": [2.0],
            "negative_scores": [-4.0, 0.0],
        },
        {"query": EAT, "positives": [SEALS], "negatives": [RHINE]},
    ]
    [query] = read_lines(tmp_path, *rows).queries
    assert query == Query(EAT, None, (0, 2), (1, 3), {0: 4.0, 1: -3.0, 2: 2.0})


def test_scores_from_0_to_1_are_told_because_they_look_like_probabilities(tmp_path, caplog):
    row = {"query": EAT, "positives": [OTTERS], "negatives": [SNOW], "positive_scores": [0.9], "negative_scores": [0.1]}
    read_lines(tmp_path, row)
    assert told(caplog) == ["teacher's scores, all from 0 to 1, which is unlikely for margins: 2"]


def test_blank_texts_are_left_out(tmp_path, caplog):
    rows = [
        {"query": " \n", "positives": [OTTERS]},
        {"query": EAT, "positives": ["", OTTERS], "negatives": ["\t"]},
        {"query": RISE, "positives": [" "], "negatives": [SNOW]},
    ]
    texts = read_lines(tmp_path, *rows)
    assert (texts.passages, texts.queries) == ([OTTERS, SNOW], [Query(EAT, None, (0,))])
    assert told(caplog) == ["blank queries: 1; blank passages: 3; queries dropped because they have no positive: 1"]


def test_a_sound_collection_is_read_without_a_word(tmp_path, caplog):
    read(write_collection(tmp_path / "beir"))
    read_lines(tmp_path, *examples(margins=True))
    assert caplog.records == []


# --- BEIR folders


def test_a_beir_folder_is_united_by_text_too(tmp_path, caplog):
    """The same text under two ids is one passage, and the same question under two ids one query; all is told in one line."""
    folder = write_collection(tmp_path / "beir")
    with (folder / "corpus.jsonl").open("a") as file:
        file.writelines(json.dumps({"_id": i, "text": text}) + "\n" for i, text in ((7, OTTERS), (8, " "), (9, "Crabs.")))
    with (folder / "queries.jsonl").open("a") as file:
        file.writelines(json.dumps({"_id": i, "text": text}) + "\n" for i, text in ((7, EAT), (8, " "), (9, "Why?")))
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("7\t7\t1\n7\t9\t1\n7\t9\t1\n8\t9\t1\n9\t8\t1\n9\tgone\t1\n")
    texts = read(folder)
    assert texts.passages == [*PASSAGES, "Crabs."]
    assert texts.queries == [Query(EAT, None, (0, 4)), Query(RISE, None, (1,))]
    assert dict(part.rsplit(": ", 1) for part in told(caplog)[0].split("; ")) == {
        "repeated judgements": "1",
        "judged passages missing from corpus.jsonl": "1",
        "blank queries": "1",
        "blank passages": "1",
        "passages with the same text as an earlier one": "1",
        "rows united with an earlier row of the same query": "1",
        "passages that the query had already": "1",
        "queries dropped because they have no positive": "1",
    }
    assert len(caplog.records) == 1
