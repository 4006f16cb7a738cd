"""Bulk encoding on a local Ray cluster: an actor and a driver are killed, and every row is there once."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tools.clusters import ray_cluster
from tools.corpora import draw_collection
from tools.waiting import until
from typer.testing import CliRunner

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.bulk import RowEncoder
from kalm_integrations.bulk.ray import cluster as clusters
from kalm_integrations.bulk.ray import encode_with_ray, running
from kalm_integrations.bulk.ray.folders import MANIFEST, Output, find_source
from kalm_integrations.bulk.ray.reading import check_rows, read_rows
from kalm_integrations.cli import app
from kalm_integrations.cli.on_ray import _address
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.errors import EncodingTooLargeError, EngineError, MissingExtraError, SettingsError

ENOUGH_SECONDS = 240.0
ROWS_PER_FILE = 20


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Three actors, of half a core each as Ray counts, and cores for reading, writing and looking for what is done."""
    with ray_cluster(4):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def rows():
    passages = draw_collection(240, n_words=200).passages
    return [
        {"id": key, "title": "Words" if i % 3 else None, "text": text, "nr": i}
        for i, (key, text) in enumerate(passages.items())
    ]


@pytest.fixture(scope="module")
def corpus(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def reranker():
    """The storage codec rounds nothing here: what differs in the last bit would become what differs by a level."""
    return KalmReranker.from_pretrained("pico", storage_codec="fp32")


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode(corpus, output, actors, **settings):
    return encode_with_ray(
        corpus, output, actors=actors, num_cpus=0.5, rows_per_file=ROWS_PER_FILE, storage_codec="fp32", **settings
    )


def actors():
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "_Encoder" in " ".join(child.cmdline()[:1]):
                found.append(child)
    return found


def parts(folder):
    return [path for path in folder.glob("*.parquet") if "pending" not in path.name]


def check_output(output, rows, reranker):
    """Check that the output has every row once, as the single process makes it."""
    assert sum(pq.read_metadata(path).num_rows for path in parts(output)) == len(rows)
    got = {row["id"]: row for row in pq.read_table(output).to_pylist()}
    alone = RowEncoder(reranker).encode(rows)
    assert [{**got[row["id"]], "kalm_encoding": ""} for row in alone] == [{**row, "kalm_encoding": ""} for row in alone]
    read = PassageFields().read
    ours = [Passage(read(row), row["kalm_encoding"]) for row in alone]
    theirs = [Passage(read(row), got[row["id"]]["kalm_encoding"]) for row in alone]
    assert set(reranker.read(theirs)) == {"stored"}
    query = "which team has won the league?"
    assert reranker.score(query, theirs) == pytest.approx(reranker.score(query, ours), abs=1e-5)


def test_of_three_actors_one_is_killed_and_every_row_is_there_once(corpus, rows, reranker, tmp_path):
    output, results = tmp_path / "encoded", []
    run = threading.Thread(target=lambda: results.append(encode(corpus, output, actors=3)), daemon=True)
    run.start()
    until(lambda: len(actors()) == 3 and parts(output), ENOUGH_SECONDS)
    killed = actors()[0]
    killed.kill()
    n_then = len(parts(output))
    run.join(ENOUGH_SECONDS)
    assert n_then < len(parts(output))
    [result] = results
    assert (result.n_rows, result.n_kept) == (len(rows), 0)
    assert result.counts.encoded >= len(rows)
    check_output(output, rows, reranker)
    assert not output.with_name("encoded.checkpoint").exists()
    again = encode(corpus, output, actors=3)
    assert (again.n_rows, again.n_kept, again.counts.rows) == (len(rows), len(rows), 0)


DRIVER = """
import sys
from kalm_integrations.bulk.ray import encode_with_ray
corpus, output, address, rows_per_file = sys.argv[1:]
encode_with_ray(
    corpus, output, address=address, actors=2, num_cpus=0.5, rows_per_file=int(rows_per_file), storage_codec="fp32"
)
"""


def test_a_run_whose_driver_was_killed_goes_on(corpus, rows, reranker, cluster, tmp_path):
    output = tmp_path / "encoded"
    arguments = [str(corpus), str(output), cluster, str(ROWS_PER_FILE)]
    with subprocess.Popen([sys.executable, "-c", DRIVER, *arguments]) as driver:
        until(lambda: len(parts(output.with_name("encoded.checkpoint"))) >= 3, ENOUGH_SECONDS)
        driver.kill()
    with pytest.raises(SettingsError, match="begun with compression_ratio=4, not compression_ratio=8"):
        encode(corpus, output, actors=2, compression_ratio=8)
    result = encode(corpus, output, actors=2)
    assert result.n_rows == len(rows)
    assert result.n_kept >= 3 * ROWS_PER_FILE
    assert result.counts.encoded == len(rows) - result.n_kept < len(rows)
    check_output(output, rows, reranker)


# --- what goes in


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_every_format_is_read(kind, tmp_path):
    rows = [{"id": i, "text": f"text {i}", "date": "2026-01-02" if i else None, "tags": ["a"]} for i in range(10)]
    path = tmp_path / f"corpus.{kind}"
    if kind == "jsonl":
        write_lines(path, *rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    source, fields = find_source(str(path)), PassageFields()
    n_rows, schema = check_rows(source, fields, "id")
    assert (n_rows, schema.names, schema.field("date").type) == (10, ["id", "text", "date", "tags"], pa.string())
    assert sorted(read_rows(source, fields, "id", schema).take_all(), key=lambda row: row["id"]) == rows


def test_what_carries_a_valid_encoding_keeps_it(reranker, tmp_path):
    rows = [{"id": i, "text": f"text {i}"} for i in range(6)]
    encoded = RowEncoder(reranker).encode(rows)
    pq.write_table(
        pa.Table.from_pylist([*encoded[:3], {**rows[3], "kalm_encoding": "kalm1.x"}, *rows[4:]]), tmp_path / "in.parquet"
    )
    counts = encode(tmp_path / "in.parquet", tmp_path / "out", actors=1).counts
    assert (counts.passed_through, counts.encoded, counts.corrupt) == (3, 3, 1)
    got = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["id"])
    assert got[:3] == encoded[:3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}, {"id": 1, "text": "c"}],
            "id of its own under 'id', but 2 rows have 1 there",
        ),
        (
            [{"id": 1, "text": "a"}, {"text": "b"}],
            r"in\.jsonl:2: a row must have an id under 'id', .* but has the keys: 'text'",
        ),
        ([{"id": 1.5, "text": "a"}], r"in\.jsonl:1: .* but has 1\.5 there"),
        (
            [{"id": 1, "text": "a"}, {"id": 2, "text": 7}],
            r"in\.jsonl:2: row 2: field 'text' must be a string, but has type int",
        ),
        ([{"id": 1, "text": "a", "year": 1}, {"id": 2, "text": "b", "year": "x"}], "field 'year' has none"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_encoded(rows, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        encode(write_lines(tmp_path / "in.jsonl", *rows), tmp_path / "out", actors=1)
    assert not parts(tmp_path / "out")


# --- what else is refused


def test_long_passages_are_read_in_windows_and_a_run_that_cuts_them_is_another(rows, tmp_path):
    """They are counted; each row carries the fingerprint of its own encoding."""
    short = {"id": "short", "title": None, "text": "a few words", "nr": -1}
    few, output = [*rows[:3], short], tmp_path / "out"
    path, settings = write_lines(tmp_path / "in.jsonl", *few), {"max_passage_tokens": 64}
    result = encode(path, output, actors=1, **settings)
    assert (result.counts.windowed, result.counts.truncated) == (3, 0)
    reranker = KalmReranker.from_pretrained("pico", storage_codec="fp32", **settings)
    check_output(output, few, reranker)
    found = {row["id"]: row["kalm_fp"] for row in pq.read_table(output).to_pylist()}
    whole, in_windows = reranker.fingerprints
    assert found == {**{row["id"]: in_windows for row in rows[:3]}, "short": whole}
    with pytest.raises(SettingsError, match=r"was begun with long_passages='windows', .*, not long_passages='cut'"):
        encode(path, output, actors=1, long_passages="cut", **settings)
    manifest = output / MANIFEST
    begun = json.loads(manifest.read_text())
    # As an earlier version has left it.
    for name in ("long_passages", "windows_fingerprint"):
        del begun["plan"][name]
    manifest.write_text(json.dumps(begun))
    assert encode(path, output, actors=1, long_passages="cut", **settings).n_rows == 4


def test_a_passage_that_does_not_fit_is_named(tmp_path):
    corpus = write_lines(tmp_path / "in.jsonl", {"id": "short", "text": "a"}, {"id": "d7", "text": "long " * 400})
    with pytest.raises(EncodingTooLargeError, match=r"^row 'd7': ") as caught:
        encode(corpus, tmp_path / "out", actors=1, max_inline_bytes=2500)
    assert type(caught.value) is EncodingTooLargeError


def test_an_actor_that_cannot_start_is_explained(tmp_path):
    corpus = write_lines(tmp_path / "in.jsonl", {"id": "d1", "text": "a"})
    with pytest.raises(EngineError, match=r"ended early, .*: device 'cuda:7' was asked for"):
        encode(corpus, tmp_path / "out", actors=1, device="cuda:7")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actors": 0}, "actors must be a positive whole number, but got 0"),
        ({"rows_per_file": 0}, "rows_per_file must be a positive"),
        ({"num_cpus": 0}, "num_cpus must be positive"),
        ({"actors": 4}, "must have room for 4 actors of 1 cores and 0 GPUs, and beside them 1 cores .* but has 4 cores"),
        ({"num_gpus": 1}, "has 4 cores and 0 GPUs"),
        ({"codec": "fp16"}, "settings must be out of .*, but got 'codec'"),
        ({"id_field": "id", "source": "nowhere.jsonl"}, "there is no .*nowhere"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    corpus = write_lines(tmp_path / "in.jsonl", {"id": "d1", "text": "a"})
    with pytest.raises(SettingsError, match=message):
        encode_with_ray(**{"source": corpus, "output": tmp_path / "out", **settings})


def test_a_folder_with_other_files_is_no_output(tmp_path):
    corpus = write_lines(tmp_path / "in.jsonl", {"id": "d1", "text": "a"})
    with pytest.raises(SettingsError, match=r"must be a new or an empty folder, .* has files"):
        encode(corpus, tmp_path, actors=1)


def test_parts_without_a_checkpoint_are_not_gone_on_with(tmp_path, monkeypatch):
    output = Output(str(tmp_path), None)
    assert running._make_checkpoint("id", output).checkpoint_path == f"{tmp_path}.checkpoint"
    pq.write_table(pa.table({"id": ["d1"]}), tmp_path / "part.parquet")
    with pytest.raises(SettingsError, match="cannot go on without its checkpoint"):
        running._make_checkpoint("id", output)
    # A Ray that has no such class does not keep parts and checkpoints in step.
    monkeypatch.delattr("ray.data.checkpoint.checkpoint_writer.PendingCheckpoint")
    with pytest.raises(SettingsError, match=r"cannot go on, for Ray [\d.]+ keeps no checkpoints"):
        running._make_checkpoint("id", output)
    (tmp_path / "part.parquet").unlink()
    assert running._make_checkpoint("id", output) is None


def test_one_run_at_a_time_may_write_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "LEASE_SECONDS", 1.0)
    with (
        clusters.leased(str(tmp_path)),
        pytest.raises(SettingsError, match="one run at a time may write into a folder"),
        clusters.leased(str(tmp_path)),
    ):
        pass


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    corpus = write_lines(tmp_path / "in.jsonl", {"id": "d1", "text": "a"})
    code = """
import sys
from kalm_integrations.bulk.ray import encode_with_ray
encode_with_ray(sys.argv[1], sys.argv[2], address="127.0.0.1:1")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert "SettingsError: address must be that of a running Ray cluster" in run.stderr.splitlines()[-1]


def test_without_ray_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("kalm_integrations.bulk.ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kalm-integrations\[ray\]"'):
        import_module("kalm_integrations.bulk.ray")


# --- kalm encode --engine ray


def test_the_command_encodes_on_ray(tmp_path):
    corpus = write_lines(tmp_path / "in.jsonl", *({"nr": i, "body": f"text {i}"} for i in range(3)))
    output = tmp_path / "out"
    options = ["--engine", "ray", "--id-field", "nr", "--text-field", "body", "--actors", "1", "--codec", "fp16"]
    result = CliRunner().invoke(app, ["encode", str(corpus), "-o", str(output), *options])
    assert result.exit_code == 0, result.output
    assert f"3 rows are in {output}" in result.stderr
    assert "3 passages encoded" in result.stderr
    assert pq.read_table(output).column_names == ["nr", "body", "kalm_encoding", "kalm_fp"]


@pytest.mark.parametrize("options", [[], ["-o", "out", "--skip-bad"], ["-o", "out", "--server", "http://127.0.0.1:1"]])
def test_the_command_refuses_what_ray_cannot_do(options, tmp_path):
    corpus = write_lines(tmp_path / "in.jsonl", {"id": "d1", "text": "a"})
    result = CliRunner().invoke(app, ["encode", str(corpus), "--engine", "ray", *options])
    assert result.exit_code != 0
    assert "--engine ray takes a file or folder and --output" in result.stderr


def test_the_command_keeps_addresses():
    assert _address(Path("s3://bucket/a/b.jsonl")) == "s3://bucket/a/b.jsonl"
    assert _address(Path("/data/corpus.jsonl")) == "/data/corpus.jsonl"
