"""Corpora of every kind to outputs of every kind: every row once, in order, with all that it had."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tools.bulk import BatchReranker
from tools.command_line import write_jsonl

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.bulk import Progress, Start, encode_corpus, encoding, read_encoded
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.errors import EncodingTooLargeError, SettingsError

ROWS: list[dict[str, Any]] = [
    {"_id": "a", "title": "T", "text": "naïve 東京", "n": 1, "tags": ["x", "y"]},
    {"_id": "b", "title": None, "text": "", "n": None, "tags": []},
    {"_id": "c", "title": "", "text": "same", "n": 3, "tags": None},
    {"_id": "d", "title": None, "text": "same", "n": 4, "tags": ["z"]},
    {"_id": "e", "title": None, "text": "huge " * 300_000, "n": 5, "tags": []},
]
PASSAGES = ["T naïve 東京", "", "same", "same", ROWS[4]["text"]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoding, "ROWS_PER_WINDOW", 2)
    monkeypatch.setattr(encoding, "ROWS_PER_STREAMED_WINDOW", 2)


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _write_dataset(path: Path) -> None:
    whole = datasets.Dataset.from_list([ROWS[4], *ROWS[:4]])
    # Shuffled: a dataset may keep an order beside its rows.
    whole.select([1, 2, 3, 4, 0]).save_to_disk(path)


def _write_parts(path: Path) -> None:
    """The second file lacks what is null in it, as other programs write it; one is no data."""
    path.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[3:]).drop_columns("title"), path / "b.parquet")
    (path / "_SUCCESS.parquet").touch()


INPUTS: dict[str, Callable[[Path], object]] = {
    "in.jsonl": lambda path: path.write_bytes(_lines(ROWS)),
    "in.jsonl.gz": lambda path: path.write_bytes(gzip.compress(_lines(ROWS))),
    "in.json": lambda path: path.write_text(json.dumps(ROWS)),
    "in.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3),
    "parquet-named-otherwise": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "parts": _write_parts,
    "dataset": _write_dataset,
}


@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.gz", "out.parquet", "-"])
@pytest.mark.parametrize("source", [*INPUTS, "-"])
def test_every_input_to_every_output(source: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS
    if source == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(_lines(ROWS))))
    else:
        INPUTS[source](Path(source))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, write_through=True))
    reranker = BatchReranker()
    started: list[Start] = []
    seen: list[Progress] = []
    report = encode_corpus(source, output, reranker, on_start=started.append, on_progress=seen.append)
    found = [json.loads(line) for line in written.getvalue().splitlines()] if output == "-" else list(read_encoded(output))
    kept = [{name: value for name, value in row.items() if not name.startswith("kalm_")} for row in found]
    assert kept == rows
    assert all(status == "stored" for status in reranker.read(_passages(found)))
    assert [row["kalm_fp"] for row in found] == [reranker.fingerprint] * 5
    assert report.counts.rows == seen[-1].rows == 5
    assert [start.n_rows for start in started] == [None if source == "-" else 5]
    if output != "-":
        whole = Path(output)
        assert report.n_bytes == sum(file.stat().st_size for file in ([whole] if whole.is_file() else whole.iterdir()))
    assert not Path(f"{output}.partial").exists()


def _passages(rows: list[dict[str, Any]]) -> list[Any]:
    return [Passage(text, row["kalm_encoding"]) for text, row in zip(PASSAGES, rows, strict=True)]


def test_csv_to_parquet() -> None:
    Path("in.tsv").write_text("_id\ttext\n1\ta\n2\tb\n")
    encode_corpus("in.tsv", "out.parquet", BatchReranker())
    assert [(row["_id"], row["text"]) for row in read_encoded("out.parquet")] == [("1", "a"), ("2", "b")]


def test_a_corpus_without_rows() -> None:
    Path("in.jsonl").touch()
    for name in ("out.jsonl", "out.parquet"):
        assert encode_corpus("in.jsonl", name, BatchReranker()).counts.rows == 0
        assert list(read_encoded(name)) == []


def test_a_text_is_encoded_once_wherever_it_is() -> None:
    """Also far apart; a carried encoding serves the rows after it; stale and corrupt ones are replaced."""
    carried, other = (each["kalm_encoding"] for each in BatchReranker().encode_to_metadata(["c", "other"]))
    rows = [
        {"text": "a"},
        {"text": "b"},
        {"text": "c", "kalm_encoding": carried},
        {"text": "a", "kalm_encoding": other, "kalm_fp": "old"},
        {"text": "c", "kalm_encoding": 7},
        {"text": "b"},
    ]
    reranker = BatchReranker()
    report = encode_corpus(write_jsonl(Path("in.jsonl"), rows), "out.jsonl", reranker)
    found = [row["kalm_encoding"] for row in read_encoded("out.jsonl")]
    assert found == [found[0], found[1], carried, found[0], carried, found[1]]
    assert reranker.stats.passages_encoded == 2
    counts = report.counts
    assert (counts.passed_through, counts.encoded, counts.repeated) == (1, 2, 3)
    assert (counts.stale, counts.corrupt) == (1, 1)


def test_bad_rows_stop_before_anything_is_encoded_or_are_left_out() -> None:
    Path("in.jsonl").write_bytes(b'{"text": "a"}\n{"no": 1}\n{"text": 1}\n{"text": "b"}\n')
    pq.write_table(pa.table({"text": ["a", None, "b"]}), "in.parquet")
    reranker = BatchReranker()
    with pytest.raises(SettingsError, match=r"in\.jsonl:2: a row must have its passage under 'text'"):
        encode_corpus("in.jsonl", "out.jsonl", reranker)
    with pytest.raises(SettingsError, match=r"in\.parquet, row 2: field 'text' must be a string"):
        encode_corpus("in.parquet", "out.jsonl", reranker)
    assert reranker.stats.passages_encoded == 0
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "in.parquet"]
    for source in ("in.jsonl", "in.parquet"):
        said: list[str] = []
        encode_corpus(source, f"{source}.out.parquet", reranker, report=said.append)
        assert [row["text"] for row in read_encoded(f"{source}.out.parquet")] == ["a", "b"]
        assert len(said) == {"in.jsonl": 2, "in.parquet": 1}[source]


def test_tables_keep_their_types_and_are_read_by_others() -> None:
    """Of columns that JSON lacks, too; datasets find the features of the input and two more."""
    table = pa.table(
        {
            "text": pa.array(["a", "b", "c"]),
            "when": pa.array([datetime(2020, 1, 2), None, datetime(2021, 1, 1)], pa.timestamp("ns")),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "vector": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
            "kalm_encoding": pa.array(["old", None, None]),
        }
    )
    pq.write_table(table, "in.parquet")
    encode_corpus("in.parquet", "out.parquet", BatchReranker())
    written = pq.read_table("out.parquet")
    assert written.schema.names == ["text", "when", "kind", "vector", "kalm_encoding", "kalm_fp"]
    kept = ["text", "when", "kind", "vector"]
    assert written.select(kept).schema == table.select(kept).schema
    assert written.select(kept).to_pydict() == table.select(kept).to_pydict()
    assert len(pd.read_parquet("out.parquet")) == 3
    with pytest.raises(SettingsError, match=r"has the column 'when' of type timestamp.*, which JSON lacks; write Parquet"):
        encode_corpus("in.parquet", "out.jsonl", BatchReranker())
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features=features).save_to_disk("dataset")
    encode_corpus("dataset", "labelled.parquet", BatchReranker())
    loaded = datasets.load_dataset(
        "parquet", data_files="labelled.parquet/*.parquet", split="train", cache_dir=str(Path("cache").resolve())
    )
    assert loaded.features["label"].names == ["no", "yes"]
    assert loaded.column_names == ["text", "label", "kalm_encoding", "kalm_fp"]


def test_rows_of_json_have_one_schema_in_all_files() -> None:
    """What is null at first, new later, whole before it has a fraction, or nested; nothing that was there is lost."""
    rows = [
        {"text": "a", "n": 1, "x": None, "m": {"p": None}},
        {"text": "b", "n": 2, "x": None, "m": {"p": [1]}},
        {"text": "c", "n": 2.5, "x": "now", "m": {"q": "r"}, "never": None},
    ]
    encode_corpus(write_jsonl(Path("in.jsonl"), rows), "out.parquet", BatchReranker())
    schemas = {str(pq.read_schema(path).remove_metadata()) for path in Path("out.parquet").iterdir()}
    assert len(schemas) == 1
    found = pq.read_table("out.parquet").drop_columns(["kalm_encoding", "kalm_fp"]).to_pylist()
    assert found == [
        {"text": "a", "n": 1.0, "x": None, "m": {"p": None, "q": None}, "never": None},
        {"text": "b", "n": 2.0, "x": None, "m": {"p": [1], "q": None}, "never": None},
        {"text": "c", "n": 2.5, "x": "now", "m": {"p": None, "q": "r"}, "never": None},
    ]


@pytest.mark.parametrize("values", [[1, "a"], [True, 1], [2**70, 1], [[1], 1], [{}, {}], ["\ud800", "a"], [2**60 + 1, 0.5]])
def test_what_parquet_cannot_hold_is_refused_before_anything_is_encoded(values: list[Any]) -> None:
    source = write_jsonl(Path("in.jsonl"), [{"text": "a", "odd": value} for value in values])
    reranker = BatchReranker()
    with pytest.raises(SettingsError, match=r"one type for all rows, but field 'odd' has none .* write JSON lines"):
        encode_corpus(source, "out.parquet", reranker)
    assert reranker.stats.passages_encoded == 0
    encode_corpus(source, "out.jsonl", reranker)
    assert [row["odd"] for row in read_encoded("out.jsonl")] == values


def test_a_stream_cannot_change_its_schema_nor_be_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first rows say what there is; what was written before the odd row is kept until it is overwritten."""
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c", "new": {"deep": 1}}]
    for overwrite, message in (
        (False, "field 'new' has none"),
        (False, "cannot be gone on with from a stream"),
        (True, "'new'"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(_lines(rows))))
        with pytest.raises(SettingsError, match=message):
            encode_corpus("-", "out.parquet", BatchReranker(), overwrite=overwrite)
    assert [row["text"] for row in read_encoded("out.parquet.partial/parts")] == ["a", "b"]


def test_an_output_that_is_there(tmp_path: Path) -> None:
    """One that is whole is left as it is; another is replaced only if that was asked for; the input may be the output."""
    source = write_jsonl(Path("in.jsonl"), [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    for name in ("out.jsonl", "out.parquet"):
        encode_corpus(source, name, BatchReranker())
        reranker = BatchReranker()
        assert encode_corpus(source, name, reranker).was_complete
        assert reranker.stats.passages_encoded == 0
        other = write_jsonl(Path("other.jsonl"), [{"text": "a"}, {"text": "b"}, {"text": "d"}])
        for given, model in ((other, "fake"), (source, "another")):
            with pytest.raises(SettingsError, match="is there already, and is not these rows with encodings of this model"):
                encode_corpus(given, name, BatchReranker(model))
        encode_corpus(other, name, BatchReranker(), overwrite=True)
        assert [row["text"] for row in read_encoded(name)] == ["a", "b", "d"]
    source.chmod(0o640)
    encode_corpus(source, source, BatchReranker())
    assert all("kalm_encoding" in row for row in read_encoded(source))
    assert source.stat().st_mode & 0o777 == 0o640
    reranker = BatchReranker()
    assert encode_corpus(source, source, reranker).counts.passed_through == 3


def _stop(progress: Progress) -> None:
    raise KeyboardInterrupt


def test_a_run_with_other_settings_or_rows_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(Path("in.jsonl"), [{"text": f"{number}", "body": "x"} for number in range(9)])
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(source, "out.jsonl", BatchReranker(), settings={"dtype": None}, on_progress=_stop)
    other = write_jsonl(Path("other.jsonl"), [{"text": f"{number}"} for number in range(9)])
    for message, arguments in (
        ("begun with fingerprint=", (source, "out.jsonl", BatchReranker("another"))),
        ("begun with input=", (other, "out.jsonl", BatchReranker())),
    ):
        with pytest.raises(SettingsError, match=message):
            encode_corpus(*arguments, settings={"dtype": None})
    with pytest.raises(SettingsError, match="begun with dtype=None, but this run has 'bfloat16'; give the same to go on, or"):
        encode_corpus(source, "out.jsonl", BatchReranker(), settings={"dtype": "bfloat16"})
    with pytest.raises(SettingsError, match="begun with text_field='text', but this run has 'body'"):
        encode_corpus(source, "out.jsonl", BatchReranker(), settings={"dtype": None}, fields=PassageFields("body"))
    assert encode_corpus(source, "out.jsonl", BatchReranker(), settings={"dtype": None}).resumed_rows == 2
    assert [row["text"] for row in read_encoded("out.jsonl")] == [str(number) for number in range(9)]


def test_places_that_cannot_be(tmp_path: Path) -> None:
    source = write_jsonl(Path("in.jsonl"), [{"text": "a"}])
    Path("folder").mkdir()
    Path("mine.parquet").mkdir()
    Path("mine.parquet/notes.txt").touch()
    Path("file.parquet").touch()
    Path("empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk("splits")
    for given, output, message in (
        (source, "folder", "it is a folder"),
        (source, "no/out.jsonl", "there is no folder 'no'"),
        (source, "out.csv", "must not be named .csv"),
        (source, "mine.parquet", "must not be a folder with other files"),
        (source, "file.parquet", "is a folder of files, but 'file.parquet' is a file"),
        ("empty", "out.jsonl", "a folder must have Parquet files, or be a dataset"),
        ("splits", "out.jsonl", "name one of: splits/train"),
    ):
        with pytest.raises(SettingsError, match=message):
            encode_corpus(given, output, BatchReranker())
    with pytest.raises(SettingsError, match="does not exist"):
        list(read_encoded("none.jsonl"))
    assert not list(Path().glob("*.partial"))


def test_a_payload_store_alone(make_reranker: Callable[..., KalmReranker]) -> None:
    """The store has the encodings by text; what it has is not encoded again; other rerankers have no place for them."""
    texts = ["a", "b", "a", "c", "d"]
    source = write_jsonl(Path("in.jsonl"), [{"text": text} for text in texts])
    settings: dict[str, Any] = {"payload_store": "store", "storage_mode": "reference", "cache_bytes": 0}
    report = encode_corpus(source, None, make_reranker(**settings))
    assert (report.counts.rows, report.counts.encoded) == (5, 4)
    again = make_reranker(**settings)
    assert encode_corpus(source, None, again).counts.encoded == 0
    assert again.stats.passages_encoded == 0
    assert make_reranker(payload_store="store").read(texts).counts["found"] == 5
    with pytest.raises(SettingsError, match="the encodings must go to a payload store"):
        encode_corpus(source, None, make_reranker())


def test_what_is_known_beforehand_is_about_right(
    make_reranker: Callable[..., KalmReranker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ROWS_PER_WINDOW", 300)
    draw = random.Random(0)
    texts = [" ".join(str(draw.random()) for _ in range(number % 40)) for number in range(300)]
    source = write_jsonl(Path("in.jsonl"), [{"text": text} for text in texts])
    for name in ("out.jsonl", "out.jsonl.gz", "out.parquet"):
        started: list[Start] = []
        report = encode_corpus(source, name, make_reranker(storage_codec="int8"), on_start=started.append)
        assert started[0].estimated_bytes == pytest.approx(report.n_bytes, rel=0.35), name


def test_an_encoding_that_does_not_fit_names_its_row(make_reranker: Callable[..., KalmReranker]) -> None:
    rows = [{"text": "a"}] * 5 + [{"text": "long " * 4000}]
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet")
    with pytest.raises(EncodingTooLargeError, match=r"^in\.parquet, row 6: an encoding must fit max_inline_bytes=1200"):
        encode_corpus("in.parquet", "out.parquet", make_reranker(max_inline_bytes=1200))
