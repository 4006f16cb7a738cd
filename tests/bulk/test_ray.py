"""Bulk encoding on a local Ray cluster: an actor and a driver are killed, and every row is there once."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from importlib import import_module

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tools.clusters import ray_cluster
from tools.corpora import draw_collection
from tools.waiting import until

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.bulk import RowEncoder
from kalm_integrations.bulk.ray import encode_with_ray, running
from kalm_integrations.bulk.ray.folders import find_source
from kalm_integrations.bulk.ray.reading import check_rows, read_rows
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.errors import EncodingTooLargeError, EngineError, MissingExtraError, SettingsError

ENOUGH_SECONDS = 180.0
ROWS_PER_FILE = 50


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Cores, which Ray only counts, for three actors, and for reading, writing and looking for what is done."""
    with ray_cluster(6):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def rows():
    passages = draw_collection(1500, n_words=100).passages
    return [{"id": key, "title": "Words" if i % 3 else None, "text": text, "nr": i} for i, (key, text) in enumerate(passages.items())]


@pytest.fixture(scope="module")
def corpus(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def reranker():
    return KalmReranker.from_pretrained("pico")


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def actors():
    return [child for child in psutil.Process().children(recursive=True) if "_Encoder" in " ".join(child.cmdline()[:1])]


def check_output(output, rows, reranker):
    """Check that the output has every row once, as the single process makes it."""
    got = {row["id"]: row for row in pq.read_table(output).to_pylist()}
    assert len(got) == sum(pq.read_metadata(path).num_rows for path in output.glob("*.parquet")) == len(rows)
    alone = RowEncoder(reranker).encode(rows)
    for row in alone:
        assert {**got[row["id"]], "kalm_encoding": ""} == {**row, "kalm_encoding": ""}
    read = PassageFields().read
    ours = [Passage(read(row), row["kalm_encoding"]) for row in alone]
    theirs = [Passage(read(row), got[row["id"]]["kalm_encoding"]) for row in alone]
    assert set(reranker.read(theirs)) == {"stored"}
    query = "which team has won the league?"
    assert reranker.score(query, theirs) == pytest.approx(reranker.score(query, ours), abs=1e-5)
    return sum(mine.encoding == other.encoding for mine, other in zip(ours, theirs, strict=True))


def test_of_three_actors_one_is_killed_and_every_row_is_there_once(corpus, rows, reranker, tmp_path):
    output, results = tmp_path / "encoded", []
    run = threading.Thread(
        target=lambda: results.append(encode_with_ray(corpus, output, actors=3, rows_per_file=ROWS_PER_FILE, rows_per_batch=50))
    )
    run.start()
    until(lambda: len(actors()) == 3 and list(output.glob("*.parquet")), ENOUGH_SECONDS)
    killed = actors()[0]
    killed.kill()
    n_then = len(list(output.glob("*.parquet")))
    until(lambda: len(actors()) == 3 or results, ENOUGH_SECONDS)
    run.join()
    assert n_then < len(rows) // ROWS_PER_FILE
    [result] = results
    assert (result.n_rows, result.n_kept) == (len(rows), 0)
    n_equal = check_output(output, rows, reranker)
    print("EQUAL", n_equal, n_then)
    assert not output.with_name("encoded.checkpoint").exists()
    # It is at its end: there is nothing left to do.
    assert encode_with_ray(corpus, output).counts.rows == 0


DRIVER = """
import sys
from kalm_integrations.bulk.ray import encode_with_ray
corpus, output, address, rows_per_file = sys.argv[1:]
encode_with_ray(corpus, output, address=address, actors=3, rows_per_file=int(rows_per_file), rows_per_batch=50)
"""


def test_a_run_whose_driver_was_killed_goes_on(corpus, rows, reranker, cluster, tmp_path):
    output = tmp_path / "encoded"
    committed = output.with_name("encoded.checkpoint")
    arguments = [str(corpus), str(output), cluster, str(ROWS_PER_FILE)]
    with subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}) as driver:
        until(lambda: len([path for path in committed.glob("*.parquet") if "pending" not in path.name]) >= 3, ENOUGH_SECONDS)
        driver.kill()
    with pytest.raises(SettingsError, match="begun with storage_codec='rot4', not storage_codec='fp16'"):
        encode_with_ray(corpus, output, storage_codec="fp16")
    result = encode_with_ray(corpus, output, actors=2, rows_per_file=ROWS_PER_FILE)
    print(result)
    assert result.n_kept >= 3 * ROWS_PER_FILE
    assert result.counts.encoded + result.counts.repeated == len(rows) - result.n_kept
    check_output(output, rows, reranker)
