"""`kalm mine`: the negatives of each method, and a teacher's margins."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tools.training_data import PASSAGES, QUERIES, write_collection, write_lines
from typer.testing import CliRunner

from kalm_integrations import KalmReranker
from kalm_integrations.cli import app
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.training.config import CollectionConfig
from kalm_integrations.training.sources import read_training_set
from kalm_integrations.training.teachers import SIMILARITY_SCALE, load_teacher


def mined(tmp_path: Path, source: Path, *options: object) -> list[dict[str, Any]]:
    output = tmp_path / "mined.jsonl"
    arguments = ["mine", str(source), "--output", str(output), *map(str, options)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    read_training_set(CollectionConfig(path=output))  # what is written is what the trainer reads
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_bm25_negatives_are_the_best_found_but_not_the_positives(tmp_path):
    folder = write_collection(tmp_path / "beir")
    lines = mined(tmp_path, folder, "--negatives", 1, "--depth", 1)
    assert [line["query"] for line in lines] == QUERIES
    for i, line in enumerate(lines):
        [(found, _)] = BM25(PASSAGES).search([QUERIES[i]], k=4)
        assert line["positives"] == [PASSAGES[i]]
        assert line["negatives"] == [PASSAGES[next(j for j in found if j != i)]]
    skipping = mined(tmp_path, folder, "--skip", 1, "--depth", 4)
    assert all(line["negatives"][0] not in other["negatives"] for line, other in zip(lines, skipping, strict=True))


def test_bi_encoder_negatives_are_the_nearest(tmp_path, bi_encoder):
    folder = write_collection(tmp_path / "beir")
    lines = mined(tmp_path, folder, "--method", "bi-encoder", "--encoder", bi_encoder, "--negatives", 1, "--depth", 1)
    encoder = SentenceTransformer(bi_encoder)
    similarities = encoder.similarity(encoder.encode(QUERIES), encoder.encode(PASSAGES))
    for i, (line, row) in enumerate(zip(lines, similarities, strict=True)):
        row[i] = -2
        assert line["negatives"] == [PASSAGES[int(row.argmax())]]


def test_same_title_negatives_are_other_passages_of_the_document(tmp_path):
    folder = write_collection(tmp_path / "beir")
    titles = ["fish", "river", "fish", "river"]
    rows = [{"_id": f"corpus{i}", "title": t, "text": p} for i, (t, p) in enumerate(zip(titles, PASSAGES, strict=True))]
    write_lines(folder / "corpus.jsonl", rows)
    lines = mined(tmp_path, folder, "--method", "same-title")
    assert [line["negatives"] for line in lines] == [[f"fish {PASSAGES[2]}"], [f"river {PASSAGES[3]}"]]


@pytest.mark.parametrize("method", ["bm25", "bi-encoder"])
def test_the_positive_of_another_line_is_no_negative(tmp_path, bi_encoder, method):
    """One positive a line, as in pairs and triplets: the lines of a query become one."""
    rows = [{"anchor": QUERIES[0], "positive": PASSAGES[i], "negative": PASSAGES[3]} for i in (0, 2)]
    rows.append({"anchor": QUERIES[1], "positive": PASSAGES[1], "negative": f" {PASSAGES[3]}"})
    options = ("--method", method, *(("--encoder", bi_encoder) if method == "bi-encoder" else ()))
    lines = mined(tmp_path, write_lines(tmp_path / "triplets.jsonl", rows), *options)
    assert [(line["query"], line["positives"]) for line in lines] == [
        (QUERIES[0], [PASSAGES[0], PASSAGES[2]]),
        (QUERIES[1], [PASSAGES[1]]),
    ]
    assert [sorted(line["negatives"]) for line in lines] == [
        sorted([PASSAGES[1], PASSAGES[3]]),
        sorted([PASSAGES[0], PASSAGES[2], PASSAGES[3]]),
    ]


@pytest.mark.parametrize("method", ["bm25", "same-title"])
def test_the_same_text_under_another_id_is_no_negative(tmp_path, method):
    """Nor is it mined twice; blank passages are no negatives either."""
    folder = write_collection(tmp_path / "beir")
    texts = [PASSAGES[0], "", PASSAGES[0], PASSAGES[2], PASSAGES[2]]
    rows = [{"_id": f"corpus{i}", "title": "fish", "text": text} for i, text in enumerate(texts)]
    write_lines(folder / "corpus.jsonl", [*rows, {"_id": 9, "title": "", "text": " "}])
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nqueries0\tcorpus2\t1\n")
    [line] = mined(tmp_path, folder, "--method", method)
    assert line["positives"] == [f"fish {PASSAGES[0]}"]
    assert sorted(line["negatives"]) == ["fish", f"fish {PASSAGES[2]}"]


@pytest.mark.parametrize("kind", ["kalm", "cross-encoder", "bi-encoder"])
def test_a_teacher_s_margins_are_written(tmp_path, tiny_checkpoint, cross_encoder, bi_encoder, kind):
    model = {"kalm": str(tiny_checkpoint), "cross-encoder": cross_encoder, "bi-encoder": bi_encoder}[kind]
    lines = mined(tmp_path, write_collection(tmp_path / "beir"), "--teacher", model, "--teacher-kind", kind)
    for line in lines:
        passages = [*line["positives"], *line["negatives"]]
        if kind == "kalm":
            ranked = KalmReranker.from_pretrained(model, storage_codec="fp32").rank(line["query"], passages)
            expected = [p.margin for p in sorted(ranked, key=lambda p: p.index)]
        elif kind == "cross-encoder":
            pairs = [(line["query"], passage) for passage in passages]
            expected = CrossEncoder(model, activation_fn=torch.nn.Identity()).predict(pairs).tolist()
        else:
            encoder = SentenceTransformer(model)
            similarities = encoder.similarity(encoder.encode([line["query"]]), encoder.encode(passages))
            expected = [SIMILARITY_SCALE * similarity for similarity in similarities[0].tolist()]
        assert line["positive_scores"] + line["negative_scores"] == pytest.approx(expected, abs=1e-4)


def test_a_teacher_reads_of_a_long_passage_what_is_trained_on():
    """The beginning: the answer is behind the cut."""
    passage = "The Rhine rises in the Swiss Alps and flows north. " * 150 + "Otters live on fish."
    query, open_pico = "What do otters eat?", partial(KalmReranker.from_pretrained, "pico", storage_codec="fp32")
    [[cut], [whole]] = [open_pico(long_passages=way).rank(query, [passage]) for way in ("cut", "windows")]
    assert load_teacher("pico", "kalm")(query, [passage], None) == [cut.margin]
    assert whole.margin > cut.margin


def test_candidates_that_the_teacher_finds_too_good_are_left_out(tmp_path, tiny_checkpoint):
    folder = write_collection(tmp_path / "beir")
    options = ("--teacher", tiny_checkpoint, "--below-positive")
    everything = mined(tmp_path, folder, *options, -1000)
    assert all(len(line["negatives"]) == 3 for line in everything)
    margins = [s - line["positive_scores"][0] for line in everything for s in line["negative_scores"]]
    limit = sorted(margins)[len(margins) // 2]
    kept = [
        s - line["positive_scores"][0] for line in mined(tmp_path, folder, *options, -limit) for s in line["negative_scores"]
    ]
    assert sorted(kept) == pytest.approx([m for m in sorted(margins) if m <= limit + 1e-6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--below-positive", "1"), "there is no --teacher"),
        (("--method", "bi-encoder"), "--encoder and --method bi-encoder come together"),
        (("--encoder", "x"), "--encoder and --method bi-encoder come together"),
    ],
)
def test_mining_options_that_need_each_other(tmp_path, options, message):
    result = CliRunner().invoke(app, ["mine", str(write_collection(tmp_path / "beir")), *options])
    assert result.exit_code == 2
    assert message in result.stderr
